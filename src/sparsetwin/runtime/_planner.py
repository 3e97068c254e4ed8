"""Plans a call: traces, measures the layers, then the whole call against dense rivals, and keeps the fastest."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsetwin.errors import UsageError
from sparsetwin.kernels import Target
from sparsetwin.runtime._calls import Call
from sparsetwin.runtime._checked import right_programs
from sparsetwin.runtime._choices import Prefer
from sparsetwin.runtime._contest import Contest
from sparsetwin.runtime._entries import HALF, Entry, Made, make_programs, near_float32, with_program
from sparsetwin.runtime._graph import Graph
from sparsetwin.runtime._half import Half, exponents_for, largest_values
from sparsetwin.runtime._half_programs import HalfPrograms, half_programs
from sparsetwin.runtime._machine import kernels_run, machine
from sparsetwin.runtime._network import Network
from sparsetwin.runtime._plain import run_plain
from sparsetwin.runtime._plan import Plan
from sparsetwin.runtime._reduced import DensePlanes, dense_planes, notes_of
from sparsetwin.runtime._rivals import Runner, eager_runner
from sparsetwin.runtime._sizes import Axes, free_axes, operations_of_one_size
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
    half: Target | None = None  # with float16 arithmetic, if that is allowed and there is one
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

    def free_axes(self, entry: Entry) -> Axes | None:
        """Return for each leaf of a call the axes whose sizes no operation depends on; None if that is not known."""
        if entry.program is None or operations_of_one_size(entry.program.graph):
            return None  # nobody will ask for them
        return free_axes(entry.call, self.network.traced)

    def entry(self, call: Call, like: Entry | None = None) -> Entry:
        """Return the fastest way to run calls like this one.

        Args:
            call: An example.
            like: The plan of another shape: its choices of layers are taken over, and only whole calls are timed.
        """
        call = _on_copies(call)
        notes: list[str] = []
        graph = self._graph(call, notes)
        choices = {} if like is None or like.program is None else like.program.float32 or like.program.choices
        programs: dict[str, Made] = {}
        wrong: dict[str, str] = {}
        halves = HalfPrograms()
        if graph is not None:
            bfloat16 = dense_planes(allowed=self.reduced)
            programs = make_programs(
                graph, choices, threads=self.threads, dense=self.dense, prefer=self.prefer, bfloat16=bfloat16
            )
            programs = near_float32(programs, call, bfloat16)
            programs, wrong = right_programs(programs, call, self._reference_of(graph, call))
            if programs:
                halves = self._halves(graph, call, next(iter(programs.values())), like, bfloat16)
            programs |= halves.made
            notes += [*notes_of(bfloat16, allowed=self.reduced), *halves.notes]
        contest = Contest(self, call, graph, quick=like is not None)
        seconds = contest.seconds({name: found.run for name, found in programs.items()})
        fastest = min(seconds, key=seconds.__getitem__)
        plan = Plan(
            machine=machine(),
            threads=self.threads,
            inputs=call.describe(),
            engine=fastest,
            candidates=seconds,
            skipped={**wrong, **halves.skipped, **contest.skipped},
            notes=(*notes, *contest.notes),
        )
        entry = Entry(call=call.without_numbers(), run=contest.runners[fastest], plan=plan)
        timed = {name: found for name, found in programs.items() if name in seconds}
        return entry if graph is None or not timed else with_program(entry, graph, timed, seconds)

    def _halves(
        self, graph: Graph, call: Call, float32: Made, like: Entry | None, bfloat16: DensePlanes | None
    ) -> HalfPrograms:
        """Return float16 programs: measured, or like that of another shape if it was the fastest."""
        if self.half is None:
            return HalfPrograms()
        if self.prefer == "memory":
            return HalfPrograms(skipped={HALF: "float16 weights would come on top of those that are kept narrow"})
        examples = [call.leaves, *(batch.leaves for batch in self.calibration if batch.key == call.key)]
        choices = None
        if like is not None:
            if like.program is None or like.program.packed.half is None:
                return HalfPrograms()
            half, choices = like.program.packed.half, like.program.choices
        else:
            calibration = (batch.leaves for batch in self.calibration)
            half = Half(target=self.half, exponents=exponents_for(graph, largest_values(graph, calibration)))
        return half_programs(
            graph, float32, half, threads=self.threads, examples=examples, choices=choices, bfloat16=bfloat16
        )

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
                self._check(call)
                notes.append(str(error))
        return None

    def _reference_of(self, graph: Graph, call: Call) -> Callable[[], Any]:
        """Return what computes a call without kernels: the model, or its graph layer by layer if it is in a file."""
        if self.network.in_memory:
            return partial(self.reference, call)
        return partial(run_plain, graph, call.leaves)

    def _check(self, call: Call) -> None:
        """Refuse a call that the original network does not take either, which says more than that it was not traced.

        Raises:
            UsageError: With what the network raised.
        """
        model = self.model
        try:
            model(*call.arguments, **call.named)
        except Exception as error:  # whatever the model raises
            raise UsageError(f"{self.name} does not take {call.describe()}: {type(error).__name__}: {error}") from error

    def swapped(self) -> nn.Module:
        """Return the model with sparse linears in place, or the model itself if that is not faster."""
        if self.layers is None:
            model = self.model
            if kernels_run():
                model = swapped_linears(model, threads=self.threads, reduced=self.reduced)
            self.layers = model
        return self.layers


def _on_copies(call: Call) -> Call:
    """Return a call on copies of its tensors: a model may work in place on what it is given."""
    leaves, spec = pytree.tree_flatten((call.arguments, dict(call.named)))
    copies = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, Tensor)}
    own = [copies.get(id(leaf), leaf) for leaf in leaves]
    arguments, named = pytree.tree_unflatten(own, spec)
    return Call(arguments, named, own, call.key)
