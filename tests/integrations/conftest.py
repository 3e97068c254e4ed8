"""Real text and images for the trainers, one CPU thread and equal random numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text_file() -> Path:
    """A text of 1.1 MB."""
    path = DATA / "tinyshakespeare" / "input.txt"
    if not path.is_file():
        pytest.skip(f"needs the text {path}")
    return path


@pytest.fixture(scope="session")
def tokens(text_file: Path) -> torch.Tensor:
    """The first bytes of the text as tokens: (20000,) int64 in [0, 256)."""
    return torch.tensor(list(text_file.read_bytes()[:20_000]))


@pytest.fixture(scope="session")
def images() -> list[dict[str, object]]:
    """The first 64 test images of CIFAR-10, as a ViT of transformers takes them."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="CIFAR-10 is stored as Parquet")
    image = pytest.importorskip("PIL.Image", reason="the images are WebP")
    np = pytest.importorskip("numpy")
    path = DATA / "cifar10" / "test-00000-of-00001.parquet"
    if not path.is_file():
        pytest.skip(f"needs the images {path}")
    import io

    rows = next(parquet.ParquetFile(path).iter_batches(batch_size=64)).to_pylist()
    pixels = (np.asarray(image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows)
    tensors = (torch.from_numpy(array.copy()).permute(2, 0, 1) / 255 - 0.5 for array in pixels)
    return [{"pixel_values": t, "labels": row["label"]} for t, row in zip(tensors, rows, strict=True)]
