"""What the tests of kernels share: random sparse weights, targets that run here, the error that goals are set in."""

from dataclasses import replace

import torch
from torch import Tensor

from sparsetwin.kernels import TARGETS, KeptWeight, Target, half_target, host_target

FP32 = 1e-5  # max|y - ref| / max|ref|, the bound that the library promises
FP16 = 2e-3  # the same for a layer with float16 arithmetic


def relative_error(y: Tensor, expected: Tensor, *, terms: float = 0.0) -> float:
    """Return max|y - expected| / max|expected|, or over the size of the summed terms where these nearly cancel."""
    assert y.shape == expected.shape
    return float((y.double() - expected).abs().max() / expected.abs().max().clamp_min(max(terms, 1e-30)))


def terms_of(weight: Tensor, x: Tensor) -> float:
    """Return a tenth of the largest sum of the sizes of a product's terms."""
    return 0.1 * float((weight.double().abs() @ x.double().abs()).max())


def sparse(*shape: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < density)


def dense(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def runnable_targets() -> dict[str, Target]:
    """This machine's best, the generic one, and the widths of all others with this machine's instructions."""
    host = host_target()
    widths = {f"{lanes} lanes": replace(host, name="wide", lanes=lanes, registers=32) for lanes in (4, 8, 16)}
    return {"host": host, "generic": TARGETS["generic"], **widths}


def half_targets() -> dict[str, Target]:
    """Float16 arithmetic as this machine has it, and as LLVM puts it together where there is none."""
    host, found = host_target(), half_target()
    emulated = {"emulated": replace(host, name="emulated", registers=32, halves=True)} if host.half else {}
    return emulated if found is None else {**emulated, "native": found}


NARROW = ("int8", "float16", "bfloat16")


def kept(*shape: int, density: float, value: str, seed: int = 0, scaled: bool = True) -> KeptWeight:
    """A weight as a file holds it; some of its kept values are zero."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*shape, generator=generator) < density
    bits = KeptWeight.from_dense(mask.float()).bits
    count = int(mask.sum())
    if value == "int8":
        values = torch.randint(-127, 128, (count,), generator=generator).to(torch.int8)
    else:
        values = torch.randn(count, generator=generator).to(getattr(torch, value))
        values[::7] = 0
    scales = torch.rand(shape[0], generator=generator).double() / 64 if scaled else None
    return KeptWeight(shape=shape, bits=bits, values=values, scales=scales)
