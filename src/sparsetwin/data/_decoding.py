"""Decoding small images by the ten thousand, and a cache file of the decoded bytes."""

import hashlib
import io
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparsetwin.data._shards import Part
from sparsetwin.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
_VERSION = 1  # of the cache file
_FORMATS = {b"RIFF": "WEBP", b"\x89PNG": "PNG", b"\xff\xd8": "JPEG"}  # by how a file starts
_CHUNK = 250  # images that a thread decodes at a time


def decode(parts: Sequence[Part], *, side: int) -> Pixels:
    """Decode all images, on as many threads as this process may use processors.

    They help as far as Pillow decodes outside the GIL: much for large PNG and JPEG images, little for small WebP ones.

    Args:
        parts: Encoded images.
        side: Height and width in pixels that each must have.

    Returns:
        (images, 3, side, side), uint8.

    Raises:
        DataError: If Pillow is missing, or an image is corrupted or of another size.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError("images need Pillow: pip install 'sparsetwin[data]'") from error
    decoded = np.empty((sum(len(part.images) for part in parts), side, side, 3), dtype=np.uint8)
    with ThreadPoolExecutor(_processors()) as threads:
        jobs, first = [], 0
        for part in parts:
            for start in range(0, len(part.images), _CHUNK):
                images = part.images[start : start + _CHUNK]
                target = decoded[first + start : first + start + len(images)]
                jobs.append(threads.submit(_decode_chunk, images, target, part.origin, start))
            first += len(part.images)
        for job in jobs:
            job.result()
    return np.ascontiguousarray(decoded.transpose(0, 3, 1, 2))


def open_rgb(encoded: bytes) -> "Image":
    """Decode an image of any format and mode to RGB.

    Naming the format spares Pillow the trial of dozens: a small WebP image decodes in half the time.
    """
    from PIL import Image

    known = next((name for start, name in _FORMATS.items() if encoded.startswith(start)), None)
    image = Image.open(io.BytesIO(encoded), formats=[known] if known else None)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode_chunk(images: Sequence[bytes], target: Pixels, origin: str, first: int) -> None:
    for row, data in enumerate(images):
        try:
            image = open_rgb(data)
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
            raise DataError(f"row {first + row} of {origin} holds no whole image ({error}); get it again") from error
        height, width, channels = target.shape[1:]
        if image.size != (width, height):
            raise DataError(
                f"row {first + row} of {origin} is an image of {image.height}x{image.width} pixels; "
                f"expected {height}x{width}"
            )
        target[row] = np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(height, width, channels)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def content_key(parts: Sequence[Part]) -> str:
    """Return a hash of all encoded images in their order."""
    digest = hashlib.blake2b(f"decoded {_VERSION}".encode(), digest_size=16)
    for part in parts:
        digest.update(np.array([len(data) for data in part.images], dtype="<i8").tobytes())
        for data in part.images:
            digest.update(data)
    return digest.hexdigest()


def cached(folder: Path | None, key: str, make: Callable[[], Pixels]) -> Pixels:
    """Return what ``make`` makes, from the cache if it was made before.

    The file is written aside and renamed when whole, and carries a checksum. One that is corrupted is made again and
    one that cannot be written is done without; each gives one warning.

    Args:
        folder: Of the cache; by default ``sparsetwin`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.
        key: Names the file; stands for everything that the result depends on.
        make: Called if there is no good file.
    """
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "sparsetwin"
    path = folder / f"images-{key}.npz"
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                pixels: Pixels = arrays["pixels"]
            return pixels
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            warnings.warn(f"the cache file {path} is corrupted ({error}); it is made again", stacklevel=2)
    pixels = make()
    try:
        _write(path, pixels)
    except OSError as error:
        warnings.warn(
            f"decoded images cannot be kept in {folder} ({error}) and are decoded again at every start; give another "
            "cache folder",
            stacklevel=2,
        )
    return pixels


def _write(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, pixels=pixels)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
