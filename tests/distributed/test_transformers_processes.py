"""The Hugging Face Trainer on two processes: DDP and FSDP2 train a pair with the same bits, and resume."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run

import sparsetwin as st
from sparsetwin.errors import UsageError
from sparsetwin.integrations.lengths import PhaseLengths

transformers = pytest.importorskip("transformers", reason="the adapter of the Hugging Face Trainer needs transformers")
accelerate = pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

STEPS = 14
LENGTHS = PhaseLengths(sparsity=0.8, unit="steps", warmup=3, sparse=3, dense=3, final_dense=3, final_sparse=4)
RESUMED = {"ddp": (4,), "fsdp2": (4, 9)}  # within a sparse phase, where one begins


class Trainer(transformers.Trainer):
    """Accelerate takes its FSDP plugin on accelerators only; this sets the fields of its state that it sets there."""

    def create_accelerator_and_postprocess(self) -> None:
        build = self._build_accelerator_args

        def on_cpus(**given: Any) -> dict[str, Any]:
            self.plugin = given["fsdp_plugin"]
            return build(**given)

        self._build_accelerator_args = on_cpus
        original = accelerate.Accelerator.__init__

        def forced(itself: Any, *arguments: Any, **given: Any) -> None:
            original(itself, *arguments, **given)
            if self.plugin is not None and self.args.run_name != "left out":
                kind = accelerate.DistributedType.FSDP
                accelerate.state.PartialState._shared_state["distributed_type"] = itself.state.distributed_type = kind
                itself.state.fsdp_plugin = self.plugin

        accelerate.Accelerator.__init__ = forced
        try:
            super().create_accelerator_and_postprocess()
        finally:
            accelerate.Accelerator.__init__ = original


class Watch(transformers.TrainerCallback):
    """Notes how many gradients of pruned weights clipping could see."""

    def __init__(self, watched: Any) -> None:
        self.watched, self.pruned, self.steps = watched, 0, 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        sparsifier = self.watched.sparsifier
        for name, mask in sparsifier.masks.items():
            gradient = sparsifier.weights[name].grad
            self.pruned += int((whole(gradient) * ~whole(mask)).count_nonzero())
            self.steps += 1


class SaveAt(transformers.TrainerCallback):
    """Saves after some steps, and at the end of none."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        control.should_save = state.global_step in self.steps


def trainer(kind: str, folder: Path, *callbacks: Any, **given: Any) -> Any:
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    sharded = {
        "fsdp": True,
        "fsdp_config": {
            "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["GPT2Block"]
        },
    }  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=5e-3, eval_strategy="no",
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        lr_scheduler_type="linear", warmup_steps=2, dataloader_pin_memory=False, seed=5, run_name=kind,
        **{"max_grad_norm": 0.0, **given}, **(sharded if kind != "ddp" else {}),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config())
    tokens = torch.randint(0, 64, (48, 12), generator=torch.Generator().manual_seed(3))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    return Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))


def config() -> Any:
    return transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


