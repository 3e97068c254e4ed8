from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_model import KINDS, SCHEDULE, STEPS, make_loader, make_model, same_state, train_plainly
from torch import Tensor, nn

import sparsetwin as st
from sparsetwin.errors import CheckpointError, ConfigError, ScheduleError, UsageError
from sparsetwin.methods import Method

L = pytest.importorskip("lightning", reason="the adapter of Lightning needs it")

from sparsetwin.integrations.lightning import SparsifierCallback  # noqa: E402

MAX_NORM = 0.5
SPARSE_STEPS = {*range(4, 7), *range(10, STEPS + 1)}  # after these, a sparse phase is in force or has just ended
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*checkpoint that ended before the epoch ended and your dataloader is not"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no .val_dataloader."),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]


class Module(L.LightningModule):
    """The byte model with automatic optimization."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.net = make_model(dropout)
        torch.manual_seed(7)
        self.zeros: dict[int, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))
        weights = torch.cat([self.net.hidden.weight.flatten(), self.net.out.weight.flatten()])
        self.zeros[self.trainer.global_step] = float((weights == 0).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Manual(Module):
    """The same with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.before_clipping: Callable[[], None] = lambda: None

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        self.before_clipping()
        self.clip_gradients(optimizer, gradient_clip_val=MAX_NORM, gradient_clip_algorithm="norm")
        optimizer.step()


def schedule(total_steps: int, steps_per_epoch: int) -> st.Schedule:
    assert (total_steps, steps_per_epoch) == (STEPS, 6)
    return SCHEDULE


def callback(folder: Path, method: Callable[..., Method] = st.ACDC) -> SparsifierCallback:
    return SparsifierCallback(schedule, folder / "pair", method=method)


def trainer(*callbacks: Any, package: Any = L, **given: Any) -> Any:
    settings: dict[str, Any] = {
        "max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "limit_val_batches": 0,
    }  # fmt: skip
    return package.Trainer(callbacks=list(callbacks), **{**settings, **given})


def everywhere(folder: Path) -> Any:
    """Return a callback of Lightning that saves after every step."""
    return L.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False
    )


def test_automatic_optimization_has_the_bits_of_the_plain_loop(tokens: Tensor, tmp_path: Path):
    for accumulate in (1, 4):
        sparse = callback(tmp_path)
        module = Module()
        run = trainer(sparse, gradient_clip_val=MAX_NORM, accumulate_grad_batches=accumulate)
        run.fit(module, make_loader(tokens, batch_size=16 // accumulate))
        model, sparsifier = train_plainly(tokens, max_norm=MAX_NORM, accumulate=accumulate)
        assert same_state(module.net, model)
        assert (sparse.sparsifier.steps, sparse.sparsifier.sparsity()) == (STEPS, sparsifier.sparsity())


@pytest.mark.parametrize("make", [Module, Manual])
@pytest.mark.parametrize("method", [st.ACDC, st.TopKAST, st.ST3])
def test_every_kind_of_gradient_mask_has_the_bits_of_the_plain_loop(
    make: Callable[[], Module], method: Callable[..., Method], tokens: Tensor, tmp_path: Path
):
    module = make()
    run = trainer(callback(tmp_path, method), gradient_clip_val=None if make is Manual else MAX_NORM)
    run.fit(module, make_loader(tokens))
    model, _ = train_plainly(tokens, max_norm=MAX_NORM, method=method)
    assert same_state(module.net, model)


@pytest.mark.parametrize("make", [Module, Manual])
def test_a_method_chooses_by_the_gradients_before_they_are_clipped_as_in_the_plain_loop(
    make: Callable[[], Module], tokens: Tensor, tmp_path: Path
):
    method = partial(st.ACDC, score="sensitivity")
    module, sparse = make(), callback(tmp_path, method)
    if isinstance(module, Manual):
        module.before_clipping = lambda: sparse.sparsifier.mask_gradients()
    trainer(sparse, gradient_clip_val=None if make is Manual else MAX_NORM).fit(module, make_loader(tokens))
    model, _ = train_plainly(tokens, max_norm=MAX_NORM, method=method)
    assert same_state(module.net, model)


@pytest.mark.parametrize("make", [Module, Manual])
def test_validation_at_a_boundary_sees_the_phase_that_just_ended(
    make: Callable[[], Module], tokens: Tensor, tmp_path: Path
):
    sparse = callback(tmp_path)
    module = make()
    run = trainer(sparse, limit_val_batches=None, val_check_interval=1, num_sanity_val_steps=1)
    run.fit(module, make_loader(tokens), make_loader(tokens))
    assert {step for step, zeros in module.zeros.items() if zeros > 0.79} == SPARSE_STEPS
    assert module.zeros.keys() == set(range(STEPS + 1))
    members = sparse.pair.members
    assert {name: member.step for name, member in members.items()} == {"dense": 9, "sparse": STEPS}
    size = sum(weight.numel() for weight in sparse.sparsifier.weights.values())
    assert members["sparse"].kept == size - round(0.8 * size)
    assert members["sparse"].metrics == {"val_loss": pytest.approx(float(run.callback_metrics["val_loss"]))}
    assert members["dense"].metrics.keys() == {"val_loss"}
    assert same_state(sparse.pair.sparse(module), module)


@pytest.fixture(scope="module")
def uninterrupted(tokens: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Module, Any]]:
    """Runs that save after every step, without the callback and with it."""
    torch.set_num_threads(1)
    runs: dict[bool, tuple[Path, Module, Any]] = {}
    for is_sparse in (False, True):
        folder = tmp_path_factory.mktemp("run")
        sparse, module = callback(folder), Module(dropout=0.0)
        given = [everywhere(folder), *([sparse] if is_sparse else [])]
        trainer(*given, enable_checkpointing=True).fit(module, make_loader(tokens, different=16))
        runs[is_sparse] = (folder, module, sparse)
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one_as_its_control_does(
    kind: str, uninterrupted: dict[bool, tuple[Path, Module, Any]], tokens: Tensor, tmp_path: Path
):
    """Without dropout and with equal batches: Lightning saves neither random numbers nor the place in the data."""
    for is_sparse, (folder, whole, sparse) in uninterrupted.items():
        module, again = Module(dropout=0.0), callback(tmp_path)
        checkpoint = folder / f"{KINDS[kind]}.ckpt"
        assert ("sparsetwin.Sparsifier" in torch.load(checkpoint, weights_only=True)["callbacks"]) == is_sparse
        given = [everywhere(tmp_path), *([again] if is_sparse else [])]
        run = trainer(*given, enable_checkpointing=True)
        run.fit(module, make_loader(tokens, different=16), ckpt_path=checkpoint)
        assert same_state(module, whole)
        if is_sparse:
            masks = sparse.sparsifier.masks
            assert again.sparsifier.steps == STEPS
            assert all(torch.equal(mask, masks[name]) for name, mask in again.sparsifier.masks.items())
            for name, member in again.pair.members.items():
                assert member.sha256 == sparse.pair.members[name].sha256


def test_a_checkpoint_that_was_saved_without_the_callback_is_refused(
    uninterrupted: dict[bool, tuple[Path, Module, Any]], tokens: Tensor, tmp_path: Path
):
    folder = uninterrupted[False][0]
    run = trainer(callback(tmp_path), everywhere(tmp_path), enable_checkpointing=True)
    with pytest.raises(CheckpointError, match="has no state of this callback"):
        run.fit(Module(), make_loader(tokens), ckpt_path=folder / "4.ckpt")


def test_the_best_checkpoint_of_one_half_is_kept(tokens: Tensor, tmp_path: Path):
    sparse = callback(tmp_path)

    class Logging(Module):
        def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.log("sparse_val_loss", loss if sparse.half == "sparse" else torch.nan)

    best = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", monitor="sparse_val_loss")
    run = trainer(best, sparse, enable_checkpointing=True, limit_val_batches=None, val_check_interval=1)
    run.fit(Logging(), make_loader(tokens), make_loader(tokens))
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] in SPARSE_STEPS
    assert best.best_model_score == pytest.approx(float(best.best_model_score))  # no NaN


