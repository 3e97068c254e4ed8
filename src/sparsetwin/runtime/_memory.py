"""Which sheets share memory: a buffer serves sheets of one layout, one after the other.

Only pixels are ever written, so that a buffer's zeros between them stay zero for all sheets of its layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparsetwin.kernels import PlaneLayout
from sparsetwin.runtime._steps import Step, TensorStep, sheets_read, sheets_written


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """Steps on planes that run image by image, one after the other."""

    steps: tuple[Step, ...]
    images: int


Part = TensorStep | Segment


@dataclass(frozen=True, kw_only=True, eq=False)
class Memory:
    """Where sheets lie: local ones in a buffer of one image, those that outlive their segment whole."""

    buffers: tuple[PlaneLayout, ...]
    local: Mapping[int, int]  # sheet -> buffer
    whole: frozenset[int]  # sheets that several segments use


def plan_memory(parts: Sequence[Part], layouts: Mapping[int, PlaneLayout]) -> Memory:
    """Return which buffer each sheet lies in, with as few buffers as a scan in order needs."""
    segments = [part for part in parts if isinstance(part, Segment)]
    homes: dict[int, set[int]] = {}
    for number, segment in enumerate(segments):
        for step in segment.steps:
            for sheet in (*sheets_read(step), *sheets_written(step)):
                homes.setdefault(sheet, set()).add(number)
    whole = frozenset(sheet for sheet, found in homes.items() if len(found) > 1)
    buffers: list[PlaneLayout] = []
    local: dict[int, int] = {}
    for segment in segments:
        _scan(segment, layouts, whole=whole, buffers=buffers, local=local)
    return Memory(buffers=tuple(buffers), local=local, whole=whole)


def _scan(
    segment: Segment,
    layouts: Mapping[int, PlaneLayout],
    *,
    whole: frozenset[int],
    buffers: list[PlaneLayout],
    local: dict[int, int],
) -> None:
    last: dict[int, int] = {}
    for place, step in enumerate(segment.steps):
        for sheet in (*sheets_read(step), *sheets_written(step)):
            last[sheet] = place
    free: dict[PlaneLayout, list[int]] = {}
    for number, layout in enumerate(buffers):
        free.setdefault(layout, []).append(number)
    for place, step in enumerate(segment.steps):
        for sheet in sheets_written(step):
            if sheet in whole or sheet in local:
                continue
            layout = layouts[sheet]
            if free.get(layout):
                local[sheet] = free[layout].pop()  # the one used last: its lines are still in the cache
            else:
                local[sheet] = len(buffers)
                buffers.append(layout)
        for sheet in {*sheets_read(step), *sheets_written(step)}:
            if last[sheet] == place and sheet in local:
                free.setdefault(layouts[sheet], []).append(local[sheet])
