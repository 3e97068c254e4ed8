"""A folder that is replaced as a whole, and never with things in it that somebody else put there."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sparsetwin.errors import UsageError

CARD = "README.md"
CARD_TAG = "- sparsetwin\n"
"""A line of every card that we wrote; another card is not ours to replace."""

_OURS = re.compile(
    r"(generation_)?config\.json|sparse\.safetensors|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


def check_replaceable(folders: Iterable[Path], *, processor: Any) -> None:
    """Refuse folders that hold what would be lost.

    Args:
        folders: Where to write; they need not exist.
        processor: What writes files of its own beside the model, or None.

    Raises:
        UsageError: Naming the first five entries that are not written anew.
    """
    ours = _files_of(processor)
    for folder in folders:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file; expected a folder, or a path where there is nothing yet")
        found = sorted(folder.iterdir()) if folder.exists() else []
        foreign = [path.name for path in found if path.name not in ours and not _is_ours(path)]
        if foreign:
            more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
            hint = "" if processor is not None else ", or processor= if that is what wrote them"
            raise UsageError(
                f"{folder} holds {', '.join(foreign[:5])}{more}, which would be lost: it is replaced as a whole. Give "
                f"a folder of its own, such as {folder / 'sparse'}{hint}"
            )


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder, then put it in the old one's place; a stop in between leaves one of them whole.

    Args:
        folder: A link to a folder stays one.
        fill: Writes everything into the empty folder that it is given.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        fill(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)


def _files_of(processor: Any) -> set[str]:
    """Return the names that a processor writes; only it knows them."""
    if processor is None:
        return set()
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(Path(folder))
        return {path.name for path in Path(folder).iterdir()}


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.name == CARD:
        return CARD_TAG in path.read_text(encoding="utf-8", errors="replace")
    return _OURS.fullmatch(path.name) is not None
