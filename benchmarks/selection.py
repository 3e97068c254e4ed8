"""How fast is exact global selection against ``torch.kthvalue``, and how much memory does it need?

The weights are those of ResNet-50's 54 layers at initialisation, 25.5 million. The baseline concatenates their
magnitudes, takes the threshold from ``torch.kthvalue`` and compares each layer with it; it does not keep an exact
number where weights tie, nor a weight in every layer. Both alternate in one process, so that the ratio holds on a
machine that does other work, too. Memory is measured in a process of its own for each: once as the system sees it, and
once with ``MALLOC_MMAP_THRESHOLD_`` set so that freed blocks go back at once, which shows what is held.
Run it with ``python benchmarks/selection.py``.
"""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from sparsetwin.distributions import Global
from sparsetwin.models import resnet50
from sparsetwin.scores import magnitude
from sparsetwin.selection import select_masks
from sparsetwin.targets import Targets


def layers(dtype, memory_format):
    torch.manual_seed(0)
    weights = {name: weight.detach().to(dtype) for name, weight in Targets().resolve(resnet50()).items()}
    if memory_format == "channels_last":
        last = torch.channels_last
        weights = {n: w.to(memory_format=last if w.ndim == 4 else torch.contiguous_format) for n, w in weights.items()}
    return weights


def by_histograms(weights, sparsity):
    budgets = Global().budgets({name: weight.shape for name, weight in weights.items()}, sparsity)
    return select_masks(weights, lambda name: magnitude(weights[name]), budgets)


def by_kthvalue(weights, sparsity):
    scores = {name: magnitude(weight) for name, weight in weights.items()}
    flat = torch.cat([score.flatten() for score in scores.values()])
    threshold = flat.kthvalue(round(sparsity * flat.numel()) + 1).values
    del flat
    return {name: score >= threshold for name, score in scores.items()}


METHODS = {"histograms": by_histograms, "kthvalue": by_kthvalue}


def seconds(method, weights, sparsity):
    started = time.perf_counter()
    method(weights, sparsity)
    return time.perf_counter() - started


def mebibytes(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def extra_memory(method, weights, sparsity):
    """Return the peak besides the masks, in MiB."""
    method({name: weight for name, weight in weights.items() if "layer1" in name}, sparsity)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = mebibytes("VmRSS")
    masks = method(weights, sparsity)
    return mebibytes("VmHWM") - before - sum(mask.numel() for mask in masks.values()) / 2**20


def in_own_process(arguments, **given):
    command = [sys.executable, __file__, "--sparsity", str(arguments.sparsity)]
    command += [word for key, value in given.items() if key != "malloc" for word in (f"--{key}", str(value))]
    command += ["--repetitions", str(arguments.repetitions)]
    threads = {"OMP_NUM_THREADS": str(given.get("threads", 1))}
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536"} if given.get("malloc") else {}
    output = subprocess.check_output(command, env={**os.environ, **threads, **malloc}, text=True)
    return json.loads(output)


def compare(arguments):
    weights = layers(getattr(torch, arguments.dtype), arguments.format)
    taken = {name: [] for name in METHODS}
    for repetition in range(-1, arguments.repetitions):
        for name, method in METHODS.items():
            spent = seconds(method, weights, arguments.sparsity)
            taken[name] += [spent] if repetition >= 0 else []
    ratios = [ours / theirs for ours, theirs in zip(*taken.values(), strict=True)]
    return {**{name: statistics.median(times) for name, times in taken.items()}, "ratios": sorted(ratios)}


def report(arguments):
    print(
        f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}, {os.cpu_count()} CPUs"
    )
    print(
        f"load {os.getloadavg()[0]:.1f}; sparsity {arguments.sparsity}, {arguments.repetitions} alternating repetitions"
    )
    print("\n| threads | dtype | format | selection, s | kthvalue, s | ratio: median | lowest | highest |")
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    cases = [(1, "float32", "contiguous"), (2, "float32", "contiguous"), (1, "bfloat16", "contiguous"),
             (1, "float32", "channels_last")]  # fmt: skip
    for threads, dtype, memory_format in cases:
        result = in_own_process(arguments, task="compare", threads=threads, dtype=dtype, format=memory_format)
        ratios = result["ratios"]
        print(
            f"| {threads} | {dtype} | {memory_format} | {result['histograms']:.3f} | {result['kthvalue']:.3f} | "
            f"{statistics.median(ratios):.2f} | {ratios[0]:.2f} | {ratios[-1]:.2f} |"
        )
    print("\n| float32, peak besides the masks | held, MiB | as the system sees it, MiB |\n|---|---:|---:|")
    for name in METHODS:
        held, seen = (in_own_process(arguments, task=name, malloc=malloc) for malloc in (True, False))
        print(f"| {name} | {held:.0f} | {seen:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--task", choices=["report", "compare", *METHODS], default="report")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--format", choices=["contiguous", "channels_last"], default="contiguous")
    arguments = parser.parse_args()
    if arguments.task == "report":
        report(arguments)
        return
    torch.set_num_threads(arguments.threads)
    if arguments.task == "compare":
        print(json.dumps(compare(arguments)))
    else:
        weights = layers(torch.float32, arguments.format)
        print(json.dumps(extra_memory(METHODS[arguments.task], weights, arguments.sparsity)))


if __name__ == "__main__":
    main()
