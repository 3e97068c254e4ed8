"""Small networks of transformers with data, and runs of its Trainer with and without the callback."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the adapter of the Hugging Face Trainer needs transformers")
pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from sparsetwin.integrations.lengths import PhaseLengths  # noqa: E402
from sparsetwin.integrations.transformers import SparsifierCallback  # noqa: E402

STEPS = 18
LENGTHS = PhaseLengths(
    sparsity=0.8, unit="steps", warmup=3, sparse=3, dense=3, final_dense=3, final_sparse=4
)  # dense 0-3, sparse 3-6, dense 6-9, sparse 9-18

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A network and its data."""

    make: Callable[[], Any]
    train: Rows
    held_out: Rows
    auto: str  # the Auto class that opens it


def bert(tokens: torch.Tensor) -> Case:
    """A BERT that tells text from text with its bytes in order."""
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    blocks = tokens[: 64 * 24].view(64, 24)
    rows = [
        {
            "input_ids": block.sort().values if i % 2 else block,
            "labels": i % 2,
            "attention_mask": torch.ones_like(block),
        }
        for i, block in enumerate(blocks)
    ]
    return Case(
        lambda: transformers.BertForSequenceClassification(config), rows[:48], rows[48:],
        "AutoModelForSequenceClassification",
    )  # fmt: skip


def gpt2(tokens: torch.Tensor) -> Case:
    """A GPT-2 that predicts the next byte of a text."""
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    rows = [{"input_ids": block, "labels": block} for block in tokens[: 64 * 24].view(64, 24)]
    return Case(lambda: transformers.GPT2LMHeadModel(config), rows[:48], rows[48:], "AutoModelForCausalLM")


def vit(images: Rows) -> Case:
    """A ViT on CIFAR-10."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=10, hidden_dropout_prob=0.1,
    )  # fmt: skip
    return Case(
        lambda: transformers.ViTForImageClassification(config), images[:48], images[48:],
        "AutoModelForImageClassification",
    )  # fmt: skip


def trainer(case: Case, folder: Path, *, model: Any = None, callbacks: Sequence[Any] = (), **given: Any) -> Any:
    """Return a Trainer of 18 steps in epochs of 6, from fixed initial weights if no model is given."""
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 5e-3,
        "eval_strategy": "no", "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "logging_steps": 1, "seed": 5, "lr_scheduler_type": "constant", "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**{**settings, **given})
    torch.manual_seed(0)
    return transformers.Trainer(
        model or case.make(), arguments, train_dataset=case.train, eval_dataset=case.held_out, callbacks=list(callbacks)
    )


def callback(**given: Any) -> SparsifierCallback:
    """Return a callback for a run of `trainer`."""
    return SparsifierCallback(LENGTHS, **given)


def same(first: Any, second: Any) -> bool:
    """Return whether two nested states are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def state(run: Any) -> dict[str, Any]:
    """Return everything that the next step of a Trainer depends on, but random numbers."""
    return {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()["state"]}
