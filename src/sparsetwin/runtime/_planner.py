"""Plans a call: traces, measures the layers, then the whole call against dense rivals, and keeps the fastest."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsetwin.errors import UsageError
from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._choices import Prefer
from sparsetwin.runtime._contest import Contest
from sparsetwin.runtime._entries import Entry, Made, make_programs, with_program
from sparsetwin.runtime._graph import Graph
from sparsetwin.runtime._machine import kernels_run, machine
from sparsetwin.runtime._network import Network
from sparsetwin.runtime._plan import Plan
from sparsetwin.runtime._rivals import Runner, eager_runner
from sparsetwin.runtime._swapped import swapped_linears


@dataclass(kw_only=True, eq=False)
class Planner:
    """Plans calls of one network."""

    network: Network
    threads: int
    reduced: bool  # whether bfloat16 is allowed
    rivals: tuple[str, ...]
    prefer: Prefer = "time"
    calibration: tuple[Call, ...] = ()
    layers: nn.Module | None = None  # the model with sparse linears in place; made when first needed

    @property
    def name(self) -> str:
        """The model's class."""
        return self.network.name

    @property
    def signature(self) -> inspect.Signature:
        """How the model is called."""
        return self.network.signature

    @property
    def model(self) -> nn.Module:
        """The original network with all its weights; one in a file is made anew."""
        return self.network.model()

    @property
    def dense(self) -> bool:
        """Whether all weights may be there dense at once: they are anyway, or dense rivals were asked for."""
        return self.network.in_memory or bool(self.rivals) or bool(self.calibration)

    def reference(self, call: Call) -> Any:
        """Return what the original network makes of a call."""
        return self.model(*call.arguments, **call.named)

    def without_plan(self, call: Call) -> Runner | None:
        """Return what runs calls of any shape, none of which is traced; None for those that are better planned."""
        if call.key is not None and not self.network.in_memory:
            return None
        return eager_runner(self.swapped())

    def entry(self, call: Call, like: Entry | None = None) -> Entry:
        """Return the fastest way to run calls like this one.

        Args:
            call: An example.
            like: The plan of another shape: its choices of layers are taken over, and only whole calls are timed.
        """
        notes: list[str] = []
        graph = self._graph(call, notes)
        choices = {} if like is None or like.program is None else like.program.choices
        programs: dict[str, Made] = {}
        if graph is not None:
            programs = make_programs(graph, choices, threads=self.threads, dense=self.dense, prefer=self.prefer)
        contest = Contest(self, call, graph, quick=like is not None)
        seconds = contest.seconds({name: found.run for name, found in programs.items()})
        fastest = min(seconds, key=seconds.__getitem__)
        plan = Plan(
            machine=machine(),
            threads=self.threads,
            inputs=call.describe(),
            engine=fastest,
            candidates=seconds,
            skipped=contest.skipped,
            notes=(*notes, *contest.notes),
        )
        entry = Entry(call=call.without_numbers(), run=contest.runners[fastest], plan=plan)
        return entry if graph is None else with_program(entry, graph, programs, seconds)

    def _graph(self, call: Call, notes: list[str]) -> Graph | None:
        """Return the fused graph of a call, or None with a note that tells why there is none."""
        if not kernels_run():
            notes.append("sparse kernels cannot be made here; PyTorch runs everything")
        elif call.key is None:
            notes.append("some arguments are no plain data: the model is not traced, its linears are exchanged")
        else:
            try:
                return self.network.graph(call.arguments, call.named)
            except UsageError as error:
                notes.append(str(error))
        return None

    def swapped(self) -> nn.Module:
        """Return the model with sparse linears in place, or the model itself if that is not faster."""
        if self.layers is None:
            model = self.model
            if kernels_run():
                model = swapped_linears(model, threads=self.threads, reduced=self.reduced)
            self.layers = model
        return self.layers
