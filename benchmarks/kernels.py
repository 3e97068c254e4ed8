"""Generated sparse kernels against PyTorch's dense and sparse ones, as ratios within one run.

    python benchmarks/kernels.py                       # every case, one and two threads; a few minutes
    python benchmarks/kernels.py --only convolution --threads 1
    python benchmarks/kernels.py --only tokens --threads 1 --out tokens.json

Contestants of a case take turns, round after round; how often one is faster than another is the median of the rounds'
quotients: on a shared machine it means more than the milliseconds. With one thread the clock is the process's own
processor time, since a long call is interrupted by others more often than a short one; with more threads it is the
wall. Every sparse result is checked against float64 before it is timed. "convert" includes the conversions of layout
that a layer on its own needs (token-major to feature-major and back, images to planes and back); without the word,
activations stay in the kernels' layout, as they do between the layers of a network. Cases of few tokens go through 24
matrices in turn, more than the caches hold, and include the Python around each call. torch has no sparse convolution
to compare with.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from inference import machine, quartiles, write
from torch import Tensor

from sparsetwin.kernels import (
    ConvolutionGeometry,
    CSRBlocks,
    Pool,
    SparseConvolution,
    SparseLinear,
    SparseProduct,
    TokenProduct,
    empty_padded,
    host_target,
    reference_convolution,
    reference_product,
)

DENSITIES = (0.2, 0.1, 0.05, 0.02)
MATRICES = 24  # for one to eight tokens
Contestants = dict[str, Callable[[], object]]
Seconds = dict[str, list[float]]
Results = dict[str, dict[str, Any]]


def sparse(*shape: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return weight * (torch.rand(*shape, generator=generator) < density)


def race(contestants: Contestants, *, rounds: int) -> Seconds:
    """Return each contestant's seconds; they take turns, and the order is reversed every other round."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: Seconds = {name: [] for name in contestants}
    names = list(contestants)
    for round_number in range(-1, rounds):
        for name in names:
            started = clock()
            contestants[name]()
            if round_number >= 0:
                seconds[name].append(clock() - started)
        names.reverse()
    return seconds


def summary(case: str, seconds: Seconds, results: Results, *, calls: int = 1) -> None:
    """Print a case and add it to the results."""
    dense = [name for name in seconds if name.startswith("torch dense")]
    results[case] = {
        name: {
            "median_ms": round(statistics.median(found) / calls * 1e3, 4),
            "times_faster_than": {other: quartiles(seconds[other], found)[0] for other in dense},
        }
        for name, found in seconds.items()
    }
    cells = [
        f"{name} {row['median_ms']:8.3f} ms {row['times_faster_than']['torch dense']:6.2f}x"
        for name, row in results[case].items()
    ]
    print(f"{case:<34} " + " | ".join(cells), flush=True)


