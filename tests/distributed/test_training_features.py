"""What people use beside a plain loop, on several processes: everything is as on one process, or refused by name."""

import copy
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import run
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsetwin as st
from sparsetwin._compat import named_weights
from sparsetwin.errors import SparsetwinError, UsageError

STEPS = 12
PHASES = [(3, 0.0), (3, 0.9), (3, 0.0), (3, 0.8)]
WRAPPERS = ("ddp", "fsdp2")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 4))


class Tied(nn.Module):
    """An embedding whose weights are the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden, self.head = nn.Embedding(24, 12), nn.Linear(12, 12), nn.Linear(12, 24, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.embedding(x[:, 0].abs().mul(20).long() % 24)).tanh())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def wrap(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind in ("fsdp2", "hsdp"):
        shape, names = ((2, 2), ("copies", "parts")) if kind == "hsdp" else ((2,), ("parts",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        if isinstance(model, nn.Sequential):
            for layer in model:
                if any(True for _ in layer.parameters()):
                    fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if kind.startswith("tensor parallel"):
        shape, names = ((2, 2), ("data", "model")) if "fsdp2" in kind else ((2,), ("model",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(model, mesh["model"], plan)
        if "fsdp2" in kind:
            fully_shard(model, mesh=mesh["data"])
    return model


class Loop:
    """A run; every process sees the same batches, so that averages over processes are exact."""

    def __init__(
        self,
        kind: str,
        *,
        model: nn.Module | None = None,
        optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]] | None = None,
        max_norm: float = 0.0,
        parts: int = 1,
        targets: st.Targets | None = None,
    ) -> None:
        self.model = wrap(network() if model is None else model, kind)
        self.optimizers = (optimizers or sgd)(self.model)
        method = st.ACDC(schedule=st.schedules.phases(PHASES))
        self.sparsifier = st.Sparsifier(method, self.model, self.optimizers, targets=targets)
        self.max_norm, self.parts, self.norms = max_norm, parts, []

    def step(self) -> None:
        for part in range(self.parts):
            generator = torch.Generator().manual_seed(10 * self.sparsifier.steps + part)
            dtype = next(self.model.parameters()).dtype
            x = torch.randn(16, 12, generator=generator, dtype=dtype)
            y = torch.randint(0, 4, (16,), generator=generator)
            self.sparsifier.begin_step()
            is_last = part == self.parts - 1
            if hasattr(self.model, "set_requires_gradient_sync"):
                self.model.set_requires_gradient_sync(is_last)
            if isinstance(self.model, DistributedDataParallel) and not is_last:
                with self.model.no_sync():
                    nn.functional.cross_entropy(self.model(x), y).backward()
            else:
                nn.functional.cross_entropy(self.model(x), y).backward()
        if self.max_norm:
            self.sparsifier.mask_gradients()
            self.norms.append(float(whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm))))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def course(self) -> list[list[torch.Tensor]]:
        """Return weights and masks after every step, pruned weights being zero and counts exact."""
        seen = []
        for _ in range(STEPS):
            self.step()
            masks = {name: whole(mask) for name, mask in self.sparsifier.masks.items()}
            weights = {name: whole(weight) for name, weight in named_weights(self.model).items()}
            assert not any(weights[name][~mask].any() for name, mask in masks.items())
            size = sum(weights[name].numel() for name in self.sparsifier.target_names)
            phase = self.sparsifier.phase
            kept = sum(int(mask.sum()) for mask in masks.values()) if masks else size
            assert phase is not None
            assert kept == size - round(phase.sparsity * size)
            seen.append([*weights.values(), *masks.values()])
        return seen


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)]


def muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, 0.02), torch.optim.AdamW(others, 1e-2)]


def same(first: list[list[torch.Tensor]], second: list[list[torch.Tensor]]) -> bool:
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(first, second, strict=True))


def checkpointed() -> nn.Sequential:
    model = network()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
    return model


def checkpointing(kind: str) -> bool:
    loop = Loop(kind, model=checkpointed())
    assert loop.sparsifier.target_names == ("0.weight", "2.weight", "4.weight")
    return same(loop.course(), Loop("alone").course())


def accumulation(kind: str) -> bool:
    return same(Loop(kind, parts=3).course(), Loop("alone", parts=3).course())


def tying(kind: str) -> bool:
    targets = st.Targets(include=("embedding.weight", "hidden"))
    loop, alone = (Loop(k, model=Tied(), targets=targets) for k in (kind, "alone"))
    assert loop.sparsifier.target_names == ("embedding.weight", "hidden.weight")
    seen = loop.course()
    inner = getattr(loop.model, "module", loop.model)
    assert inner.head.weight is inner.embedding.weight
    return same(seen, alone.course())


def scheduling(kind: str) -> bool:
    """A warm-up that begins at a learning rate of zero: such a step counts, since ``begin_step`` was called."""

    def course(loop: Loop) -> tuple[list[list[torch.Tensor]], list[float]]:
        scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizers[0], lambda step: min(step, 4) / 4)
        step, rates = loop.step, []

        def step_and_schedule() -> None:
            rates.append(loop.optimizers[0].param_groups[0]["lr"])
            step()
            scheduler.step()

        loop.step = step_and_schedule
        return loop.course(), rates

    (mine, rates), (theirs, expected) = course(Loop(kind)), course(Loop("alone"))
    return rates == expected and rates[0] == 0 and same(mine, theirs)


def clipping(kind: str) -> bool:
    mine, theirs = Loop(kind, max_norm=0.05), Loop("alone", max_norm=0.05)
    seen, expected = mine.course(), theirs.course()
    torch.testing.assert_close(torch.tensor(mine.norms), torch.tensor(theirs.norms), rtol=1e-4, atol=0)
    for a, b in zip(seen, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5) if x.is_floating_point() else None
    return all(norm > 0.05 for norm in mine.norms)  # each was clipped


def muon_and_adamw(kind: str) -> bool:
    mine, theirs = Loop(kind, optimizers=muon).course(), Loop("alone", optimizers=muon).course()
    if kind == "ddp":
        return same(mine, theirs)
    for a, b in zip(mine[:3], theirs[:3], strict=True):  # it multiplies in bfloat16, shards in another order
        assert all(float((x - y).abs().mean()) < 2e-3 for x, y in zip(a, b, strict=True))
    return True


def averaging(kind: str) -> bool:
    """An average that starts anew with each phase is as sparse as the phase, on each process the same."""
    loop, averages, seen = Loop(kind), [], []
    inner = getattr(loop.model, "module", loop.model)

    def restart(event: str, phase: Any) -> None:
        if event == "enter":
            averages.append(AveragedModel(inner, multi_avg_fn=get_ema_multi_avg_fn(0.9)))

    loop.sparsifier.on_phase(restart)
    for _ in range(STEPS):
        loop.step()
        averages[-1].update_parameters(inner)
        averaged = named_weights(averages[-1])
        for name, mask in loop.sparsifier.masks.items():
            assert torch.equal(averaged[name] != 0, mask)
        seen.append([tensor.detach().clone() for tensor in averaged.values()])
    return seen if kind == "alone" else same(seen, averaging("alone"))


FEATURES: dict[str, Callable[[str], bool]] = {
    function.__name__: function
    for function in (checkpointing, accumulation, tying, scheduling, clipping, muon_and_adamw, averaging)
}
CASES = [(f, k) for f in FEATURES for k in WRAPPERS if (f, k) != ("averaging", "fsdp2")]  # FSDP2 cannot be copied


def change_after_attaching(kind: str, change: Callable[[nn.Module], None]) -> str:
    loop = Loop(kind)
    loop.step()
    change(loop.model)
    try:
        for _ in range(3):
            loop.step()
    except SparsetwinError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def freeze(model: nn.Module) -> None:
    getattr(model, "module", model)[2].weight.requires_grad_(False)


def add(model: nn.Module) -> None:
    getattr(model, "module", model).append(nn.Linear(4, 4))


def shard(model: nn.Module) -> None:
    fully_shard(getattr(model, "module", model), mesh=init_device_mesh("cpu", (2,)))


CHANGES = {
    ("alone", "freeze"): "2.weight is frozen",
    ("fsdp2", "freeze"): "2.weight is frozen",
    ("alone", "add"): "the targets changed after attaching: 5.weight",
    ("alone", "shard"): "0.weight and 2 more targets: no given optimizer updates it",
}


def outcome(function: Callable[[str], Any], kind: str) -> Any:
    try:
        return function(kind)
    except Exception:
        return traceback.format_exc()


def on_two(rank: int) -> dict[Any, Any]:
    warnings.simplefilter("ignore")
    found: dict[Any, Any] = {(feature, kind): outcome(FEATURES[feature], kind) for feature, kind in CASES}
    changes = {"freeze": freeze, "add": add, "shard": shard}
    found |= {(kind, name): change_after_attaching(kind, changes[name]) for kind, name in CHANGES}
    return found | {"tensor parallel": outcome(parallel, "tensor parallel")}


def parallel(kind: str) -> tuple[bool, float]:
    """Compare in float64: matrices that are cut add up in another order."""
    mine, theirs = (Loop(k, model=network().double()).course() for k in (kind, "alone"))
    pairs = [pair for a, b in zip(mine, theirs, strict=True) for pair in zip(a, b, strict=True)]
    masks = all(torch.equal(x, y) for x, y in pairs if x.dtype == torch.bool)
    return masks, max(float((x - y).abs().max()) for x, y in pairs if x.dtype != torch.bool)


def on_four(rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"hsdp": same(Loop("hsdp").course(), Loop("alone").course())}
    return found | {"tensor parallel, fsdp2": parallel("tensor parallel, fsdp2")}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run(on_two, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(on_four, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize(("feature", "kind"), CASES)
def test_a_feature_of_training_works_as_on_one_process(feature, kind, two):
    assert [found[feature, kind] for found in two] == [True, True]


@pytest.mark.parametrize(("kind", "change"), CHANGES)
def test_a_model_that_changed_after_attaching_is_refused_by_the_name_of_the_weight(kind, change, two):
    for found in two:
        assert found[kind, change].startswith("TargetError: " + CHANGES[kind, change]), found[kind, change]


def test_copies_of_shards_train_to_the_bits_of_one_process(four):
    assert [found["hsdp"] for found in four] == [True] * 4


@pytest.mark.parametrize("kind", ["tensor parallel", "tensor parallel, fsdp2"])
def test_tensor_parallel_layers_train_through_phases_with_the_masks_of_one_process(kind, request):
    for found in request.getfixturevalue("four" if "fsdp2" in kind else "two"):
        assert isinstance(found[kind], tuple), found[kind]
        masks, difference = found[kind]
        assert masks
        assert difference < 1e-12


@pytest.mark.filterwarnings("ignore::sparsetwin.errors.SparsityWarning")  # thin layers
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own
def test_loaders_of_distributed_checkpoints_may_step_an_optimizer_at_a_learning_rate_of_zero():
    """They make its state exist so; it is no step, and a forgotten ``begin_step`` is noticed all the same."""

    def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(model.parameters(), 1e-2)]

    saved = Loop("alone", optimizers=adamw)
    for _ in range(4):
        saved.step()
    model, optimizer = copy.deepcopy(get_state_dict(saved.model, saved.optimizers))
    loaded = Loop("alone", optimizers=adamw)
    set_state_dict(loaded.model, loaded.optimizers, model_state_dict=model, optim_state_dict=optimizer)
    assert loaded.sparsifier.steps == 0
    loaded.sparsifier.load_state_dict(saved.sparsifier.state_dict())
    saved.step()
    loaded.step()
    assert all(map(torch.equal, saved.model.parameters(), loaded.model.parameters()))
    with pytest.raises(UsageError, match=r"begin_step\(\) was not called"):
        loaded.optimizers[0].step()


class DeepSpeedEngine(nn.Module):
    """Stands for DeepSpeed's own, which is told by its name: DeepSpeed is no requirement of the tests."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()


def test_deepspeed_is_refused_by_name_with_what_to_use_instead():
    with pytest.raises(UsageError, match=r"DeepSpeed ZeRO flattens weights.*fully_shard \(FSDP2\)"):
        Loop("alone", model=DeepSpeedEngine())
