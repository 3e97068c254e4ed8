"""What every method keeps. A new method is one more row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from small_runs import (
    SCHEDULE,
    SIZES,
    Run,
    assert_pruned_are_exact_zeros,
    assert_same_bits,
    bare,
    bits,
    network,
    read,
    sgd,
)
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.errors import StateError
from sparsetwin.grouped_selection import is_nm
from sparsetwin.methods import METHODS, Method
from sparsetwin.schedules import Phase

KeptPerPhase = Callable[[Phase, Mapping[str, int]], int]


def globally(phase: Phase, sizes: Mapping[str, int]) -> int:
    total = sum(sizes.values())
    return total - round(phase.sparsity * total)


def in_each_layer(phase: Phase, sizes: Mapping[str, int]) -> int:
    return sum(size - round(phase.sparsity * size) for size in sizes.values())


def in_whole_groups(size: int, members: int, sparsity: float) -> int:
    """The nearest whole number of groups, of two equally near ones the smaller, but at least one."""
    wanted = size - round(sparsity * size)
    return min(range(members, size + 1, members), key=lambda kept: (abs(kept - wanted), kept))


def in_blocks(phase: Phase, sizes: Mapping[str, int]) -> int:
    return in_whole_groups(sum(sizes.values()), 16, phase.sparsity)


def in_channels(phase: Phase, sizes: Mapping[str, int]) -> int:
    members = {"0.weight": 9, "4.weight": 48, "6.weight": 8}
    return sum(in_whole_groups(size, members[name], phase.sparsity) for name, size in sizes.items())


def are_groups_of_four(mask: Tensor, phase: Phase, *, transposable: bool = False) -> bool:
    return is_nm(mask, {0.25: 3, 0.5: 2}[phase.sparsity], 4, transposable=transposable)


def are_blocks(mask: Tensor, phase: Phase) -> bool:
    outputs, inputs = mask.shape
    places = [(i, j) for i in range(0, outputs, 4) for j in range(0, inputs, 4)]
    return all(int(mask[i : i + 4, j : j + 4].sum()) in (0, 16) for i, j in places)


def are_channels(mask: Tensor, phase: Phase) -> bool:
    return all(int(channel.sum()) in (0, channel.numel()) for channel in mask)


@dataclass(frozen=True)
class Row:
    """A method with its schedule, what it keeps in a sparse phase, and what it is excused from."""

    name: str  # in METHODS
    make: Callable[[], Method]
    kept: KeptPerPhase = globally
    exceptions: frozenset[str] = frozenset()  # names of the tests below that do not hold, as its card says
    has_structure: Callable[[Tensor, Phase], bool] | None = None  # of a mask, for a pattern
    exclude: tuple[str, ...] = ()  # targets that groups do not divide

    @property
    def sizes(self) -> dict[str, int]:
        return {name: size for name, size in SIZES.items() if name not in self.exclude}

    def run(self, **arguments) -> Run:
        return Run.new(self.make(), targets=st.Targets(exclude=self.exclude), **arguments)


DENSE = st.schedules.constant(sparsity=0.0, total_steps=5)
ALWAYS_SPARSE = st.schedules.phases([(4, 0.6), (4, 0.9), (4, 0.6)])
RAMP = st.schedules.ramped(st.schedules.phases([(2, 0.0), (4, 0.8), (2, 0.0), (4, 0.8)]), ramp_steps=3, prunings=3)
GRADUAL = st.schedules.gradual(sparsity=0.8, total_steps=10, start_step=2, stop_step=7, every_steps=2)
SPARSE = st.schedules.constant(sparsity=0.8, total_steps=6)
ROUNDS = st.schedules.rounds(sparsity=0.8, count=2, round_steps=5, rewind_step=2)
PERIODIC = st.schedules.periodic(sparsity=0.8, total_steps=10, every_steps=3, stop_step=8)
FROM_HALF = st.schedules.phases([(2, 0.5), (2, 0.7), (2, 0.8), (3, 0.8)])
PER_LAYER = st.PerLayer({"0.weight": 0.1, "4.weight": 0.8, "6.*": 0.5})
CUT = st.schedules.phases([(6, 0.0), (3, 0.8)])
RAMP_OF_FOUR = st.schedules.grouped(
    st.schedules.ramped(st.schedules.phases([(2, 0.0), (4, 0.5), (2, 0.0), (4, 0.5)]), ramp_steps=3, prunings=3), m=4
)
GRADUAL_OF_FOUR = st.schedules.grouped(
    st.schedules.gradual(sparsity=0.5, total_steps=10, start_step=1, stop_step=7, every_steps=2), m=4
)
OF_FOUR = {"has_structure": are_groups_of_four, "exclude": ("0.weight",)}
OF_FOUR_BOTH_WAYS = {**OF_FOUR, "has_structure": lambda *of: are_groups_of_four(*of, transposable=True)}
BLOCKS = {"kept": in_blocks, "has_structure": are_blocks, "exclude": ("0.weight",)}
CHANNELS = {"kept": in_channels, "has_structure": are_channels}
CHANNELS_OF_EACH = {"pattern": st.Channel(), "distribution": st.Uniform()}
NO_COUNT = frozenset({"test_exactly_the_requested_number_is_kept_and_the_others_are_exactly_zero"})
ROWS = {
    "acdc": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE)),
    "acdc-uniform": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, distribution=st.Uniform()), kept=in_each_layer),
    "acdc-without-reset": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, reset="none")),
    "acdc-without-dense-phases": Row("acdc", lambda: st.ACDC(schedule=ALWAYS_SPARSE, reset="targets")),
    "acdc-movement": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, score="movement")),
    "acdc-sensitivity": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, score="sensitivity")),
    "acdc-fisher": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, score="fisher", reset="returned")),
    "acdc-random": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, score="random", reset="moments")),
    "acdc-erk-rescaled": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, distribution=st.ERK(), rescale="l2")),
    "acdc-per-layer": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, distribution=PER_LAYER, reset="returned-mean")),
    "acdc-ramp": Row("acdc", lambda: st.ACDC(schedule=RAMP)),
    "acdc-ham": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, ham=st.HAM())),
    "gmp": Row("gmp", lambda: st.GMP(schedule=GRADUAL)),
    "gmp-movement": Row("gmp", lambda: st.GMP(schedule=GRADUAL, score="movement", distribution=st.ERK())),
    "acdc-2:4": Row("acdc", lambda: st.ACDC(schedule=RAMP_OF_FOUR, pattern=st.NM(2, 4)), **OF_FOUR),
    "acdc-transposable": Row(
        "acdc", lambda: st.ACDC(schedule=RAMP_OF_FOUR, pattern=st.NM(2, 4, transposable=True)), **OF_FOUR_BOTH_WAYS
    ),
    "acdc-blocks": Row("acdc", lambda: st.ACDC(schedule=RAMP, pattern=st.Block(4, 4)), **BLOCKS),
    "acdc-channels": Row("acdc", lambda: st.ACDC(schedule=RAMP, **CHANNELS_OF_EACH), **CHANNELS),
    "gmp-2:4": Row("gmp", lambda: st.GMP(schedule=GRADUAL_OF_FOUR, pattern=st.NM(2, 4)), **OF_FOUR),
    "gmp-transposable": Row(
        "gmp", lambda: st.GMP(schedule=GRADUAL_OF_FOUR, pattern=st.NM(2, 4, transposable=True)), **OF_FOUR_BOTH_WAYS
    ),
    "gmp-blocks": Row("gmp", lambda: st.GMP(schedule=GRADUAL, pattern=st.Block(4, 4)), **BLOCKS),
    "gmp-channels": Row("gmp", lambda: st.GMP(schedule=GRADUAL, **CHANNELS_OF_EACH), **CHANNELS),
    "oneshot": Row("oneshot", lambda: st.OneShot(schedule=st.schedules.phases([(3, 0.0), (4, 0.8)]))),
    "oneshot-pretrained": Row("oneshot", lambda: st.OneShot(schedule=SPARSE, score="sensitivity")),
    "static": Row("static", lambda: st.Static(schedule=SPARSE)),
    "static-uniform": Row("static", lambda: st.Static(schedule=SPARSE, distribution=st.Uniform()), kept=in_each_layer),
    "snip": Row("snip", lambda: st.SNIP(schedule=SPARSE)),
    "snip-sampled": Row("snip", lambda: st.SNIP(schedule=SPARSE, samples=3)),
    "imp": Row("imp", lambda: st.IMP(schedule=ROUNDS)),
    "imp-learning-rate": Row("imp", lambda: st.IMP(schedule=ROUNDS, rewind="learning-rate")),
    "set": Row("set", lambda: st.SET(schedule=PERIODIC)),
    "set-uniform": Row("set", lambda: st.SET(schedule=PERIODIC, distribution=st.Uniform()), kept=in_each_layer),
    "rigl": Row("rigl", lambda: st.RigL(schedule=PERIODIC)),
    "rigl-constant": Row("rigl", lambda: st.RigL(schedule=PERIODIC, decay="constant", drop_fraction=0.5)),
    "granet": Row("granet", lambda: st.GraNet(schedule=GRADUAL)),
    "granet-from-half": Row("granet", lambda: st.GraNet(schedule=FROM_HALF, distribution=st.ERK())),
    "woodfisher": Row("woodfisher", lambda: st.WoodFisher(schedule=GRADUAL, samples=3, block_size=7)),
    "woodfisher-uniform": Row(
        "woodfisher",
        lambda: st.WoodFisher(schedule=SPARSE, samples=2, distribution=st.Uniform(), repair="summed"),
        kept=in_each_layer,
    ),
    "cram": Row("cram", lambda: st.CrAM(schedule=CUT)),
    "cram-one-gradient": Row("cram", lambda: st.CrAM(schedule=CUT, plus=False, sparse_gradients=False, rho=0.2)),
    "topkast": Row("topkast", lambda: st.TopKAST(schedule=SCHEDULE), kept=in_each_layer),
    "topkast-global": Row("topkast", lambda: st.TopKAST(schedule=SCHEDULE, distribution=st.Global(), every_steps=2)),
    "str": Row("str", lambda: st.STR(schedule=SCHEDULE, initial=-3.0), exceptions=NO_COUNT),
    "str-cut": Row(
        "str",
        lambda: st.STR(schedule=SCHEDULE, initial=-3.0, threshold="exp", threshold_decay=0.1, exact_final=True),
        exceptions=NO_COUNT,
    ),
    "st3": Row("st3", lambda: st.ST3(schedule=SCHEDULE)),
    "st3-sigma": Row("st3", lambda: st.ST3(schedule=GRADUAL, sigma=True, every_steps=2)),
    "st3-uniform": Row(
        "st3",
        lambda: st.ST3(schedule=SPARSE, rescale=False, distribution=st.Uniform(), ham=st.HAM()),
        kept=in_each_layer,
    ),
    "dense": Row("dense", lambda: st.Dense(schedule=DENSE)),
    "acdc-int8": Row("acdc", lambda: st.ACDC(schedule=SCHEDULE, quantization=st.Int8())),
    "gmp-int8": Row("gmp", lambda: st.GMP(schedule=GRADUAL, ham=st.HAM(), quantization=st.Int8(start_step=4))),
    "rigl-int8": Row("rigl", lambda: st.RigL(schedule=PERIODIC, quantization=st.Int8(start_step=2))),
    "topkast-int8": Row(
        "topkast", lambda: st.TopKAST(schedule=SPARSE, quantization=st.Int8(start_step=3)), kept=in_each_layer
    ),
    "str-int8": Row(
        "str", lambda: st.STR(schedule=SPARSE, initial=-3.0, quantization=st.Int8(start_step=2)), exceptions=NO_COUNT
    ),
    "st3-int8": Row("st3", lambda: st.ST3(schedule=GRADUAL, quantization=st.Int8(start_step=5))),
}
OPTIMIZERS = {"sgd": sgd, "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)}


def test_every_method_is_held_to_the_promises():
    assert {row.name for row in ROWS.values()} == set(METHODS)
    assert all(type(row.make()) is METHODS[row.name] for row in ROWS.values())


@pytest.fixture(params=list(ROWS))
def row(request) -> Row:
    row = ROWS[request.param]
    if request.function.__name__ in row.exceptions:
        pytest.skip("an exception that the method's card lists")
    return row


class TestEveryMethod:
    def test_state_dict_is_always_that_of_the_dense_model(self, row):
        def described(model):
            return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}

        run, expected = row.run(), described(network())
        for _ in range(run.sparsifier.method.schedule.total_steps):
            run.step()
            assert described(run.model) == expected
            assert all(type(parameter) is nn.Parameter for parameter in run.model.parameters())

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_a_run_loaded_after_any_step_goes_on_with_the_bits_of_an_uninterrupted_one(self, row, optimizer):
        def new():
            return row.run(make_optimizers=OPTIMIZERS[optimizer])

        whole = new()
        total = whole.sparsifier.method.schedule.total_steps
        saved, trajectory = [whole.saved()], [bits(whole)]
        for _ in range(total):
            whole.step()
            saved.append(whole.saved())
            trajectory.append(bits(whole))
        for steps in range(total + 1):
            resumed = row.run(make_optimizers=OPTIMIZERS[optimizer], seed=7).load(saved[steps])
            assert_same_bits(bits(resumed), trajectory[steps], context=f"loaded after {steps}")
            for step in range(steps + 1, total + 1):
                resumed.step()
                assert_same_bits(bits(resumed), trajectory[step], context=f"at {step}, loaded after {steps}")

    def test_loading_before_the_model_is_refused_in_sparse_phases(self, row):
        run = row.run()
        for _ in range(run.sparsifier.method.schedule.total_steps):
            run.step()
            fresh = row.run(seed=7)
            state = read(run.saved())["sparsifier"]
            if run.phase.is_sparse:
                with pytest.raises(StateError, match="load the model, then the optimizer, then the sparsifier"):
                    fresh.sparsifier.load_state_dict(state)
                assert (fresh.sparsifier.steps, fresh.sparsifier.masks) == (0, {})
            else:
                fresh.sparsifier.load_state_dict(state)

    def test_exactly_the_requested_number_is_kept_and_the_others_are_exactly_zero(self, row):
        run = row.run()
        for _ in range(run.sparsifier.method.schedule.total_steps):
            run.step()
            masks = run.sparsifier.masks
            assert list(masks) == (list(row.sizes) if run.phase.is_sparse else [])
            if run.phase.is_sparse:
                assert sum(int(mask.sum()) for mask in masks.values()) == row.kept(run.phase, row.sizes)
            assert_pruned_are_exact_zeros(run)

    def test_a_loader_that_fills_existing_tensors_finds_every_one_that_was_saved(self, row):
        def described(run):
            state = run.sparsifier.state_dict()
            tensors = {**state["buffers"], "masks": state["masks"], "learned": state.get("learned", {})}
            return {(what, n): (t.shape, t.dtype) for what, of in tensors.items() for n, t in of.items()}

        run = row.run()
        for steps in range(1, run.sparsifier.method.schedule.total_steps + 1):
            run.step()
            fresh = row.run(seed=7)
            fresh.sparsifier.prepare_load(steps)
            assert described(fresh) == described(run), f"after {steps}"

    @pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
    @pytest.mark.parametrize("wrapped_at", ["saving", "loading"])
    def test_names_may_differ_between_saving_and_loading(self, row, wrap, wrapped_at):
        at_saving, at_loading = (wrap, bare) if wrapped_at == "saving" else (bare, wrap)
        total = row.make().schedule.total_steps
        expected = bits(row.run().train(total))
        for steps in (total // 3, total - 1):
            first = row.run(model=at_saving(network())).train(steps)
            assert first.sparsifier.target_names == tuple(row.sizes)
            second = row.run(model=at_loading(network(7))).load(first.saved())
            assert_same_bits(bits(second.train(total - steps)), expected, context=steps)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.has_structure])
def test_masks_have_the_structure_of_the_pattern_and_only_shrink_from_one_sparse_phase_to_the_next(name):
    row = ROWS[name]
    run, before, sparsities = row.run(), {}, []
    for _ in range(run.sparsifier.method.schedule.total_steps):
        run.step()
        masks = run.sparsifier.masks
        assert all(row.has_structure(mask, run.phase) for mask in masks.values())
        assert all(bool((before[name] | ~mask).all()) for name, mask in masks.items() if before)
        before = masks
        sparsities.append(run.phase.sparsity)
    assert len(set(sparsities)) >= 3  # dense, on the way, there
