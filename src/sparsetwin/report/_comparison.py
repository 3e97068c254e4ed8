"""Several runs side by side: one table, overlaid curves, and what their configurations differ in."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsetwin.report._drawing import LINE_STYLES, MARKERS, SERIES, draw, legend_above, legend_text, loss_axis
from sparsetwin.report._format import percent, share, sparsity_text
from sparsetwin.report._markup import Markup, details, figure, section, side_by_side, table
from sparsetwin.report._run_folder import Run
from sparsetwin.report._sections import flat
from sparsetwin.report.tables import MemberRow, file_text, member_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADINGS = ("run", "sparsity", "dense accuracy", "sparse accuracy", "sparse file", "inference", "training")


def comparison(runs: Mapping[str, Run]) -> Markup:
    """Return the section that compares runs.

    Args:
        runs: At least two, by the names that the page calls them.
    """
    caption = (
        "Test accuracies. In brackets and the last two columns: the sparse half's file and inference FLOPs as shares "
        "of the dense network's, and the whole run's training FLOPs as a share of one dense training."
    )
    drawn = [_overlay(runs, measure) for measure in ("loss", "accuracy")]
    return section(
        "Comparison",
        table(caption, _HEADINGS, [_row(name, run) for name, run in runs.items()]),
        side_by_side(*drawn) if all(drawn) else Markup(""),
        _differences(runs),
    )


def _row(name: str, run: Run) -> tuple[str, ...]:
    members = {row.name: row for row in member_rows(run)}
    dense, sparse = members.get("dense"), members.get("sparse")
    known = next(iter(members.values()), None)
    return (
        name if run.is_finished else f"{name} (still running)",
        sparsity_text(sparse.sparsity) if sparse else "–",
        _accuracy(dense),
        _accuracy(sparse),
        file_text(sparse) if sparse else "–",
        share(sparse.forward_share) if sparse else "–",
        share(known.training_share) if known else "–",
    )


def _accuracy(row: MemberRow | None) -> str:
    return percent(row.accuracy) if row else "–"


def _overlay(runs: Mapping[str, Run], measure: str) -> Markup:
    curves = {name: points for name, run in runs.items() if (points := _points(run, measure))}
    if not curves:
        return Markup("")

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        for index, (name, points) in enumerate(curves.items()):
            axes.plot(
                [epoch for epoch, _ in points],
                [value for _, value in points],
                color=SERIES[index % len(SERIES)],
                linestyle=LINE_STYLES[index % len(LINE_STYLES)],
                marker=MARKERS[index % len(MARKERS)],
                markevery=(index, max(len(points) // 8, 1)) if len(points) > index else None,
                label=legend_text(name),
            )
        axes.set_xlabel("epoch")
        if measure == "loss":
            loss_axis(axes, (loss for points in curves.values() for _, loss in points))
        else:
            axes.set_ylabel("accuracy, %")
        legend_above(axes, columns=2)

    last = "; ".join(f"{name}: {points[-1][1]:.4g} after epoch {points[-1][0]}" for name, points in curves.items())
    drawing = draw(
        f"comparison-{measure}", paint, title=f"{measure.capitalize()} of all runs", description=last, height=320
    )
    return figure(
        drawing, f"Hold-out {measure} of the main stage over the epochs (training {measure} where none is held out)."
    )


def _points(run: Run, measure: str) -> list[tuple[int, float]]:
    found = [(epoch.epoch, epoch.holdout) for epoch in run.main if epoch.holdout]
    qualities = found or [(epoch.epoch, epoch.train) for epoch in run.main]
    return [(epoch, quality.loss if measure == "loss" else 100 * quality.accuracy) for epoch, quality in qualities]


def _differences(runs: Mapping[str, Run]) -> Markup:
    settings = {
        name: {"recipe": run.recipe, "seed": str(run.seed), **dict(flat(run.config))} for name, run in runs.items()
    }
    names = dict.fromkeys(field for fields in settings.values() for field in fields)
    rows = [(field, *_values(field, list(settings.values()))) for field in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return Markup("")
    caption = "Settings that are not the same in all runs."
    return details("What differs", table(caption, ("setting", *runs), differing, texts=1))


def _values(field: str, settings: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    return tuple(fields.get(field, "–") for fields in settings)
