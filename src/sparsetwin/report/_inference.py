"""The section about a benchmark of inference, where the run folder has one."""

import json
from typing import TypeVar

from sparsetwin.errors import CheckpointError
from sparsetwin.report._markup import Markup, details, facts, paragraph, section, table
from sparsetwin.report._records import Record, read_object
from sparsetwin.report._run_folder import Run

T = TypeVar("T")

BENCH_FILE = "bench-inference.json"
"""Of a run folder, as ``sparsetwin bench inference`` writes it."""

_KNOWN_VERSION = 1
_HEADINGS = (
    "engine", "precision", "median, ms", "quartiles, ms", "shortest, ms", "samples a second", "error", "same class",
    "note",
)  # fmt: skip


def inference(run: Run, rank: int) -> Markup:
    """Return the section; nothing if nobody ran the benchmark.

    Raises:
        CheckpointError: If the file is malformed.
    """
    path = run.folder / BENCH_FILE
    if not path.exists():
        return Markup("")
    found = read_object(path)
    if found.fields.get("version") != _KNOWN_VERSION:
        return section(
            "Inference on this machine", paragraph(f"{BENCH_FILE} is of another version.", css="note"), rank=rank
        )
    settings = found.record("settings")
    said = (
        f"{found.text('name')}, {found.text('inputs')}, {settings.integer('threads')} thread(s), {found.text('date')}. "
        "All engines took turns; the error is the largest difference to PyTorch's outputs over the largest output."
    )
    contests = [_contest(contest) for contest in _records(found, "contests")]
    return section(
        "Inference on the machine of the benchmark",
        paragraph(" ".join((said, *_texts(found, "notes")))),
        *(piece for contest in contests for piece in contest),
        details("Machine of the benchmark", facts(_facts(found.record("machine")))),
        rank=rank,
    )


def _contest(contest: Record) -> tuple[Markup, ...]:
    batch = contest.integer("batch")
    missing = contest.record("missing")
    reasons = [(name, missing.text(name)) for name in missing.fields]
    drawn = table(f"Calls of {batch} sample(s).", _HEADINGS, map(_cells, _records(contest, "rows")), texts=2)
    verdicts = "; ".join(_texts(contest, "verdicts"))
    return (
        drawn,
        paragraph(f"{verdicts}.") if verdicts else Markup(""),
        details(f"Not measured with {batch} sample(s)", facts(reasons)) if reasons else Markup(""),
    )


def _cells(row: Record) -> tuple[str, ...]:
    low, high = (float(value) for value in row.row("quartiles_ms", length=2))
    return (
        row.text("engine"),
        row.text("precision"),
        f"{row.number('median_ms'):.3g}",
        f"{low:.3g} to {high:.3g}",
        f"{row.number('min_ms'):.3g}",
        f"{row.number('per_second'):,.0f}",
        f"{row.number('relative_error'):.1e}",
        f"{row.fraction('same_predictions'):.1%}",
        row.text("note"),
    )


def _records(record: Record, name: str) -> list[Record]:
    return [Record(f"{record.place}, {name}[{index}]", item) for index, item in _items(record, name, dict)]


def _texts(record: Record, name: str) -> list[str]:
    return [item for _, item in _items(record, name, str)]


def _items(record: Record, name: str, kind: type[T]) -> list[tuple[int, T]]:
    found = record.fields.get(name)
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise CheckpointError(f"{record.place}: {name!r} should be a list of type {kind.__name__}, got {found!r}")
    return list(enumerate(found))


def _facts(machine: Record) -> list[tuple[str, str]]:
    return [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in machine.fields.items()]
