"""The figures of one run."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sparsetwin.report._drawing import (
    BRANCH,
    BRANCH_STYLE,
    DENSE,
    INK,
    MUTED,
    RULE,
    SHADE,
    SPARSE,
    draw,
    legend_above,
    legend_text,
    loss_axis,
    plot_line,
)
from sparsetwin.report._format import count, flops, loss_text, percent, share, sparsity_text
from sparsetwin.report._markup import Markup
from sparsetwin.report._run_folder import Epoch, PhaseEnd, Quality, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_TICKS = 14  # names of phases that fit below an axis
_MOST_BOUNDARIES = 60  # hairlines that do not run together
_LONGEST_NAME = 34  # characters of a layer's name that fit beside its bar


def curves(run: Run, measure: str, *, key: str) -> Markup:
    """Draw the loss or the accuracy over the steps, sparse phases shaded, branches as lines of their own.

    Args:
        run: With at least one finished epoch.
        measure: ``"loss"`` or ``"accuracy"``.
        key: Of the run on its page.
    """
    value = _measure(measure)

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        shade_phases(axes, run)
        _curve(axes, run.main, lambda epoch: epoch.train, value, color=MUTED, linewidth=1.2, label="training")
        _curve(axes, run.main, lambda epoch: epoch.holdout, value, color=INK, label="hold-out")
        for stage, epochs in run.branches.items():
            measured = any(epoch.holdout for epoch in epochs)
            _curve(
                axes,
                epochs,
                (lambda epoch: epoch.holdout) if measured else (lambda epoch: epoch.train),
                value,
                color=BRANCH,
                linestyle=BRANCH_STYLE,
                linewidth=2.2,
                label=legend_text(stage),
            )
        _mark_members(axes, run, value)
        axes.set_xlabel("optimizer step")
        if measure == "loss":
            loss_axis(
                axes, (quality.loss for epoch in run.epochs for quality in (epoch.train, epoch.holdout) if quality)
            )
        else:
            axes.set_ylabel("accuracy, %")
            if (floor := accuracy_floor(run)) is not None:
                axes.set_ylim(floor, axes.dataLim.y1 + 0.05 * (axes.dataLim.y1 - floor))
        count_ticks(axes)
        legend_above(axes)

    return draw(
        f"{key}-{measure}",
        paint,
        title=f"{measure.capitalize()} over the steps",
        description=_curve_in_words(run, measure),
    )


def layer_sparsity(phase: PhaseEnd, *, key: str) -> Markup:
    """Draw the sparsity of every layer at the end of a sparse phase, and that of all layers together."""
    names = by_nature(phase.layers)
    sparsities = [1 - kept / weights if weights else 0.0 for kept, weights in (phase.layers[name] for name in names)]
    overall = overall_sparsity(phase)
    labels = _short(names)

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        rows = list(range(len(names)))
        axes.barh(rows, [100.0] * len(rows), height=0.62, color=RULE)
        axes.barh(rows, [100 * sparsity for sparsity in sparsities], height=0.62, color=SPARSE)
        for row, sparsity in zip(rows, sparsities, strict=True):
            axes.text(101.5, row, percent(sparsity, decimals=1), va="center", fontsize=11)
        axes.axvline(100 * overall, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_yticks(rows, labels)
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set(ylim=(len(rows) - 0.5, -0.9), xlim=(0, 112), xlabel="weights that are zero, %")
        axes.set_xticks([0, 25, 50, 75, 100])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.text(100 * overall, -0.62, f"all layers {sparsity_text(round(overall, 4))}", ha="right", fontsize=11)

    return draw(
        f"{key}-layers",
        paint,
        title="Sparsity of every layer",
        description=f"A bar for each layer, as in the table below it. All layers together: {percent(overall)}.",
        width=720,
        height=64 + 21 * len(names),
    )


def mask_change(phases: Sequence[PhaseEnd], *, key: str) -> Markup:
    """Draw how much of each sparse phase's mask differs from the one before.

    Args:
        phases: Sparse phases with a mask change, at least one.
        key: Of the run on its page.
    """
    percents = [phase.mask_change.percent for phase in phases if phase.mask_change]

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.bar(range(len(percents)), percents, width=0.55, color=SPARSE)
        for row, height in enumerate(percents if len(percents) <= _MOST_TICKS else []):
            axes.annotate(f"{height:.3g}", (row, height), (0, 3), textcoords="offset points", ha="center")
        _phase_ticks(axes, phases)
        axes.set_ylabel("changed masks, % of targets")
        axes.margins(y=0.12)

    words = ", ".join(f"phase {phase.index}: {value:.3g}%" for phase, value in zip(phases, percents, strict=True))
    return draw(f"{key}-change", paint, title="Mask change", description=words, height=280)


def mask_overlap(phases: Sequence[PhaseEnd], *, key: str) -> Markup:
    """Draw what each sparse phase's mask has in common with the one before, and what is new.

    Args:
        phases: Sparse phases with a mask change, at least one.
        key: Of the run on its page.
    """
    changes = [phase.mask_change for phase in phases if phase.mask_change]
    marked = "o" if len(changes) <= 4 * _MOST_TICKS else ""

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        rows, iou, new = range(len(changes)), [100 * c.iou for c in changes], [100 * c.new_share for c in changes]
        axes.plot(rows, iou, color=INK, marker=marked, label="intersection over union")
        axes.plot(rows, new, color=SPARSE, marker=marked and "s", linestyle=(0, (4, 2)), label="new among the kept")
        _phase_ticks(axes, phases)
        axes.set(ylabel="% of weights", ylim=(-3, 103))
        legend_above(axes)

    words = ", ".join(f"phase {phase.index}: {share(c.iou)}" for phase, c in zip(phases, changes, strict=True))
    return draw(f"{key}-overlap", paint, title="Mask overlap", description=words, height=280)


def zeros(run: Run, *, key: str) -> Markup:
    """Draw the share of exact zeros among the target weights over the steps; ends of dense phases are marked."""
    targets = max(run.start.target_count, 1)
    ends = [phase for phase in run.main_phases if not phase.is_sparse]

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        shade_phases(axes, run)
        steps, shares = [float(e.step) for e in run.main], [100 * e.zeros / targets for e in run.main]
        plot_line(axes, steps, shares, color=INK, drawstyle="steps-pre", label="exact zeros")
        axes.plot(
            [phase.step for phase in ends],
            [100 * phase.zeros / targets for phase in ends],
            color=DENSE,
            marker="o",
            linestyle="none",
            label="end of a dense phase",
        )
        axes.set(xlabel="optimizer step", ylabel="zeros, % of targets", ylim=(-3, 103))
        count_ticks(axes)
        legend_above(axes)

    words = ", ".join(f"phase {phase.index}: {share(phase.zeros / targets)}" for phase in ends)
    return draw(
        f"{key}-zeros",
        paint,
        title="Exact zeros among the target weights",
        description=f"At the ends of dense phases: {words or 'none has ended'}.",
    )


def training_flops(run: Run, *, key: str) -> Markup:
    """Draw the training FLOPs over the epochs beside a dense training's; a branch starts from what led to it."""
    dense = run.start.dense_training_flops or 1

    def spent(epoch: Epoch) -> tuple[int, float]:
        return epoch.epoch, 100 * epoch.training_flops / dense

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        whole = [0, run.start.epochs]
        axes.plot(whole, [0, 100], color=MUTED, linestyle=(0, (5, 3)), linewidth=1.4, label="dense training")
        axes.plot(*zip((0, 0.0), *map(spent, run.main), strict=True), color=INK, label="this run")
        for stage, epochs in run.branches.items():
            style: dict[str, Any] = {"color": BRANCH, "linestyle": BRANCH_STYLE, "linewidth": 2.2}
            axes.plot(*zip(*map(spent, epochs), strict=True), label=legend_text(stage), **style)
        axes.set(xlabel="epoch", ylabel="% of a dense training", xlim=(0, None), ylim=(0, None))
        legend_above(axes)

    last = run.main[-1]
    return draw(
        f"{key}-flops",
        paint,
        title="Training FLOPs over the epochs",
        description=f"After epoch {last.epoch}: {flops(last.training_flops)}, {share(last.training_flops / dense)} of "
        f"a dense training of {run.start.epochs} epochs ({flops(dense)}).",
    )


