"""One HTML page about one or several runs. It needs no other file, no script and no network."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparsetwin.errors import CheckpointError, ConfigError
from sparsetwin.report._comparison import comparison
from sparsetwin.report._markup import Markup, page, paragraph, section, tag, text
from sparsetwin.report._run_folder import Run, read_run
from sparsetwin.report._sections import sections
from sparsetwin.report.tables import verdict


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write a page about runs; equal run folders give equal bytes.

    Args:
        folders: One run folder, or several to compare; runs that still go on are reported as far as they are.
        out: The page to write. It appears at once and whole, in place of one that is there.

    Returns:
        ``out``.

    Raises:
        ConfigError: If no folder is given, or one is given twice.
        CheckpointError: As `read_run` does, or if the page cannot be written.
    """
    if not folders:
        raise ConfigError("a report needs at least one run folder, got none")
    runs = {name: read_run(folder) for name, folder in zip(_names(folders), folders, strict=True)}
    if len(runs) == 1:
        name, run = next(iter(runs.items()))
        content = page(f"{run.recipe}: {name}", _one(name, run))
    else:
        content = page(f"{len(runs)} runs compared", _several(runs))
    write_page(out, content)
    return out


def _one(name: str, run: Run) -> Iterator[Markup]:
    yield tag("h1", text(run.recipe))
    yield paragraph(_under(name, run), css="under")
    yield paragraph(verdict(run), css="verdict")
    yield from sections(run, key="run", rank=2)


def _several(runs: dict[str, Run]) -> Iterator[Markup]:
    yield tag("h1", text(f"{len(runs)} runs compared"))
    yield paragraph(", ".join(runs), css="under")
    yield comparison(runs)
    for index, (name, run) in enumerate(runs.items(), start=1):
        heading = section(
            name,
            paragraph(_under(run.recipe, run), css="under"),
            paragraph(verdict(run), css="verdict"),
            *sections(run, key=f"run-{index}", rank=3),
        )
        yield tag("div", heading, css="run")


def _under(name: str, run: Run) -> str:
    return f"{name} · seed {run.seed} · sparsetwin {run.versions.get('sparsetwin', '?')} · {run.created}"


def _names(folders: Sequence[Path]) -> list[str]:
    """Name each run by its folder, with as many parents as it takes to tell all apart."""
    paths = [Path(folder).resolve().parts for folder in folders]
    if len(set(paths)) < len(paths):
        raise ConfigError(f"each run folder is compared once, got {', '.join(str(folder) for folder in folders)}")
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    return names


def write_page(out: Path, content: str) -> None:
    """Write a page; it appears at once and whole, in place of one that is there.

    Raises:
        CheckpointError: If it cannot be written.
    """
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode())
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(out)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {out}: {error.strerror}") from error
