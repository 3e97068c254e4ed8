"""One layout for all planes that must look alike: what one kernel reads is what another has written.

A convolution's planes have one pitch on both sides, so sheets fall into classes of equal pitch; within a class, sheets
of one size share one layout, with margins large enough for each of its readers. Pooling and splitting free the pitch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparsetwin.kernels import PlaneLayout, make_layout
from sparsetwin.runtime._lowering import Lowered
from sparsetwin.runtime._sheets import Sheet
from sparsetwin.runtime._steps import Pool, Product


@dataclass
class _Need:
    lead: int = 0
    body: int = 0


def lay_out(lowered: Lowered, dtype: torch.dtype = torch.float32) -> dict[int, PlaneLayout]:
    """Return the layout of every sheet, whose planes are of a dtype."""
    classes = _pitch_classes(lowered)
    pitches: dict[int, int] = {}
    for number, sheet in lowered.sheets.items():
        width = -(-sheet.width // sheet.phases[1])
        pitches[classes[number]] = max(pitches.get(classes[number], 1), width)
    for step in lowered.steps:
        if isinstance(step, Product):
            found = classes[step.source]
            pitches[found] = max(pitches[found], step.geometry.least_pitch())
        elif isinstance(step, Pool) and step.window.kernel != (1, 1):
            found = classes[step.source]
            pitches[found] = max(pitches[found], step.window.least_pitch(lowered.sheets[step.source].width))
    needs = _margins(lowered, classes, pitches, dtype)
    layouts = {}
    for number, sheet in lowered.sheets.items():
        need, pitch = needs[_key(sheet, classes[number])], pitches[classes[number]]
        layouts[number] = make_layout(
            channels=sheet.channels,
            height=sheet.height,
            width=sheet.width,
            phases=sheet.phases,
            pitch=pitch,
            lead=need.lead,
            body=need.body,
            dtype=dtype,
        )
    return layouts


def _pitch_classes(lowered: Lowered) -> dict[int, int]:
    """Return for each sheet the representative of those that have its pitch."""
    parent = {number: number for number in lowered.sheets}

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for step in lowered.steps:
        if isinstance(step, Product):
            for other in (step.sheet, step.residual):
                if other is not None:
                    parent[root(other)] = root(step.source)
    return {number: root(number) for number in lowered.sheets}


_Key = tuple[int, Sheet]


def _key(sheet: Sheet, found: int) -> _Key:
    return (found, sheet)


def _margins(
    lowered: Lowered, classes: Mapping[int, int], pitches: Mapping[int, int], dtype: torch.dtype
) -> dict[_Key, _Need]:
    needs: dict[_Key, _Need] = {_key(sheet, classes[number]): _Need() for number, sheet in lowered.sheets.items()}

    def ask(number: int, lead: int, body: int) -> None:
        need = needs[_key(lowered.sheets[number], classes[number])]
        need.lead, need.body = max(need.lead, lead), max(need.body, body)

    for step in lowered.steps:
        if isinstance(step, Product):
            pitch = pitches[classes[step.source]]
            down, right = step.geometry.shifts(0)[0], step.geometry.shifts(1)[0]
            ask(step.source, -down * pitch - right, step.geometry.body(pitch, dtype))
            ask(step.sheet, 0, step.geometry.written(pitch, dtype))
            if step.residual is not None:
                ask(step.residual, 0, step.geometry.written(pitch, dtype))
        elif isinstance(step, Pool):
            sheet, pitch = lowered.sheets[step.source], pitches[classes[step.source]]
            row, column = step.origin
            body = step.window.body(sheet.height - row, sheet.width - column, pitch, dtype)
            ask(step.source, step.window.lead(pitch), row * pitch + column + body)
    return needs