def seen(model: Any) -> dict[str, torch.Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trial(kind: str, folder: Path) -> dict[str, Any]:
    from sparsetwin.integrations.transformers import SparsifierCallback

    sparse = SparsifierCallback(LENGTHS)
    uninterrupted = trainer(kind, folder / kind, sparse, SaveAt(RESUMED[kind]))
    uninterrupted.train()
    control = trainer(kind, folder / f"{kind}-control", SaveAt(RESUMED[kind]))
    control.train()
    expected = seen(uninterrupted.model)
    found: dict[str, Any] = {
        "sharded": any(hasattr(p, "to_local") for p in uninterrupted.model.parameters()),
        "weights": expected,
        "masks": {name: whole(mask) for name, mask in sparse.sparsifier.masks.items()},
    }
    for step in RESUMED[kind]:
        plain = trainer(kind, folder / f"{kind}-control-{step}")
        plain.train(resume_from_checkpoint=str(folder / f"{kind}-control" / f"checkpoint-{step}"))
        source = folder / kind / f"checkpoint-{step}"
        again = SparsifierCallback(LENGTHS, resume_from=source)
        resumed = trainer(kind, folder / f"{kind}-{step}", again)
        resumed.train(resume_from_checkpoint=str(source))
        assert again.sparsifier.steps == STEPS
        found[step] = (same(seen(plain.model), seen(control.model)), same(seen(resumed.model), expected))
    if kind == "fsdp2":
        watched = SparsifierCallback(LENGTHS)
        watch = Watch(watched)
        trainer(kind, folder / f"{kind}-clipped", watched, watch, max_grad_norm=1e-3).train()
        found["pruned gradients before clipping"] = (watch.pruned, watch.steps > 0)
    return found


def trial_sharded_when_loaded(rank: int, folder: Path) -> dict[str, Any]:
    """Train a model that `from_pretrained` shards with FSDP2; of such models the Trainer saves no checkpoints."""
    from transformers.distributed import DistributedConfig

    from sparsetwin.integrations.transformers import SparsifierCallback

    if rank == 0:
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(llama()).save_pretrained(folder / "source")
    torch.distributed.barrier()
    sparse = SparsifierCallback(LENGTHS)
    run = trainer("ddp", folder, sparse)
    run = transformers.Trainer(
        transformers.LlamaForCausalLM.from_pretrained(
            folder / "source", distributed_config=DistributedConfig(fsdp_size=2), dtype=torch.float32
        ),
        run.args, train_dataset=run.train_dataset, callbacks=[sparse],
    )  # fmt: skip
    run.train()
    weights = {name: whole(tensor) for name, tensor in run.model.state_dict().items()}
    return {"sharded": any(hasattr(p, "to_local") for p in run.model.parameters()), "weights": weights}


def llama() -> Any:
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip


def trials(rank: int, folder: str) -> dict[str, Any]:
    from sparsetwin.integrations.transformers import SparsifierCallback

    warnings.simplefilter("ignore")
    found: dict[str, Any] = {kind: trial(kind, Path(folder)) for kind in RESUMED}
    found["when loaded"] = trial_sharded_when_loaded(rank, Path(folder) / "when loaded")
    try:
        trainer("left out", Path(folder) / "left out", SparsifierCallback(LENGTHS)).train()
    except UsageError as error:
        found["left out"] = str(error)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("transformers")
    return folder, run(trials, 2, folder, str(folder))


@pytest.mark.parametrize("kind", RESUMED)
def test_two_processes_train_through_phases_with_the_same_masks_and_exact_counts(kind, outcomes):
    first, second = (found[kind] for found in outcomes[1])
    assert first["sharded"] == (kind == "fsdp2")
    assert len(first["masks"]) == 8
    assert same(first["masks"], second["masks"])
    size = sum(mask.numel() for mask in first["masks"].values())
    assert sum(int(mask.sum()) for mask in first["masks"].values()) == size - round(0.8 * size)
    for name, mask in first["masks"].items():
        assert not first["weights"][name][~mask].any()


def test_fsdp2_has_the_bits_of_ddp(outcomes):
    for found in outcomes[1]:
        assert same(found["ddp"]["weights"], found["fsdp2"]["weights"])


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one_as_its_control_has(kind, outcomes):
    for found in outcomes[1]:
        assert {step: found[kind][step] for step in RESUMED[kind]} == dict.fromkeys(RESUMED[kind], (True, True))


@pytest.mark.parametrize("kind", RESUMED)
def test_both_halves_hold_whole_weights_and_open_with_from_pretrained(kind, outcomes):
    folder, (first, _) = outcomes
    members = st.Pair(folder / kind / "pair").members
    assert {name: member.step for name, member in members.items()} == {"dense": 9, "sparse": STEPS}
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder / kind / "pair" / "sparse")
    assert same(dict(opened.state_dict()), first[kind]["weights"])
    assert members["sparse"].sha256 == st.Pair(folder / "ddp" / "pair").members["sparse"].sha256
    assert members["dense"].sha256 == st.Pair(folder / "ddp" / "pair").members["dense"].sha256


def test_clipping_of_sharded_gradients_sees_those_of_kept_weights_only(outcomes):
    for found in outcomes[1]:
        assert found["fsdp2"]["pruned gradients before clipping"] == (0, True)


def test_a_model_that_is_sharded_when_it_is_loaded_trains_to_a_pair(outcomes):
    folder, (found, _) = outcomes
    assert found["when loaded"]["sharded"]
    sparse = st.Pair(folder / "when loaded" / "pair").members["sparse"]
    assert (sparse.step, sparse.kept) == (STEPS, sparse.targets - round(0.8 * sparse.targets))
    opened = transformers.AutoModelForCausalLM.from_pretrained(folder / "when loaded" / "pair" / "sparse")
    assert same(dict(opened.state_dict()), found["when loaded"]["weights"])


def test_fsdp_that_is_left_out_is_refused_by_name(outcomes):
    for found in outcomes[1]:
        assert "Accelerate leaves FSDP out on CPUs" in found["left out"]
