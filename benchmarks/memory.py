"""Memory of a process that loads and runs a ResNet-50: dense, deployed from a sparse file, and from a deployed one.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --out benchmarks/results/memory/resnet50.json    # some minutes

Weights are PyTorch's random initial ones, pruned by global magnitude as in ``benchmarks/sizes.py``; one image of 224
pixels, one thread. Each row is a process of its own. What it imports and what compiling a first small network takes is
there before anything is counted, in the dense rows too, and stands in a column of its own. ``loading`` is the peak
until the network is ready, planning included; ``held`` is what stays; ``running`` is the peak of three calls. All are
resident memory above the start, pages of mapped files included. The C library is told to return freed memory at once
(MALLOC_MMAP_THRESHOLD_=65536).

``eager`` builds a model and loads a ``state_dict``; ``deploy(model)`` deploys that one; ``deploy(file)`` deploys the
sparse file; ``load`` reads what ``deployed.save`` wrote after that.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sizes import pruned

from sparsetwin import __version__
from sparsetwin.checkpoint import save_dense, save_sparse

SPARSITIES = (0.9, 0.95)
FORMS = {"fp32": "exact", "bf16": "bfloat16", "int8": "int8"}
_RUN = """
import gc, json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from sparsetwin.checkpoint import load_sparse, save_sparse
from sparsetwin.models import resnet18, resnet50
from sparsetwin.runtime import deploy, load

def kibibytes(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

def forget():
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")

path, how, prefer = sys.argv[1:]
with torch.no_grad():  # the code that it takes is loaded on first use
    small = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    deploy(small, torch.zeros(1, 3, 8, 8), rivals=())
    small(torch.zeros(1, 3, 8, 8))
    del small
    x = torch.zeros(1, 3, 224, 224)
    forget()
    start = kibibytes("VmRSS")
    begun = time.process_time()
    if how in ("eager", "deploy(model)"):
        network = resnet50().eval()
        network.load_state_dict(load_sparse(path).tensors)
        if how == "deploy(model)":
            network = deploy(network, x, rivals=())
    elif how == "deploy(file)":
        network = deploy(path, resnet50, x, prefer=prefer)
    else:
        network = load(path)
    seconds = time.process_time() - begun
    found = {"imported": start, "loading": kibibytes("VmHWM") - start}
    forget()
    found["held"] = kibibytes("VmRSS") - start
    for _ in range(3):
        network(x)
    found["running"] = kibibytes("VmHWM") - start
    calls = []
    for _ in range(9):
        begun = time.process_time()
        network(x)
        calls.append(time.process_time() - begun)
found = {key: 1024 * value for key, value in found.items()}
found |= {"loading_seconds": seconds, "call_ms": 1e3 * sorted(calls)[4]}
if how == "deploy(file)":
    network.save(path + ".deployed")
    found["engine"] = network.plan.engine
    found["layers"] = {name: sum(layer.engine == name for layer in network.plan.layers)
                       for name in sorted({layer.engine for layer in network.plan.layers})}
print(json.dumps(found))
"""


def measured(path: Path, how: str, prefer: str = "time") -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _RUN, str(path), how, prefer]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found = {"file_bytes": path.stat().st_size, **json.loads(done.stdout)}
    print(f"{path.name:<16}{how:<15}{prefer:<8}", found, flush=True)
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for sparsity in SPARSITIES:
        tensors, masks = pruned(sparsity)
        if not found:
            save_dense(folder / "dense", tensors)
            found.append({"file": "dense fp32", "how": "eager", **measured(folder / "dense", "eager")})
        for name, values in FORMS.items():
            path = folder / f"{name}-{sparsity}"
            save_sparse(path, tensors, masks, values=values)
            about = {"file": f"sparse {name}", "sparsity": sparsity}
            if name == "fp32":
                found.append({**about, "how": "deploy(model)", **measured(path, "deploy(model)")})
            for prefer in ("time",) if name == "fp32" else ("time", "memory"):
                told = {**about, "prefer": prefer}
                found.append({**told, "how": "deploy(file)", **measured(path, "deploy(file)", prefer)})
                deployed = Path(f"{path}.deployed")
                found.append({**told, "how": "load", **measured(deployed, "load", prefer)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = rows(Path(folder))
    told = {
        "network": "resnet50, random weights, seed 0, all convolutions and the classifier pruned by global magnitude",
        "versions": {"sparsetwin": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "rows": found,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
