"""What was decided and what was measured, as plain data: printed as a table, saved as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsetwin.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer: what runs it, how dense it is, and the seconds measured for each engine on one call."""

    name: str
    kind: str
    density: float
    engine: str
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How calls of one shape run. Printing it gives a table.

    ``candidates`` holds the seconds of a whole call for each way that was measured, ``skipped`` the reason for each
    that was not. ``engine`` is the fastest. ``layers`` tells about the sparse program, whatever is fastest.
    """

    machine: str
    threads: int
    inputs: str
    engine: str
    candidates: Mapping[str, float]
    skipped: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[LayerPlan, ...] = ()
    torch_operations: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    workspace_bytes: int = 0  # of the activations of one call of the sparse program

    def __str__(self) -> str:
        lines = [f"runs as: {self.engine}    input: {self.inputs}    threads: {self.threads}    {self.machine}"]
        lines += ["whole calls, ms: " + ", ".join(f"{name} {1e3 * s:.2f}" for name, s in self.candidates.items())]
        lines += [f"not measured: {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"note: {note}" for note in self.notes]
        if self.layers:
            lines += ["", *_table(self.layers)]
        if self.workspace_bytes:
            lines += ["", f"activations of one call: {self.workspace_bytes / 2**20:.1f} MiB"]
        if self.torch_operations:
            found = ", ".join(f"{name} x{count}" for name, count in self.torch_operations.items())
            lines += [f"in PyTorch between kernels: {found}"]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as what JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_json` described.

        Raises:
            CheckpointError: If a field is missing, unknown or of another kind.
        """
        try:
            layers = tuple(LayerPlan(**layer) for layer in found["layers"])
            return cls(**{**found, "layers": layers, "notes": tuple(found["notes"])})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the file's plan is not one of this version: {error}") from error


def _table(layers: tuple[LayerPlan, ...]) -> list[str]:
    engines = list(dict.fromkeys(name for layer in layers for name in layer.seconds))
    head = ["layer", "kind", "density", "runs on", *(f"{name} ms" for name in engines)]
    rows = [
        [
            layer.name,
            layer.kind,
            f"{layer.density:.4f}",
            layer.engine,
            *(f"{1e3 * layer.seconds[name]:.3f}" if name in layer.seconds else "-" for name in engines),
        ]
        for layer in layers
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
