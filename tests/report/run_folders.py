"""Run folders with realistic numbers, as the trainer writes them."""

import json
import math
import random
from pathlib import Path

LAYERS = {
    "features.0.weight": 288,
    "features.3.weight": 9_216,
    "features.6.weight": 18_432,
    "features.10.weight": 36_864,
    "classifier.weight": 640,
}
TARGETS = sum(LAYERS.values())
DENSE_FORWARD = 4_000_000
STEPS = 40
SAMPLES = 1_280
EPOCH_FLOPS = 3 * DENSE_FORWARD * SAMPLES
# warm-up, then sparse and dense in turn: (epochs, sparsity)
PLAN = ((4, 0.0), (3, 0.9), (3, 0.0), (3, 0.9), (3, 0.0), (3, 0.9), (5, 0.0), (6, 0.9))


def write_run(
    folder: Path, *, sparsity: float = 0.9, seed: int = 0, epochs: int | None = None, **changes: object
) -> Path:
    """Write a run folder.

    Args:
        folder: Where; it is made.
        sparsity: Of the sparse phases.
        seed: Of the run and of its made-up numbers.
        epochs: Finished ones; None finishes the run, its fine-tuning included.
        changes: Fields of run.json.
    """
    folder.mkdir(parents=True)
    run = {
        "version": 1,
        "recipe": "digits",
        "config": {
            "model": "digits-cnn",
            "schedule": {"sparsity": sparsity, "unit": "epochs", "warmup": 4},
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
            "loggers": [],
        },
        "seed": seed,
        "threads": 2,
        "versions": {"sparsetwin": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "machine": {"system": "Linux", "cpu": "x86_64", "cores": 2},
        "created": "2025-11-22T20:10:00+00:00",
        "command": f"sparsetwin train digits --out runs/{folder.name} --schedule.sparsity {sparsity} --seed {seed}",
        **changes,
    }
    (folder / "run.json").write_text(json.dumps(run))
    lines = list(events(sparsity=sparsity, seed=seed))
    if epochs is not None:
        lines = (
            lines[: next(i for i, line in enumerate(lines) if line.get("epoch") == epochs) + 1] if epochs else lines[:1]
        )
    write_lines(folder / "metrics.jsonl", lines)
    times = [line for line in lines if line["event"] == "epoch"]
    write_lines(
        folder / "timing.jsonl",
        [
            {"stage": e["stage"], "epoch": e["epoch"], "seconds": 0.8 + 0.01 * e["epoch"], "samples": SAMPLES}
            for e in times
        ],
    )
    return folder


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))


def events(*, sparsity: float = 0.9, seed: int = 0) -> list[dict]:
    """Return the events of a finished run."""
    rng = random.Random(seed)
    plan = [(length, sparsity if value else 0.0) for length, value in PLAN]
    kept_layers = _kept(sparsity)
    sparse_forward = round(DENSE_FORWARD * (1 - sparsity) * 1.3)
    total = sum(length for length, _ in plan)
    lines: list[dict] = []
    starts = [sum(length for length, _ in plan[:i]) for i in range(len(plan) + 1)]
    phases = [[a * STEPS, b * STEPS, s] for a, b, (_, s) in zip(starts[:-1], starts[1:], plan, strict=True)]
    lines.append(_start(phases, total))
    flops, epoch, change = 0, 0, 0.09
    for index, (length, value) in enumerate(plan):
        for within in range(1, length + 1):
            epoch += 1
            zeros = TARGETS - sum(kept_layers.values()) if value else round(TARGETS * 0.06 / within) if index else 0
            forward = sparse_forward if value else DENSE_FORWARD
            flops += 3 * forward * SAMPLES
            lines.append(
                _epoch("main", epoch, index, value, _quality(rng, epoch, value, within), zeros, forward, flops)
            )
        if value:
            layers = {name: [kept_layers[name], numel] for name, numel in LAYERS.items()}
        else:
            layers = {name: [numel, numel] for name, numel in LAYERS.items()}
        mask_change = None
        if value and index > 1:
            change *= 0.6
            mask_change = _mask_change(change, sparsity)
        lines.append(
            {
                "event": "phase", "stage": "main", "phase": index, "start": phases[index][0], "stop": phases[index][1],
                "sparsity": value, "step": phases[index][1], "holdout": lines[-1]["holdout"], "layers": layers,
                "zeros": lines[-1]["zeros"], "mask_change": mask_change,
                "member": {len(plan) - 2: "dense-raw", len(plan) - 1: "sparse"}.get(index),
            }
        )  # fmt: skip
    branch = total - plan[-1][0]
    branch_flops = next(e["training_flops"] for e in lines if e.get("epoch") == branch)
    for within in range(1, plan[-1][0] + 1):
        branch_flops += EPOCH_FLOPS
        quality = _quality(rng, branch + within + 4, 0.0, within + 6)
        lines.append(_epoch("dense-finetune", branch + within, 0, 0.0, quality, 0, DENSE_FORWARD, branch_flops))
    spent = flops + plan[-1][0] * EPOCH_FLOPS
    lines.append(_final(lines, kept_layers, sparse_forward, spent, branch, total))
    return lines