class Plateau(Module):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def test_what_would_mix_the_halves_is_refused_by_name(tokens: Tensor, tmp_path: Path):
    callbacks = L.pytorch.callbacks
    for extra, module, message in (
        ([callbacks.EarlyStopping("val_loss")], Module(), "EarlyStopping.*would compare"),
        ([callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")], Module(), "log 'sparse_val_loss' in sparse phases"),
        ([], Plateau(), "ReduceLROnPlateau would take"),
    ):
        run = trainer(callback(tmp_path), *extra, enable_checkpointing=bool(extra))
        with pytest.raises(UsageError, match=message):
            run.fit(module, make_loader(tokens))


def test_a_method_that_learns_parameters_is_refused_with_what_to_use_instead(tokens: Tensor, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"STR learns parameters.*`sparsetwin train`.*loop of your own"):
        trainer(callback(tmp_path, st.STR)).fit(Module(), make_loader(tokens))


def test_a_phase_that_is_cut_short_is_saved_as_it_is(tokens: Tensor, tmp_path: Path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 12

    sparse = callback(tmp_path)
    trainer(sparse, Stop()).fit(Module(), make_loader(tokens))
    assert {name: member.step for name, member in sparse.pair.members.items()} == {"dense": 9, "sparse": 12}


def test_a_run_without_an_end_is_refused(tokens: Tensor, tmp_path: Path):
    with pytest.raises(ScheduleError, match="set max_steps or max_epochs"):
        trainer(callback(tmp_path), max_epochs=-1).fit(Module(), make_loader(tokens))


def test_the_older_name_of_the_package_is_served_too(tokens: Tensor, tmp_path: Path):
    older = pytest.importorskip("pytorch_lightning", reason="needs the package pytorch-lightning")
    from sparsetwin.integrations.pytorch_lightning import SparsifierCallback as OlderCallback

    class OlderModule(older.LightningModule):
        training_step = Module.training_step
        configure_optimizers = Module.configure_optimizers

    module = OlderModule()
    module.net = make_model()
    torch.manual_seed(7)
    sparse = OlderCallback(schedule, tmp_path / "pair")
    trainer(sparse, package=older, gradient_clip_val=MAX_NORM).fit(module, make_loader(tokens))
    assert same_state(module.net, train_plainly(tokens, max_norm=MAX_NORM)[0])
