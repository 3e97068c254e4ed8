"""The closing table of a run and its verdict, as plain data and text, for the page and for the terminal."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sparsetwin.report._format import count, flops, markdown_table, percent, share, size, sparsity_text
from sparsetwin.report._run_folder import MAIN_STAGE, Final, Member, Quality, Run

HEADINGS = ("member", "test accuracy", "sparsity", "kept weights", "file", "inference FLOPs", "training FLOPs")
"""Headings of `cells`."""


@dataclass(frozen=True, kw_only=True)
class MemberRow:
    """One member of the pair in the closing table."""

    name: str
    accuracy: float  # fraction of the test samples, or of the hold-out if it was not tested
    loss: float  # on the same
    is_tested: bool
    holdout_accuracy: float | None
    sparsity: float
    kept: int
    targets: int
    step: int
    file_bytes: int
    file_share: float | None  # of the dense file, where there is one
    forward_flops: int  # a sample
    forward_share: float  # of the dense network's
    training_share: float  # of a dense training; of the whole run, as its members come out of it together
    int8_accuracy: float | None = None  # of what comes back from a file of int8 values; None of dense members
    int8_file_bytes: int | None = None
    int8_file_share: float | None = None


def member_rows(run: Run) -> tuple[MemberRow, ...]:
    """Return the closing table, the pair first; empty while the run goes on."""
    if run.final is None:
        return ()
    order: list[str] = [name for name in ("dense", "sparse") if name in run.final.members]
    order += [name for name in run.final.members if name not in order]
    return tuple(_row(run.final.members[name], run.final) for name in order)


def lines(rows: Iterable[MemberRow]) -> list[tuple[str, ...]]:
    """Return the closing table as text; a member that was also tried as a file of int8 values has a second line.

    Args:
        rows: As `member_rows` made them.
    """
    return [line for row in rows for line in (cells(row), *_int8_cells(row))]


def cells(row: MemberRow) -> tuple[str, ...]:
    """Return a row as text, one for each of `HEADINGS`."""
    return (
        row.name,
        _accuracy(row),
        sparsity_text(row.sparsity),
        f"{count(row.kept)} of {count(row.targets)}",
        file_text(row),
        f"{flops(row.forward_flops)} ({share(row.forward_share)})",
        share(row.training_share),
    )


def _accuracy(row: MemberRow) -> str:
    return percent(row.accuracy) + ("" if row.is_tested else " of the hold-out")


def markdown(rows: Iterable[MemberRow]) -> str:
    """Return the table in Markdown.

    Args:
        rows: As `member_rows` made them.
    """
    return markdown_table(HEADINGS, lines(rows))


def file_text(row: MemberRow) -> str:
    """Return the size of a member's file, and its share of the dense one where there is one."""
    compared = f" ({share(row.file_share)})" if row.file_share is not None else ""
    return f"{size(row.file_bytes)}{compared}"


def verdict(run: Run) -> str:
    """Return what the run came to in one sentence, or how far it has come."""
    rows = {row.name: row for row in member_rows(run)}
    if not rows:
        return _progress(run)
    pair = [row for row in rows.values() if row.name in ("dense", "sparse")] or list(rows.values())
    said = " and ".join(map(_half, pair))
    parts = [f"{said[0].upper()}{said[1:]}."]
    if sparse := rows.get("sparse"):
        of_dense = f", {share(sparse.file_share)} of the dense one," if sparse.file_share is not None else ""
        parts.append(
            f"The sparse half is a file of {size(sparse.file_bytes)}{of_dense} and needs "
            f"{share(sparse.forward_share)} of the dense inference FLOPs."
        )
        if sparse.int8_accuracy is not None and sparse.int8_file_bytes is not None:
            as_int8 = f"{size(sparse.int8_file_bytes)} at {percent(sparse.int8_accuracy)}"
            parts.append(f"With int8 values the file is {as_int8}.")
    training = next(iter(rows.values())).training_share
    parts.append(f"The whole run took {share(training)} of the FLOPs of one dense training.")
    return " ".join(parts)


def _int8_cells(row: MemberRow) -> Iterator[tuple[str, ...]]:
    """Yield the line of a member as a file of int8 values, where that was tried."""
    if row.int8_accuracy is not None and row.int8_file_bytes is not None:
        yield cells(
            replace(
                row,
                name=f"{row.name}, int8 values",
                accuracy=row.int8_accuracy,
                file_bytes=row.int8_file_bytes,
                file_share=row.int8_file_share,
            )
        )


def _row(member: Member, final: Final) -> MemberRow:
    int8 = member.int8
    judged = member.test or member.holdout or Quality(loss=math.nan, accuracy=math.nan)
    return MemberRow(
        name=member.name,
        accuracy=judged.accuracy,
        loss=judged.loss,
        is_tested=member.test is not None,
        holdout_accuracy=member.holdout.accuracy if member.holdout else None,
        sparsity=member.sparsity,
        kept=member.kept,
        targets=member.targets,
        step=member.step,
        file_bytes=member.file_bytes,
        file_share=_of_file(member.file_bytes, final),
        forward_flops=member.forward_flops,
        forward_share=_of(member.forward_flops, final.dense_forward_flops),
        training_share=_of(final.training_flops, final.dense_training_flops),
        int8_accuracy=None if int8 is None else int8.test.accuracy,
        int8_file_bytes=None if int8 is None else int8.file_bytes,
        int8_file_share=None if int8 is None else _of_file(int8.file_bytes, final),
    )


def _of_file(file_bytes: int, final: Final) -> float | None:
    return file_bytes / final.dense_file_bytes if final.dense_file_bytes else None


def _of(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _half(row: MemberRow) -> str:
    at = f" at {sparsity_text(row.sparsity)} sparsity" if row.sparsity else ""
    return f"{row.name} {_accuracy(row)}{at}"


def _progress(run: Run) -> str:
    if not run.main:
        return f"Still running: no epoch of {run.start.epochs} has finished."
    last = run.epochs[-1]
    kind = f"a sparse phase ({sparsity_text(last.phase_sparsity)})" if last.phase_sparsity else "a dense phase"
    now = f"Still running: epoch {last.epoch} of {run.start.epochs}, in {kind}"
    stage = "" if last.stage == MAIN_STAGE else f" of the stage {last.stage}"
    found = f", hold-out accuracy {percent(last.holdout.accuracy)}" if last.holdout else ""
    return f"{now}{stage}{found}."
