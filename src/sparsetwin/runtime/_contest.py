"""A contest of whole calls: programs, the model layer by layer, and dense rivals; each is timed, or told why not."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import nn

from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._graph import Graph
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
from sparsetwin.runtime._timing import race

_ROUNDS, _QUICK_ROUNDS = 5, 3


class Terms(Protocol):
    """What a contest needs to know from a planner."""

    @property
    def model(self) -> nn.Module:
        """The original network."""

    @property
    def threads(self) -> int:
        """Of the kernels."""

    @property
    def reduced(self) -> bool:
        """Whether bfloat16 is allowed."""

    @property
    def rivals(self) -> tuple[str, ...]:
        """Dense engines besides eager PyTorch."""

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
        self.runners: dict[str, Runner] = {}
        self.skipped: dict[str, str] = {}

    @torch.no_grad()
    def seconds(self, programs: Mapping[str, Runner]) -> dict[str, float]:
        """Return the median seconds of each way to run the call."""
        self.runners |= programs
        self._add_eager()
        rounds = _QUICK_ROUNDS if self.quick else _ROUNDS
        found = self._race(tuple(self.runners), rounds)
        if not self.quick:
            self._add_slow(found)
        return found

    def _race(self, names: tuple[str, ...], rounds: int) -> dict[str, float]:
        contestants = {name: partial(self.runners[name], self.call) for name in names}
        return race(contestants, rounds=rounds, threads=self.terms.threads)

    def _add_eager(self) -> None:
        model = self.terms.model
        if self.terms.swapped() is not model:
            self.runners["layer by layer"] = eager_runner(self.terms.swapped())
        self.runners["eager"] = eager_runner(model)
        if self.quick:
            return
        if any(tensor.dim() == 4 for tensor in self.call.tensors):
            last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.runners["eager channels_last"] = channels_last_runner(last)
        if self.terms.reduced:
            self.runners["eager bfloat16"] = bfloat16_runner(model)

    def _add_slow(self, seconds: dict[str, float]) -> None:
        """Time what takes long to prepare, unless no dense engine can be as fast as what was found already."""
        for reduced in (False, True) if self.terms.reduced else (False,):
            makers: dict[str, Callable[[], Runner]] = {
                "compile": partial(compiled_runner, self.terms.model, self.call, reduced=reduced),
                "openvino": partial(
                    openvino_runner, self.terms.model, self.call, threads=self.terms.threads, reduced=reduced
                ),
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
                except NotHereError as reason:
                    self.skipped[name] = str(reason)
                    continue
                fastest = min(seconds, key=seconds.__getitem__)
                found = self._race((fastest, name), _ROUNDS)
                seconds[name] = found[name] * seconds[fastest] / found[fastest]  # as the others were timed
