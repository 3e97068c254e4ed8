"""Serve a sparse half over HTTP, on a CPU: FastAPI in front of `sparsetwin.deploy`.

pip install 'sparsetwin[deploy,serve]'      (that is: pip install fastapi uvicorn pillow)
python examples/serve.py runs/digits/pair   (a pair's folder, a sparse file, or what Deployed.save wrote)
"""

import argparse
import asyncio
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from PIL import Image
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.checkpoint import SparseFile
from sparsetwin.models import build

MOST_BYTES = 1 << 20  # of a request
Image.MAX_IMAGE_PIXELS = 1 << 22  # a small file can be a huge picture


@dataclass(frozen=True, kw_only=True)
class Images:
    """What the network takes: pixels from 0 to 255, normalised as in training. The defaults are those of the digits."""

    shape: tuple[int, ...] = (1, 8, 8)  # channels, height, width
    mean: tuple[float, ...] = (0.3051,)  # of each channel, white being 1
    deviation: tuple[float, ...] = (0.3757,)

    def from_json(self, body: bytes) -> Tensor:
        """Return the image of ``{"pixels": [channels][height][width]}``."""
        try:
            found = json.loads(body)
            pixels = torch.tensor(found["pixels"])
        except (ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
            raise HTTPException(400, f'expected {{"pixels": [...]}}, nested lists of numbers: {error}') from error
        if pixels.shape != self.shape or pixels.dtype == torch.bool:
            raise HTTPException(422, f"expected pixels of shape {self.shape}, got {tuple(pixels.shape)}")
        if not bool(((pixels >= 0) & (pixels <= 255)).all()):  # NaN is neither
            raise HTTPException(422, "expected pixels from 0 to 255")
        return self._normalised(pixels.float())

    def from_file(self, body: bytes) -> Tensor:
        """Return the image of a PNG or JPEG file, in grey or colour as the network wants it."""
        channels, height, width = self.shape
        try:
            with Image.open(io.BytesIO(body), formats=("PNG", "JPEG")) as image:
                if image.size != (width, height):  # known before a pixel is decoded
                    raise HTTPException(422, f"expected {width} x {height} pixels, got {image.width} x {image.height}")
                if image.mode.startswith(("I", "F")):  # converting would cut what is above 255 off
                    raise HTTPException(422, f"expected 8 bits a channel, got a picture of mode {image.mode}")
                decoded = image.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise HTTPException(400, "this is no whole PNG or JPEG image") from error
        pixels = torch.frombuffer(bytearray(decoded.tobytes()), dtype=torch.uint8)
        return self._normalised(pixels.reshape(height, width, channels).permute(2, 0, 1).float())

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(values).reshape(-1, 1, 1) for values in (self.mean, self.deviation))
        return ((pixels / 255 - mean) / deviation).unsqueeze(0).contiguous()


def open_network(source: Path, *, model: str, half: str, images: Images) -> st.runtime.Deployed:
    """Return the network ready to run: read from a deployed file, or measured on this machine."""
    if source.name.endswith(".deployed.safetensors"):
        return st.runtime.load(source, threads=1)
    network: nn.Module
    if source.is_dir():
        network = st.Pair(source).load(half, build(model))
    else:
        with torch.device("meta"):
            network = build(model)
        with SparseFile.open(source) as file:
            file.load_into(network)
    return st.deploy(network, torch.zeros(1, *images.shape), threads=1, rivals=())


def make_app(network: nn.Module, images: Images, *, workers: int) -> FastAPI:
    """Return the application: requests wait for one of so many threads, each of which runs one image at a time."""
    app = FastAPI(title="sparsetwin")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="predict")
    kinds = {"application/json": images.from_json, "image/png": images.from_file, "image/jpeg": images.from_file}

    def answer(kind: str, body: bytes) -> dict[str, object]:
        with torch.no_grad():
            scores = network(kinds[kind](body))[0].softmax(0)
        return {"class": int(scores.argmax()), "probabilities": [round(float(score), 6) for score in scores]}

    @app.get("/health")
    async def health() -> dict[str, object]:
        return {"status": "ok", "input": images.shape, "workers": workers}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, object]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in kinds:
            raise HTTPException(415, f"expected a content type of {', '.join(kinds)}; got {kind or 'none'}")
        body = await read(request)
        return await asyncio.get_running_loop().run_in_executor(pool, answer, kind, body)

    return app


async def read(request: Request) -> bytes:
    """Return the body, as far as it is allowed."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"expected at most {MOST_BYTES} bytes")
    return bytes(body)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a pair's folder, a sparse file, or *.deployed.safetensors")
    parser.add_argument("--half", default="sparse", help="member of the pair")
    parser.add_argument("--model", default="digits_cnn", help="the network's name")
    parser.add_argument("--shape", type=int, nargs=3, default=Images.shape, metavar=("C", "H", "W"))
    parser.add_argument("--mean", type=float, nargs="+", default=Images.mean)
    parser.add_argument("--deviation", type=float, nargs="+", default=Images.deviation)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads, one a core")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    torch.set_num_threads(1)  # every worker has a core of its own
    images = Images(shape=tuple(options.shape), mean=tuple(options.mean), deviation=tuple(options.deviation))
    network = open_network(options.source, model=options.model, half=options.half, images=images)
    print(network.plan, flush=True)
    uvicorn.run(make_app(network, images, workers=options.workers), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