def check(y: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((y.double() - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"relative error {error:.1e}"


def csr(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        return weight.to_sparse_csr()


def linear_case(tokens: int, density: float, pool: Pool | None, rounds: int, results: Results) -> None:
    """A linear 768 -> 3072 on many tokens."""
    weight, x = sparse(3072, 768, density=density), torch.randn(tokens, 768)
    product, linear = SparseProduct(weight, columns=tokens), SparseLinear(weight)
    across, out, compressed = product.pad(x.t()), empty_padded(3072, tokens), csr(weight)
    check(linear(x, pool=pool)[:8], reference_product(weight, x[:8].t()).t(), 1e-5)
    contestants: Contestants = {
        "torch dense": lambda: F.linear(x, weight),
        "torch CSR": lambda: F.linear(x, compressed),
        "sparse": lambda: product(across, out=out, pool=pool),
        "sparse, convert": lambda: linear(x, pool=pool),
    }
    summary(f"linear 3072x768, {tokens} tokens, {density}", race(contestants, rounds=rounds), results)


def token_case(tokens: int, density: float, pool: Pool | None, rounds: int, results: Results) -> None:
    """The same linear on one to eight tokens, where the weights are what moves."""
    weights = [sparse(3072, 768, density=density, seed=seed) for seed in range(MATRICES)]
    x = torch.randn(tokens, 768)
    matrices = [CSRBlocks.from_dense(weight) for weight in weights]
    exact = [TokenProduct(matrix, tokens=tokens) for matrix in matrices]
    half = [TokenProduct(matrix, tokens=tokens, value="bfloat16") for matrix in matrices]
    compressed, rounded = [csr(weight) for weight in weights], [weight.bfloat16() for weight in weights]
    short = x.bfloat16()
    check(exact[0](x), reference_product(weights[0], x.t()).t(), 1e-5)
    check(half[0](x), reference_product(weights[0], x.t()).t(), 1e-2)
    contestants: Contestants = {
        "torch dense": lambda: [F.linear(x, weight) for weight in weights],
        "torch dense bf16": lambda: [F.linear(short, weight) for weight in rounded],
        "torch CSR": lambda: [F.linear(x, weight) for weight in compressed],
        "sparse fp32": lambda: [product(x, pool=pool) for product in exact],
        "sparse bf16": lambda: [product(x, pool=pool) for product in half],
    }
    summary(f"linear 3072x768, {tokens} tokens, {density}", race(contestants, rounds=rounds), results, calls=MATRICES)


def convolution_case(
    size: tuple[int, int, int, int], density: float, pool: Pool | None, rounds: int, results: Results
) -> None:
    """A convolution of one image: (in, out, kernel, height and width)."""
    in_channels, out_channels, kernel, side = size
    padding = (kernel // 2, kernel // 2)
    geometry = ConvolutionGeometry(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel=(kernel, kernel),
        height=side,
        width=side,
        padding=padding,
    )
    weight, x = (
        sparse(out_channels, in_channels, kernel, kernel, density=density),
        torch.randn(1, in_channels, side, side),
    )
    convolution = SparseConvolution(weight, geometry=geometry)
    planes, out = convolution.source.pack(x), convolution.destination.empty(1)
    last = x.to(memory_format=torch.channels_last)
    check(convolution.images(x, pool=pool), reference_convolution(weight, x, geometry=geometry), 1e-5)
    contestants: Contestants = {
        "torch dense": lambda: F.conv2d(x, weight, padding=padding),
        "torch channels_last": lambda: F.conv2d(last, weight, padding=padding),
        "sparse": lambda: convolution(planes, out=out, pool=pool),
        "sparse, convert": lambda: convolution.images(x, pool=pool),
    }
    case = f"conv {kernel}x{kernel} {in_channels}->{out_channels} {side}x{side}, {density}"
    summary(case, race(contestants, rounds=rounds), results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("linear", "tokens", "convolution"))
    parser.add_argument("--threads", type=int, nargs="*", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="where the results go, as JSON")
    settings = parser.parse_args()
    target = host_target()
    shown = {"only": settings.only, "rounds": settings.rounds, "matrices": MATRICES, "target": target.name}
    report: dict[str, Any] = {"machine": machine(), "settings": shown, "results": {}}
    print(f"{report['machine']}, target {target.name} ({target.lanes} lanes)")
    print("milliseconds are medians; x is how often faster than torch dense fp32 in the same rounds", flush=True)
    for threads in settings.threads:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        pool = Pool(threads) if threads > 1 else None
        print(f"--- {threads} thread(s)")
        results: Results = {}
        report["results"][f"{threads} threads"] = results
        for density in DENSITIES:
            if settings.only in (None, "tokens"):
                for tokens in (1, 8):
                    token_case(tokens, density, pool, settings.rounds, results)
            if settings.only in (None, "linear"):
                for tokens in (128, 1024):
                    rounds = settings.rounds if tokens < 1024 else max(3, settings.rounds // 2)
                    linear_case(tokens, density, pool, rounds, results)
            if settings.only in (None, "convolution"):
                for size in ((64, 64, 3, 56), (256, 256, 3, 14), (1024, 256, 1, 14)):
                    convolution_case(size, density, pool, settings.rounds, results)
    write(report, settings.out)


if __name__ == "__main__":
    main()
