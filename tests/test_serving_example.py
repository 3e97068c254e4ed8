"""``examples/serve.py``, as a real process that gets real requests; and the page about it."""

import http.client
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsetwin as st
from sparsetwin.checkpoint import save_sparse
from sparsetwin.models import build

for package in ("fastapi", "uvicorn", "PIL"):
    pytest.importorskip(package, reason=f"examples/serve.py needs {package}: pip install 'sparsetwin[serve]'")
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text()


def network() -> nn.Module:
    """The digits' network with nine of ten weights of its convolutions zero, its batch norms not trivial."""
    torch.manual_seed(0)
    model = build("digits_cnn").eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data[torch.rand(layer.weight.shape) < 0.9] = 0
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return model


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": layer.weight != 0 for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)
    }


class View:
    """What a pair sees of a training run."""

    phase, steps = None, 1

    def __init__(self, masks: dict[str, torch.Tensor]) -> None:
        self.masks, self.target_names = masks, tuple(masks)


class Server:
    """A process that serves; `close` ends it."""

    def __init__(self, *arguments: object, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(ROOT / "examples" / "serve.py"), *map(str, arguments), "--port", str(self.port)]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
        limit = time.monotonic() + 120
        while True:
            try:
                assert self.ask("GET", "/health")[0] == 200
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < limit, self.log.read_text()
                time.sleep(0.1)

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, dict[str, object]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def predict(self, body: bytes, kind: str = "application/json") -> tuple[int, dict[str, object]]:
        return self.ask("POST", "/predict", body, kind)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("served")
    model = network()
    save_sparse(folder / "sparse.safetensors", model.state_dict(), masks(model))
    server = Server("sparse.safetensors", "--workers", 2, folder=folder)
    yield server
    server.close()