def overall_sparsity(phase: PhaseEnd) -> float:
    """Return the fraction of all layers' weights that a phase's masks prune."""
    weights = sum(numel for _, numel in phase.layers.values())
    return 1 - sum(kept for kept, _ in phase.layers.values()) / weights if weights else 0.0


def by_nature(names: Iterable[str]) -> list[str]:
    """Sort names with their numbers as numbers.

    >>> by_nature(["fc", "block10.a", "block9.a", "block9"])
    ['block9', 'block9.a', 'block10.a', 'fc']
    """
    return sorted(names, key=lambda name: [(part.isdecimal(), part) for part in _parts(name)])


def shade_phases(axes: "Axes", run: Run) -> None:
    """Shade the sparse phases that the run planned, and set a hairline at every boundary."""
    label = "sparse phase"
    for phase in run.start.phases:
        if phase.is_sparse:
            axes.axvspan(phase.start, phase.stop, color=SHADE, linewidth=0, zorder=0, label=label)
            label = "_again"
        if phase.index and len(run.start.phases) <= _MOST_BOUNDARIES:
            axes.axvline(phase.start, color=RULE, linewidth=0.8, zorder=0.5)
    if run.start.phases:
        axes.set_xlim(0, run.start.phases[-1].stop)


def accuracy_floor(run: Run) -> float | None:
    """Return where an axis of accuracies in percent may begin to show what follows the run's first tenth.

    None if all of the run fits well as it is.
    """
    values = [(epoch.epoch, 100 * q.accuracy) for epoch in run.main for q in (epoch.train, epoch.holdout) if q]
    known = [(epoch, value) for epoch, value in values if math.isfinite(value)]
    later = [value for epoch, value in known if epoch > run.start.epochs / 10]
    if not later or max(later) == min(later):
        return None
    floor = min(later) - 0.06 * (max(later) - min(later))
    return floor if min(value for _, value in known) < floor - 0.5 * (max(later) - floor) else None


