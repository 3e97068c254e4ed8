"""A contest of whole calls: programs, the model layer by layer, and dense rivals; each is timed, or told why not."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import nn

from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._graph import Graph
from sparsetwin.runtime._int8_rival import NAME, int8_runner
from sparsetwin.runtime._network import Network
from sparsetwin.runtime._rivals import (
    NotHereError,
    Runner,
    bfloat16_runner,
    channels_last_runner,
    compiled_runner,
    dense_bound,
    eager_runner,
    openvino_runner,
)
from sparsetwin.runtime._timing import race, reason_of

_ROUNDS, _QUICK_ROUNDS = 5, 3


class Terms(Protocol):
    """What a contest needs to know from a planner."""

    @property
    def network(self) -> Network:
        """What is deployed."""

    @property
    def dense(self) -> bool:
        """Whether all weights may be there dense at once."""

    @property
    def threads(self) -> int:
        """Of the kernels."""

    @property
    def reduced(self) -> bool:
        """Whether bfloat16 is allowed."""

    @property
    def rivals(self) -> tuple[str, ...]:
        """Dense engines besides eager PyTorch."""

    @property
    def calibration(self) -> tuple[Call, ...]:
        """Batches with which an int8 rival is made; none: there is no such rival."""

    def swapped(self) -> nn.Module:
        """Return the model with sparse linears in place, or itself."""


class Contest:
    """Collects runners, times them on one call, and keeps the reasons of those left out.

    Args:
        terms: What takes part.
        call: Of the model.
        graph: Of the call, if it could be traced.
        quick: Whether to leave out what takes long to prepare.
    """

    def __init__(self, terms: Terms, call: Call, graph: Graph | None, *, quick: bool) -> None:
        self.terms, self.call, self.graph, self.quick = terms, call, graph, quick
        self._model: nn.Module | None = None
        self.runners: dict[str, Runner] = {}
        self.skipped: dict[str, str] = {}
        self.notes: list[str] = []

    @torch.no_grad()
    def seconds(self, programs: Mapping[str, Runner]) -> dict[str, float]:
        """Return the median seconds of each way to run the call."""
        self.runners |= programs
        if self.terms.dense or not programs:
            self._add_eager()
        else:
            self.skipped["eager"] = "the network stays in its file; name rivals to hold it dense for a while"
        rounds = _QUICK_ROUNDS if self.quick else _ROUNDS
        found = self._race(tuple(self.runners), rounds, last_resort="eager")
        if not self.quick:
            self._add_slow(found)
            if self.terms.calibration:
                self._add_int8(found)
        return found

    @property
    def model(self) -> nn.Module:
        """The original network, for as long as the contest lasts."""
        if self._model is None:
            self._model = self.terms.network.model()
        return self._model

    def _race(self, names: tuple[str, ...], rounds: int, *, last_resort: str) -> dict[str, float]:
        """Return the seconds of those that run; others are left out with what they raised, but for the last resort."""
        contestants = {name: partial(self.runners[name], self.call) for name in names}
        return race(
            contestants, rounds=rounds, threads=self.terms.threads, skipped=self.skipped, last_resort=last_resort
        )

    def _add_eager(self) -> None:
        model = self.model
        if self.terms.network.in_memory and self.terms.swapped() is not model:
            self.runners["layer by layer"] = eager_runner(self.terms.swapped())
        self.runners["eager"] = eager_runner(model)
        if self.quick:
            return
        if any(tensor.dim() == 4 for tensor in self.call.tensors):
            last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.runners["eager channels_last"] = channels_last_runner(last)
        if self.terms.reduced:
            self.runners["eager bfloat16"] = bfloat16_runner(model)

    def _compiled(self, reduced: bool) -> Runner:
        return compiled_runner(self.model, self.call, reduced=reduced)

    def _openvino(self, reduced: bool) -> Runner:
        return openvino_runner(self.model, self.call, threads=self.terms.threads, reduced=reduced)

    def _add_slow(self, seconds: dict[str, float]) -> None:
        """Time what takes long to prepare, unless no dense engine can be as fast as what was found already."""
        for reduced in (False, True) if self.terms.reduced else (False,):
            makers: dict[str, Callable[[], Runner]] = {
                "compile": partial(self._compiled, reduced),
                "openvino": partial(self._openvino, reduced),
            }
            dtype = torch.bfloat16 if reduced else torch.float32
            bound = dense_bound(self.graph, dtype) if self.graph is not None and self.terms.rivals else 0.0
            for rival in self.terms.rivals:
                name = f"{rival} bfloat16" if reduced else rival
                if rival not in makers:
                    continue  # eager was timed
                if bound > min(seconds.values()):
                    speed = "at the speed of a large matrix product here"
                    self.skipped[name] = f"its dense work alone would take {1e3 * bound:.1f} ms {speed}"
                    continue
                try:
                    self.runners[name] = makers[rival]()
                except Exception as error:  # whatever another engine raises
                    self.skipped[name] = _why_not(error)
                    continue
                self._time_late(name, seconds)

    def _add_int8(self, seconds: dict[str, float]) -> None:
        """Time ONNX Runtime in int8, if its results are near enough."""
        calibration = self.terms.calibration
        try:
            run, found = int8_runner(self.model, self.call, calibration=calibration, threads=self.terms.threads)
        except Exception as error:  # whatever another engine raises
            self.skipped[NAME] = _why_not(error)
            return
        self.notes.append(f"{NAME}: {found}")
        if found.is_enough:
            self.runners[NAME] = run
            self._time_late(NAME, seconds)
        else:
            self.skipped[NAME] = f"too far from float32: {found}"

    def _time_late(self, name: str, seconds: dict[str, float]) -> None:
        """Time one more runner against the fastest so far."""
        fastest = min(seconds, key=seconds.__getitem__)
        found = self._race((fastest, name), _ROUNDS, last_resort=fastest)
        if name not in found:
            return
        seconds[name] = found[name] * seconds[fastest] / found[fastest]  # as the others were timed


def _why_not(error: Exception) -> str:
    return str(error) if isinstance(error, NotHereError) else reason_of(error)