def _start(phases: list[list[float]], epochs: int) -> dict:
    return {
        "event": "start", "stage": "main", "phases": phases, "steps_per_epoch": STEPS, "epochs": epochs,
        "targets": LAYERS, "parameters": TARGETS + 500, "dense_forward_flops": DENSE_FORWARD,
        "dense_training_flops": EPOCH_FLOPS * epochs,
    }  # fmt: skip


def _epoch(stage, epoch, phase, sparsity, quality, zeros, forward, flops) -> dict:
    train, holdout = quality
    return {
        "event": "epoch", "stage": stage, "epoch": epoch, "step": epoch * STEPS, "phase": phase,
        "phase_sparsity": sparsity, "lr": round(0.05 * (1 + math.cos(math.pi * epoch / 30)), 6), "train": train,
        "holdout": holdout, "kept": TARGETS - zeros, "zeros": zeros, "forward_flops": forward, "training_flops": flops,
    }  # fmt: skip


def _quality(rng: random.Random, epoch: int, sparsity: float, within: int) -> tuple[dict, dict]:
    drop = 0.10 * math.exp(-within / 1.3) * (sparsity > 0) * (1 + 8 / epoch)
    accuracy = min(0.985 - 0.55 * math.exp(-epoch / 4) - drop + rng.uniform(-0.004, 0.004), 0.999)
    loss = -1.15 * math.log(accuracy) + 0.03
    return (
        {"loss": round(loss * 0.85, 6), "accuracy": round(min(accuracy + 0.008, 1.0), 6)},
        {"loss": round(loss, 6), "accuracy": round(accuracy, 6)},
    )


def _kept(sparsity: float) -> dict[str, int]:
    weight = dict(zip(LAYERS, (4.0, 1.5, 1.0, 0.8, 3.5), strict=True))
    scale = (1 - sparsity) * TARGETS / sum(weight[name] * numel for name, numel in LAYERS.items())
    return {name: min(numel, round(scale * weight[name] * numel)) for name, numel in LAYERS.items()}


def _mask_change(change: float, sparsity: float) -> dict:
    reactivated = round(change * TARGETS / 2)
    kept = sum(_kept(sparsity).values())
    share = reactivated / kept
    return {
        "reactivated": reactivated, "iou": (kept - reactivated) / (kept + reactivated), "new_share": share,
        "percent": 100 * change,
    }  # fmt: skip


def _final(lines, kept_layers, sparse_forward, flops, branch, total) -> dict:
    held = {(e["stage"], e["epoch"]): e["holdout"] for e in lines if e["event"] == "epoch"}
    dense_bytes = 4 * (TARGETS + 500) + 1_200
    kept = sum(kept_layers.values())
    sparse_bytes = 4 * kept + TARGETS // 8 + 1_400

    def member(sparsity, kept, epoch, size, forward, holdout, accuracy):
        return {
            "sparsity": sparsity, "kept": kept, "targets": TARGETS, "step": epoch * STEPS, "file_bytes": size,
            "forward_flops": forward, "holdout": holdout, "test": {"loss": 0.07, "accuracy": accuracy},
        }  # fmt: skip

    return {
        "event": "final",
        "members": {
            "sparse": member(
                1 - kept / TARGETS, kept, total, sparse_bytes, sparse_forward, held["main", total], 0.9694
            ),
            "dense-raw": member(0.0, TARGETS, branch, dense_bytes, DENSE_FORWARD, held["main", branch], 0.9667),
            "dense": member(0.0, TARGETS, total, dense_bytes, DENSE_FORWARD, held["dense-finetune", total], 0.9778),
        },
        "training_flops": flops, "dense_training_flops": EPOCH_FLOPS * total, "dense_forward_flops": DENSE_FORWARD,
        "dense_file_bytes": dense_bytes,
    }  # fmt: skip
