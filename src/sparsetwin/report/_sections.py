"""The sections about one run."""

import json
import math
from collections.abc import Iterator, Mapping

from sparsetwin.report import _figures
from sparsetwin.report._format import count, flops, loss_text, percent, seconds_text, share, sparsity_text
from sparsetwin.report._inference import inference
from sparsetwin.report._markup import Markup, code, details, facts, figure, paragraph, section, side_by_side, table
from sparsetwin.report._run_folder import MAIN_STAGE, PhaseEnd, Quality, Run
from sparsetwin.report.tables import HEADINGS, lines, member_rows


def sections(run: Run, *, key: str, rank: int) -> tuple[Markup, ...]:
    """Return all sections about a run.

    Args:
        run: What to tell of.
        key: Of the run on its page, for the names of its figures.
        rank: Of the headings, 1 to 6.
    """
    return (
        _notes(run),
        _pair(run, rank),
        inference(run, rank),
        _curves(run, key, rank),
        _layers(run, key, rank),
        _masks(run, key, rank),
        side_by_side(_zeros(run, key, rank), _training(run, key, rank)),
        _setting(run, rank),
    )


def flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested plain data as dotted names and texts, the way that command-line flags name them.

    >>> list(flat({"schedule": {"sparsity": 0.9}, "tags": ["a", 1]}))
    [('schedule.sparsity', '0.9'), ('tags', '["a", 1]')]
    """
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _notes(run: Run) -> Markup:
    notes = []
    if not run.is_finished:
        notes.append("This run has not finished: there is no pair yet, and what follows is as far as it has come.")
    if run.unknown_events:
        notes.append(
            f"Lines of metrics.jsonl that this version cannot read were left out: {', '.join(run.unknown_events)}."
        )
    if run.start.uncounted:
        names = run.start.uncounted
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        notes.append(
            f"All FLOPs are too low: what is computed with {', '.join(names[:5])}{more} is not counted, as there is no "
            "rule for it. Shares of dense FLOPs are of what is counted."
        )
    return Markup("".join(paragraph(note, css="note") for note in notes))


def _pair(run: Run, rank: int) -> Markup:
    rows = member_rows(run)
    if not rows:
        return Markup("")
    caption = (
        "Shares in brackets are of the dense network. Training FLOPs are those of the whole run, which all its members "
        "come out of, as a share of one dense training."
    )
    return section("The pair", table(caption, HEADINGS, lines(rows)), rank=rank)


def _curves(run: Run, key: str, rank: int) -> Markup:
    if not run.main:
        return Markup("")
    branch = " The dotted line is the fine-tuning of the dense half, from its branch on." if run.branches else ""
    caption = f"Shaded: sparse phases.{branch}"
    floor = " The first epochs lie below the axis." if _figures.accuracy_floor(run) is not None else ""
    drawn = side_by_side(
        figure(_figures.curves(run, "loss", key=key), f"Loss. {caption}"),
        figure(_figures.curves(run, "accuracy", key=key), f"Accuracy. {caption}{floor}"),
    )
    return section("Loss and accuracy", drawn, _phase_table(run), rank=rank)


def _phase_table(run: Run) -> Markup:
    if not run.phases:
        return Markup("")
    headings = ("phase", "kind", "steps", "sparsity", "hold-out loss", "hold-out accuracy", "exact zeros", "member")
    rows = [
        (
            str(phase.index) if phase.stage == MAIN_STAGE else f"{phase.stage} {phase.index}",
            "sparse" if phase.is_sparse else "dense",
            f"{count(phase.start)} to {count(phase.stop)}",
            sparsity_text(phase.sparsity),
            *_holdout_cells(phase.holdout),
            count(phase.zeros),
            phase.member or "",
        )
        for phase in run.phases
    ]
    return details("Phases as a table", table("State at the end of every phase.", headings, rows, texts=2))


def _layers(run: Run, key: str, rank: int) -> Markup:
    ends = [phase for phase in run.main_phases if phase.is_sparse and phase.layers]
    if not ends:
        return Markup("")
    last = ends[-1]
    rows = [
        (name, percent(1 - kept / weights) if weights else "", f"{count(kept)} of {count(weights)}", _part(kept, last))
        for name, (kept, weights) in ((name, last.layers[name]) for name in _figures.by_nature(last.layers))
    ]
    return section(
        "Sparsity of every layer",
        figure(
            _figures.layer_sparsity(last, key=key),
            f"At the end of sparse phase {last.index}, step {count(last.stop)}. Dashed: all layers together.",
        ),
        details(
            "Layers as a table",
            table("Sparsity of every layer.", ("layer", "sparsity", "kept weights", "of all kept"), rows),
        ),
        rank=rank,
    )


def _masks(run: Run, key: str, rank: int) -> Markup:
    changed = [phase for phase in run.main_phases if phase.is_sparse and phase.mask_change]
    if not changed:
        return Markup("")
    headings = ("sparse phase", "reactivated", "changed, % of targets", "intersection over union", "new among the kept")
    rows = [
        (str(p.index), count(c.reactivated), f"{c.percent:.3f}%", percent(c.iou), percent(c.new_share))
        for p in changed
        if (c := p.mask_change)
    ]
    return section(
        "Mask change between sparse phases",
        side_by_side(
            figure(
                _figures.mask_change(changed, key=key),
                "Target weights whose mask differs from the sparse phase before, beyond what the change in sparsity "
                "explains: twice the reactivated ones, in percent of all.",
            ),
            figure(
                _figures.mask_overlap(changed, key=key),
                "Kept weights in common with the sparse phase before, and those that had been pruned in it.",
            ),
        ),
        details("Mask change as a table", table("Against the sparse phase before.", headings, rows)),
        rank=rank,
    )


def _zeros(run: Run, key: str, rank: int) -> Markup:
    targets = run.start.target_count
    ends = [phase for phase in run.main_phases if not phase.is_sparse]
    if not run.main or not targets:
        return Markup("")
    after = [phase for phase in ends if phase.index]
    worst = max(after, key=lambda phase: phase.zeros) if after else None
    said = ""
    if worst:
        most = f"At most {share(worst.zeros / targets)} ({count(worst.zeros)})" if worst.zeros else "None"
        said = f" {most} {'were' if worst.zeros else 'was'} still zero as a later dense phase ended."
    drawn = figure(
        _figures.zeros(run, key=key),
        f"Exact zeros among the {count(targets)} target weights. Weights without a gradient, as in dead filters, stay "
        f"zero when a dense phase gives them back.{said}",
    )
    return section("Zeros in dense phases", drawn, rank=rank)


def _training(run: Run, key: str, rank: int) -> Markup:
    if not run.main:
        return Markup("")
    spent = run.training_flops
    dense = run.start.dense_training_flops
    compared = f", {share(spent / dense)} of the {flops(dense)} of a dense training" if dense else ""
    drawn = figure(
        _figures.training_flops(run, key=key),
        f"{'Spent in all' if run.final else 'Spent so far'}: {flops(spent)}{compared} of {run.start.epochs} epochs. "
        "Three times the forward FLOPs of the network as it is at the end of each epoch, for every sample; only "
        "non-zero weights count.",
    )
    return section("Training FLOPs", drawn, rank=rank)


def _setting(run: Run, rank: int) -> Markup:
    start = run.start
    entries = [
        ("recipe", run.recipe),
        ("seed", str(run.seed)),
        ("threads", str(run.threads)),
        ("epochs, steps an epoch", f"{count(start.epochs)}, {count(start.steps_per_epoch)}"),
        ("parameters", count(start.parameters)),
        ("target weights", f"{count(start.target_count)} in {count(len(start.targets))} layers"),
        ("dense inference", f"{flops(start.dense_forward_flops)} a sample"),
        *([] if start.int8_step is None else [("weights rounded to int8", f"from step {count(start.int8_step)} on")]),
    ]
    environment = [
        ("created", run.created),
        ("git commit", run.git_commit or "not known"),
        *flat(run.versions),
        *flat(run.machine),
        *_times(run),
    ]
    config = list(flat(run.config))
    return section(
        "How to get the same run",
        *([code(run.command)] if run.command else []),
        facts(entries),
        details("Configuration", facts(config)) if config else Markup(""),
        details("Environment", facts(environment)),
        rank=rank,
    )


def _times(run: Run) -> Iterator[tuple[str, str]]:
    seconds = sum(time.seconds for time in run.times)
    if seconds > 0 and math.isfinite(seconds):
        yield "time of all epochs", seconds_text(seconds)
        yield "samples a second", count(round(sum(time.samples for time in run.times) / seconds))


def _holdout_cells(quality: Quality | None) -> tuple[str, str]:
    return (loss_text(quality.loss), percent(quality.accuracy)) if quality else ("", "")


def _part(kept: int, phase: PhaseEnd) -> str:
    return share(kept / max(sum(layer_kept for layer_kept, _ in phase.layers.values()), 1))
