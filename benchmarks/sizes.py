"""Size on disk and peak memory of loading, of a sparse ResNet-50 in every file format, against dense ones.

    python benchmarks/sizes.py --out benchmarks/results/sizes/resnet50.json     # about two minutes

Weights are PyTorch's random initial ones, pruned by the global magnitude selection that AC/DC uses: sizes depend on how
many weights are kept, not on which. Dense files are also compressed, as archives and downloads are: zip (deflate 6) and
zstd (level 9).

Each load runs in a process of its own; its peak is what the process held above what it held before, the model and
mapped pages of the file included. ``whole`` builds a model and loads a state_dict into it, ``into`` fills a model from
the meta device, ``one by one`` decodes every tensor and keeps none. The C library is told to return freed memory at
once (MALLOC_MMAP_THRESHOLD_=65536); without that it holds on to 10 to 45 MB here.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pyarrow
import torch

from sparsetwin import __version__
from sparsetwin.checkpoint import save_dense, save_sparse, save_sparse_bitmask
from sparsetwin.masking import apply_masks_
from sparsetwin.models import resnet50
from sparsetwin.scores import magnitude
from sparsetwin.selection import Budget, select_masks
from sparsetwin.targets import Targets

SPARSITIES = (0.9, 0.95)
FORMS = {"fp32": "exact", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
_LOAD = """
import sys
from pathlib import Path
import torch
from sparsetwin.checkpoint import SparseFile, load_sparse
from sparsetwin.models import resnet50

def kibibytes(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

path, how = sys.argv[1:]
torch.set_num_threads(1)
with SparseFile.open(path) as file:  # the code that it takes is loaded on first use
    file.dense("layer1.0.conv1.weight")
for device in ("cpu", "meta"):
    with torch.device(device):
        resnet50(num_classes=2)
Path("/proc/self/clear_refs").write_text("5")
start = kibibytes("VmRSS")
if how == "whole":
    model = resnet50()
    model.load_state_dict(load_sparse(path).tensors)
elif how == "into":
    with torch.device("meta"):
        model = resnet50()
    with SparseFile.open(path) as file:
        file.load_into(model)
else:
    with SparseFile.open(path) as file:
        for name, tensor in file.items():
            del tensor
print(1024 * (kibibytes("VmHWM") - start))
"""


def pruned(sparsity: float):
    torch.manual_seed(0)
    model = resnet50()
    weights = Targets().resolve(model)
    total = sum(weight.numel() for weight in weights.values())
    budget = Budget(tuple(weights), kept=total - round(sparsity * total))
    with torch.no_grad():
        masks = select_masks(weights, lambda name: magnitude(weights[name]), [budget])
        apply_masks_(weights, masks)
    return model.state_dict(), masks


def compressed(path: Path) -> dict[str, int]:
    content = path.read_bytes()
    zstd = pyarrow.Codec("zstd", compression_level=9).compress(content)
    return {"bytes": len(content), "zip_bytes": len(zlib.compress(content, 6)), "zstd_bytes": len(zstd)}


def loaded(path: Path, how: str) -> dict[str, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _LOAD, str(path), how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return {"peak_bytes": int(done.stdout)}


def measure(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for sparsity in SPARSITIES:
        tensors, masks = pruned(sparsity)
        if not rows:
            torch.manual_seed(0)
            save_dense(folder / "dense", resnet50().state_dict())
            peaks = {how: loaded(folder / "dense", how) for how in ("whole", "into", "one by one")}
            rows.append({"file": "dense fp32", **compressed(folder / "dense"), **peaks})
        save_dense(folder / "zeros", tensors)
        rows.append({"file": "dense fp32 with zeros", "sparsity": sparsity, **compressed(folder / "zeros")})
        for name, values in FORMS.items():
            path = folder / name
            save_sparse(path, tensors, masks, values=values)
            row = {"file": f"sparse {name}", "sparsity": sparsity, **compressed(path)}
            rows.append({**row, **{how: loaded(path, how) for how in ("whole", "into", "one by one")}})
            print(rows[-1], flush=True)
        save_sparse_bitmask(folder / "legacy", tensors, masks)
        rows.append({"file": "sparse-bitmask fp32", "sparsity": sparsity, **compressed(folder / "legacy")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    told = {
        "network": "resnet50, random weights, seed 0, all convolutions and the classifier pruned by global magnitude",
        "versions": {"sparsetwin": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
