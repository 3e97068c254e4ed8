from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import KINDS, SCHEDULE, STEPS, ByteModel, make_loader, make_model, same_state, train_plainly
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.errors import UsageError

accelerate = pytest.importorskip("accelerate", reason="the adapter of Accelerate needs it")

from sparsetwin.integrations.accelerate import clip_grad_norm_, prepare  # noqa: E402

MAX_NORM = 0.5


class Run:
    """A run under Accelerate: 18 steps in epochs of 6, with or without a sparsifier."""

    def __init__(self, tokens: Tensor, *, sparse: bool = True, accumulate: int = 1, **given: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **given)
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        loader = make_loader(tokens, batch_size=16 // accumulate)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.sparsifier: st.Sparsifier | None = None
        if sparse:
            self.sparsifier = prepare(self.accelerator, st.ACDC(schedule=SCHEDULE), self.model, self.optimizer)
        torch.manual_seed(7)

    def train(self, start: int = 0, stop: int = STEPS, *, poison: int = -1) -> None:
        """Do the steps from ``start`` to ``stop``; the loss of step ``poison`` is infinite."""
        done = 0
        for _ in range(3):
            for x, y in self.loader:
                if start <= done < stop:
                    with self.accelerator.accumulate(self.model):
                        self.step(x, y, scale=torch.inf if done == poison else 1.0)
                done += self.accelerator.sync_gradients

    def step(self, x: Tensor, y: Tensor, *, scale: float) -> None:
        if self.sparsifier is not None:
            self.sparsifier.begin_step()
        self.accelerator.backward(scale * nn.functional.cross_entropy(self.model(x), y))
        if self.accelerator.sync_gradients and self.sparsifier is not None:
            clip_grad_norm_(self.accelerator, self.sparsifier, self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_run_has_the_bits_of_the_plain_loop(accumulate: int, tokens: Tensor):
    run = Run(tokens, accumulate=accumulate)
    run.train()
    model, sparsifier = train_plainly(tokens, max_norm=MAX_NORM, accumulate=accumulate)
    assert same_state(run.accelerator.unwrap_model(run.model), model)
    assert run.sparsifier is not None
    assert (run.sparsifier.steps, run.sparsifier.sparsity()) == (STEPS, sparsifier.sparsity())
    assert (
        0.79 < 1 - sum(r.nonzero for r in run.sparsifier.report()) / sum(r.size for r in run.sparsifier.report()) < 0.81
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one_as_its_control_does(
    kind: str, tokens: Tensor, tmp_path: Path
):
    for sparse in (False, True):
        whole = Run(tokens, sparse=sparse)
        whole.train()
        stopped = Run(tokens, sparse=sparse)
        stopped.train(stop=KINDS[kind])
        folder = tmp_path / f"sparse-{sparse}"
        stopped.accelerator.save_state(str(folder))
        resumed = Run(tokens, sparse=sparse)
        resumed.accelerator.load_state(str(folder))
        resumed.train(start=KINDS[kind])
        assert same_state(resumed.model, whole.model)
        if sparse:
            assert resumed.sparsifier is not None
            assert whole.sparsifier is not None
            assert resumed.sparsifier.steps == whole.sparsifier.steps == STEPS
            masks = whole.sparsifier.masks
            assert all(torch.equal(mask, masks[name]) for name, mask in resumed.sparsifier.masks.items())


def test_a_step_that_a_scaler_skips_does_not_count(tokens: Tensor):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # as it has with fp16 on a GPU
    model = ByteModel()
    loader = iter(make_loader(tokens))
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2))
    sparsifier = prepare(accelerator, st.ACDC(schedule=SCHEDULE), model, optimizer)
    for step in range(5):
        x, y = next(loader)
        sparsifier.begin_step()
        accelerator.backward(nn.functional.cross_entropy(model(x), y) * (torch.inf if step in (2, 4) else 1))
        optimizer.step()
        optimizer.zero_grad()
        assert accelerator.optimizer_step_was_skipped == (step in (2, 4))
    assert sparsifier.steps == 3
    assert sparsifier.sparsity() > 0.79  # the step tried after the third one is in the sparse phase


def test_a_half_can_be_saved_under_its_bare_names(tokens: Tensor, tmp_path: Path):
    run = Run(tokens)
    assert run.sparsifier is not None
    run.train(stop=6)
    pair = st.Pair(tmp_path)
    pair.save(run.model, run.sparsifier)
    assert same_state(pair.sparse(ByteModel()), run.accelerator.unwrap_model(run.model).eval())


def test_what_is_not_prepared_is_refused():
    accelerator = accelerate.Accelerator(cpu=True)
    model = ByteModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"SGD is not prepared; call accelerator\.prepare"):
        prepare(accelerator, st.ACDC(schedule=SCHEDULE), model, optimizer)


def test_a_state_that_was_saved_without_a_sparsifier_is_refused(tokens: Tensor, tmp_path: Path):
    Run(tokens, sparse=False).accelerator.save_state(str(tmp_path))
    with pytest.raises(RuntimeError, match="Registered objects: 1"):
        Run(tokens).accelerator.load_state(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("DEEPSPEED", "DeepSpeed flattens parameters.*fsdp_version=2"), ("MEGATRON_LM", "Megatron-LM splits layers")],
)
def test_engines_that_cannot_be_served_are_refused_with_what_to_use_instead(kind: str, message: str):
    """They are not installed here, so only what Accelerate says of the run is set."""
    run = Run(torch.zeros(900, dtype=torch.int64), sparse=False)
    run.accelerator.state.distributed_type = accelerate.DistributedType[kind]
    with pytest.raises(UsageError, match=message):
        prepare(run.accelerator, st.ACDC(schedule=SCHEDULE), run.model, run.optimizer)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