def expected(pixels: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return network()(((pixels / 255 - 0.3051) / 0.3757).unsqueeze(0))[0].softmax(0).tolist()


def as_json(pixels: torch.Tensor) -> bytes:
    return json.dumps({"pixels": pixels.tolist()}).encode()


def as_file(pixels: torch.Tensor, kind: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("L", (8, 8), bytes(pixels.to(torch.uint8).flatten().tolist())).save(file, kind)
    return file.getvalue()


DIGITS = [torch.randint(0, 256, (1, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in range(12)]


def test_pixels_get_the_answer_of_the_network(served):
    for pixels in DIGITS:
        status, answer = served.predict(as_json(pixels))
        assert status == 200
        assert answer["probabilities"] == pytest.approx(expected(pixels), abs=1e-5)
        assert answer["class"] == max(range(10), key=answer["probabilities"].__getitem__)


def test_a_png_gets_the_answer_of_its_pixels(served):
    for pixels in DIGITS[:3]:
        assert served.predict(as_file(pixels, "PNG"), "image/png") == served.predict(as_json(pixels))


def test_a_png_of_one_bit_a_pixel_gets_the_answer_of_its_pixels(served):
    rows = bytes(0b10110010 ^ row for row in range(8))
    pixels = torch.tensor([[255 * (row >> shift & 1) for shift in range(7, -1, -1)] for row in rows])
    file = png(8, 1, b"".join(b"\0" + rows[row : row + 1] for row in range(8)))
    assert served.predict(file, "image/png") == served.predict(as_json(pixels.reshape(1, 8, 8)))


def test_a_jpeg_gets_the_answer_of_what_it_shows(served):
    from PIL import Image

    file = as_file(DIGITS[0], "JPEG")
    shown = torch.tensor(list(Image.open(io.BytesIO(file)).tobytes())).reshape(1, 8, 8)
    assert served.predict(file, "image/jpeg") == served.predict(as_json(shown))


def test_requests_at_once_get_their_own_answers(served):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(served.predict, map(as_json, DIGITS * 5)))
    for pixels, (status, answer) in zip(DIGITS * 5, found, strict=True):
        assert status == 200
        assert answer["probabilities"] == pytest.approx(expected(pixels), abs=1e-5)


def test_health_tells_what_is_expected(served):
    assert served.ask("GET", "/health") == (200, {"status": "ok", "input": [1, 8, 8], "workers": 2})


def png(side: int, bits: int, pixels: bytes) -> bytes:
    """A grey picture of so many bits a pixel, each of its rows with a zero before it."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(pixels)) + part(b"IEND", b"")


def huge_png(side: int) -> bytes:
    """A small file that says that it is a very large picture."""
    return png(side, 8, b"\0" * 64)


def deep_png() -> bytes:
    """A ramp from 0 to 65535."""
    return png(8, 16, b"".join(b"\0" + struct.pack(">8H", *range(row * 8 * 1040, 65536, 1040)[:8]) for row in range(8)))


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (b"", "application/json", 400, "expected {"),
        (b"\xff\xfe", "application/json", 400, "expected {"),
        (b"[1, 2]", "application/json", 400, "expected {"),
        (b"[" * 100_000, "application/json", 400, "expected {"),
        (b'{"image": []}', "application/json", 400, "expected {"),
        (b'{"pixels": [[1], [2, 3]]}', "application/json", 400, "expected {"),
        (b'{"pixels": [["1"]]}', "application/json", 400, "expected {"),
        (b'{"pixels": [1e400]}', "application/json", 422, "shape (1, 8, 8), got (1,)"),
        (b'{"pixels": []}', "application/json", 422, "shape (1, 8, 8), got (0,)"),
        (as_json(torch.zeros(3, 8, 8)), "application/json", 422, "got (3, 8, 8)"),
        (as_json(torch.full((1, 8, 8), float("nan"))), "application/json", 422, "from 0 to 255"),
        (as_json(torch.full((1, 8, 8), 256)), "application/json", 422, "from 0 to 255"),
        (as_json(torch.ones(1, 8, 8, dtype=torch.bool)), "application/json", 422, "expected pixels"),
        (b"GIF89a", "image/png", 400, "no whole PNG or JPEG"),
        (b"", "image/jpeg", 400, "no whole PNG or JPEG"),
        (as_file(DIGITS[0], "PNG")[:60], "image/png", 400, "no whole PNG or JPEG"),
        (as_file(DIGITS[0], "JPEG")[:200], "image/jpeg", 400, "no whole PNG or JPEG"),
        (deep_png(), "image/png", 422, "8 bits a channel, got a picture of mode I;16"),
        (huge_png(9), "image/png", 422, "8 x 8 pixels, got 9 x 9"),
        (huge_png(60_000), "image/png", 400, "no whole PNG or JPEG"),
        (b"x" * (1 << 20) + b"x", "application/json", 413, "at most 1048576 bytes"),
        (as_json(DIGITS[0]), "text/plain", 415, "expected a content type"),
        (as_json(DIGITS[0]), "", 415, "got none"),
    ],
)
def test_a_bad_request_gets_a_clear_answer(served, body, kind, status, words):
    found, answer = served.predict(body, kind)
    assert found == status, answer
    assert words in str(answer["detail"])
    assert served.predict(as_json(DIGITS[0]))[0] == 200


def test_the_page_shows_options_that_there_are():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "serve.py"), "--help"], capture_output=True, text=True
    )
    commands = re.findall(r"python examples/serve\.py(?:.*\\\n)*.*", PAGE)
    assert len(commands) == 3
    shown = {flag for command in commands for flag in re.findall(r"--[a-z]+", command)}
    assert shown == {"--workers", "--port", "--model", "--shape", "--mean", "--deviation"}
    assert not [flag for flag in shown if f"  {flag} " not in done.stdout]


def test_the_code_of_the_page_makes_a_file_that_is_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network()
    st.Pair("runs/digits/pair").save(model, View(masks(model)))
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    exec(compile(code, "serving.md", "exec"), {})
    for source in ("digits.deployed.safetensors", "runs/digits/pair"):
        server = Server(source, folder=tmp_path)
        try:
            assert server.predict(as_json(DIGITS[0]))[1]["probabilities"] == pytest.approx(
                expected(DIGITS[0]), abs=1e-5
            )
        finally:
            server.close()