def count_ticks(axes: "Axes") -> None:
    """Write the ticks of the x axis as whole numbers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(round(value))))


def _parts(name: str) -> list[str]:
    return [part.zfill(12) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _phase_ticks(axes: "Axes", phases: Sequence[PhaseEnd]) -> None:
    """Name the sparse phases below the x axis, at most so many that their names stay apart."""
    every = math.ceil(len(phases) / _MOST_TICKS)
    rows = range(0, len(phases), every)
    axes.set_xticks(list(rows), [str(phases[row].index) for row in rows])
    axes.set(xlabel="sparse phase", xlim=(-0.6, max(len(phases) - 0.4, 1.6)))


def _measure(name: str) -> Callable[[Quality], float]:
    return (lambda quality: quality.loss) if name == "loss" else (lambda quality: 100 * quality.accuracy)


def _curve(
    axes: "Axes",
    epochs: Sequence[Epoch],
    quality_of: Callable[[Epoch], Quality | None],
    value: Callable[[Quality], float],
    **style: object,
) -> None:
    found = [(float(epoch.step), value(quality)) for epoch in epochs if (quality := quality_of(epoch))]
    if found:
        plot_line(axes, [step for step, _ in found], [height for _, height in found], **style)


def _mark_members(axes: "Axes", run: Run, value: Callable[[Quality], float]) -> None:
    """Mark where the two halves stand on their curves."""
    members = run.final.members if run.final else {}
    for name, colour, marker in (("dense", DENSE, "o"), ("sparse", SPARSE, "D")):
        member = members.get(name)
        if member and member.holdout:
            axes.plot(
                [member.step],
                [value(member.holdout)],
                color=colour,
                marker=marker,
                markersize=7,
                linestyle="none",
                clip_on=False,
                zorder=5,
                label=f"{name} half",
            )


def _curve_in_words(run: Run, measure: str) -> str:
    ends = [phase for phase in run.main_phases if phase.holdout]
    said = "; ".join(
        f"{'sparse' if phase.is_sparse else 'dense'} phase {phase.index} ends at step {phase.stop} with "
        f"{loss_text(phase.holdout.loss) if measure == 'loss' else percent(phase.holdout.accuracy)}"
        for phase in ends
        if phase.holdout
    )
    return f"Hold-out {measure}: {said}." if said else f"The {measure} of {len(run.epochs)} epochs."


def _short(names: Sequence[str]) -> list[str]:
    """Drop what all names end with, and the middle of what is still too long."""
    tail = ".weight" if all(name.endswith(".weight") for name in names) else ""
    bare = [name.removesuffix(tail) for name in names]
    half = _LONGEST_NAME // 2 - 1
    return [name if len(name) <= _LONGEST_NAME else f"{name[:half]}…{name[-half:]}" for name in bare]
