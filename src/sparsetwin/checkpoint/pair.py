"""The pair: the dense and the sparse network of one run, in one folder.

``pair.json`` lists the members, their files and the sha256 of each; it is always replaced last. While a file is being
replaced it holds a second list, ``switching_to``, so that the file is known both before and after: which of the two
lists is true is seen from the file's sha256. Reading changes nothing on the disk; the next call that writes settles
what a killed process left. ``README.md``, the card, is written from ``pair.json`` and follows it.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from sparsetwin.checkpoint._atomic import (
    HashedWriter,
    Written,
    put_in_place,
    remove_stale,
    rename,
    replace_file,
    sha256_of,
    write_temporary,
)
from sparsetwin.checkpoint._card import CARD_FILE, pair_card
from sparsetwin.checkpoint._encoding import encode
from sparsetwin.checkpoint._model_state import bare, load_state, state_of
from sparsetwin.checkpoint._pair_file import About, Member, PairFile, dump_pair, member_file, parse_pair
from sparsetwin.checkpoint._plain import JSON, dump_json
from sparsetwin.checkpoint._safetensors import write_file
from sparsetwin.checkpoint.mapped import SparseFile
from sparsetwin.checkpoint.sparse_file import SparseNetwork, load_masks, load_sparse
from sparsetwin.errors import CheckpointError, StateError, nearest
from sparsetwin.masking import Masks, SparseView

_ATTEMPTS = 5  # of reading a member while another process is about to replace it
_PAUSE = 0.01  # seconds between them
_PATIENCE = 30.0  # seconds in which a pair may change again and again before a member is read
T = TypeVar("T")


class Pair:
    """The networks that one run gives, each a file beside ``pair.json``.

    ``dense`` and ``sparse`` are the two halves; a family may hold more, such as ``sparse-0.95``. The folder has one
    writer at a time, in distributed training one process; others may read at any moment.

    Args:
        folder: Where the pair is; it is made by the first `save`.
        notice: Origin and licence of the training data, in one line, for the card and the files that are saved from
            now on; None leaves what the pair says already.
    """

    def __init__(self, folder: str | Path, *, notice: str | None = None) -> None:
        self.folder = Path(folder)
        self._notice = notice

    @property
    def notice(self) -> str:
        """Origin and licence of the training data; empty if nobody told."""
        return self._read().about.notice if self._notice is None else self._notice

    @property
    def members(self) -> dict[str, Member]:
        """The members by name, sorted; none if there is no pair yet.

        Raises:
            CheckpointError: If ``pair.json`` is corrupted or of an unknown version.
        """
        return self._resolved(self._read())

    def save(
        self,
        model: nn.Module,
        view: SparseView,
        *,
        name: str | None = None,
        metrics: Mapping[str, JSON] | None = None,
    ) -> Member:
        """Save the model's parameters and buffers as one member, in place of the one that has the name.

        Args:
            model: The model as it trains; wrappers such as DDP and ``torch.compile`` leave no trace.
            view: The `Sparsifier`; tensors with a mask are stored sparse.
            name: By default ``sparse`` if masks are in force and ``dense`` if not.
            metrics: Plain data to list with the member; `annotate` adds more.

        Raises:
            StateError: If a pruned weight is not zero, or the state has parts that are no plain tensors.
            CheckpointError: If the name or a metric cannot be used or the disk is full; the pair is then as it was.
        """
        masks = view.masks
        name = ("sparse" if masks else "dense") if name is None else name
        path = self.folder / member_file(name)
        dump_json(dict(metrics or {}), what="metrics")  # refuse them before anything is written
        state = state_of(bare(model))
        targets, kept = _count(view, state, masks)
        sparsity = 1 - kept / targets if targets else 0.0
        card: dict[str, JSON] = {"step": view.steps, "sparsity": sparsity, "kept": kept, "targets": targets}
        if self.notice:
            card["data_notice"] = self.notice
        members = self._settled()
        written = write_file(path, *encode(state, masks, card))
        member = Member(
            name=name,
            sparsity=sparsity,
            step=view.steps,
            file=path.name,
            sha256=written.sha256,
            kept=kept,
            targets=targets,
            metrics=dict(metrics or {}),
        )
        try:
            architecture = type(bare(model)).__name__
            self._switch(members, {**members, name: member}, lambda: put_in_place(written), architecture=architecture)
        finally:
            written.discard()
        return member

    def load(self, name: str, model: nn.Module) -> nn.Module:
        """Return a deep copy of a model with the state of a member.

        Args:
            name: A member.
            model: A model of the same architecture, wrapped or not; it is not changed.

        Returns:
            The copy without the wrappers around it, on the model's device and in its mode.

        Raises:
            CheckpointError: If there is no such member, or its file is missing or not the one that was saved.
            StateError: If the names, shapes or dtypes of its tensors are not exactly the model's.
        """
        tensors = self._verified(name, load_sparse).tensors
        twin = copy.deepcopy(bare(model))
        load_state(twin, tensors, what=f"the member {name!r} of {self.folder}")
        return twin

    def network(self, name: str) -> SparseNetwork:
        """Return a member's tensors, masks and card, on the CPU, without a model.

        Raises:
            CheckpointError: As `load` does.
        """
        return self._verified(name, load_sparse)

    def open(self, name: str) -> SparseFile:
        """Map a member's file, to read one tensor at a time; close it when it is no longer needed.

        Raises:
            CheckpointError: If there is no such member, or its file is missing or not the one that was saved.
        """
        return self._verified(name, SparseFile.open)

    def dense(self, model: nn.Module) -> nn.Module:
        """Return a deep copy of a model with the state of the dense half; see `load`."""
        return self.load("dense", model)

    def sparse(self, model: nn.Module) -> nn.Module:
        """Return a deep copy of a model with the state of the sparse half; see `load`."""
        return self.load("sparse", model)

    def masks(self, name: str) -> Masks:
        """Return a member's masks by canonical name, True keeps; a dense member has none.

        Raises:
            CheckpointError: As `load` does.
        """
        return self._verified(name, load_masks)

    def annotate(self, name: str, metrics: Mapping[str, JSON]) -> Member:
        """Add metrics to a member, in place of those that have the same keys.

        Raises:
            CheckpointError: If there is no such member, or a metric is not plain data.
        """
        dump_json(dict(metrics), what="metrics")
        members = self._settled()
        member = self._member(members, name)
        annotated = replace(member, metrics={**member.metrics, **metrics})
        self._finish({**members, name: annotated}, self._about())
        return annotated

    def rename(self, old: str, new: str) -> Member:
        """Give a member another name, in place of the member that has it.

        Raises:
            CheckpointError: If there is no member ``old``, its file is damaged, or ``new`` cannot be used.
        """
        member, members = self._renamed(old, new)
        if old != new:
            after = {other: value for other, value in members.items() if other != old} | {new: member}
            self._switch(members, after, lambda: rename(self._path(members[old]), self._path(member)))
        return member

    def copy(self, old: str, new: str) -> Member:
        """Save a member under a second name, such as ``sparse-best``, in place of the member that has it.

        Raises:
            CheckpointError: As `rename` does.
        """
        member, members = self._renamed(old, new)
        if old != new:
            content = self._path(members[old])
            written = write_temporary(self._path(member), lambda file: _copy(content, file))
            try:
                self._switch(members, {**members, new: member}, lambda: put_in_place(written))
            finally:
                written.discard()
        return member

    def verify(self) -> None:
        """Check every member's file against its sha256.

        Raises:
            CheckpointError: Naming every member whose file is missing or not the one that was saved.
        """
        problems = []
        for name in self.members:
            try:
                self._verified(name, lambda path: path)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError("; ".join(problems))

    def _path(self, member: Member) -> Path:
        return self.folder / member.file

    def _member(self, members: Mapping[str, Member], name: str) -> Member:
        if name not in members:
            known = ", ".join(members) or "none"
            raise CheckpointError(f"no member {name!r} in {self.folder}; members: {known}{nearest(name, members)}")
        return members[name]

    def _renamed(self, old: str, new: str) -> tuple[Member, dict[str, Member]]:
        file = member_file(new)
        members = self._settled()
        member = self._member(members, old)
        self._verified(old, lambda path: path)
        return replace(member, name=new, file=file), members

    def _verified(self, name: str, read: Callable[[Path], T]) -> T:
        """Read a member's file, sure that it is the listed one, also while another process replaces it."""
        give_up, unchanged = time.monotonic() + _PATIENCE, 0
        while True:
            pair = self._read()
            try:
                path = self._path(member := self._member(self._resolved(pair), name))
                before = _identity(path)
                if before is None:
                    raise CheckpointError(f"the file of member {name!r} is missing: {path}")
                if sha256_of(path) != member.sha256:
                    raise CheckpointError(f"{path} of member {name!r} is corrupted: its sha256 is not the listed one")
                result = read(path)
                if _identity(path) == before:
                    return result
                unchanged = 0
            except CheckpointError:
                unchanged = unchanged + 1 if self._read() == pair else 0
                settled = unchanged and pair.switching_to is None
                if settled or unchanged == _ATTEMPTS or time.monotonic() > give_up:
                    raise
            if time.monotonic() > give_up:
                raise CheckpointError(f"{self.folder} changes faster than member {name!r} can be read")
            time.sleep(_PAUSE)

    def _read(self) -> PairFile:
        path = self.folder / "pair.json"
        try:
            return parse_pair(path.read_bytes(), where=str(path))
        except FileNotFoundError:
            return PairFile({})
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    def _resolved(self, pair: PairFile) -> dict[str, Member]:
        """Return the list that is true: during a switch the new one, as soon as its files are in their places."""
        if pair.switching_to is None:
            return pair.members
        arriving = [member for name, member in pair.switching_to.items() if member != pair.members.get(name)]
        arrived = all(
            self._path(member).exists() and sha256_of(self._path(member)) == member.sha256 for member in arriving
        )
        return pair.switching_to if arrived else pair.members

    def _settled(self) -> dict[str, Member]:
        """Return the members after putting on the disk what a killed process had left open."""
        pair = self._read()
        remove_stale(self.folder)
        if pair.switching_to is not None:
            self._finish(self._resolved(pair), pair.about)
        return self._resolved(pair)

    def _about(self, architecture: str = "") -> About:
        told = self._read().about
        return About(architecture or told.architecture, self.notice)

    def _switch(
        self,
        before: dict[str, Member],
        after: dict[str, Member],
        move: Callable[[], None],
        *,
        architecture: str = "",
    ) -> None:
        about = self._about(architecture)
        card = self._card(after, about)  # written while the pair is as it was; a rename needs no room on the disk
        try:
            self._write(PairFile(before, after, about))
            move()
            self._write(PairFile(after, about=about))
            put_in_place(card)
        finally:
            card.discard()

    def _finish(self, members: dict[str, Member], about: About) -> None:
        card = self._card(members, about)
        try:
            self._write(PairFile(members, about=about))
            put_in_place(card)
        finally:
            card.discard()

    def _card(self, members: Mapping[str, Member], about: About) -> Written:
        text = pair_card(members, about).encode()
        return write_temporary(self.folder / CARD_FILE, lambda file: file.write(text))

    def _write(self, pair: PairFile) -> None:
        text = dump_pair(pair)
        replace_file(self.folder / "pair.json", lambda file: file.write(text))


def _count(view: SparseView, state: Mapping[str, Tensor], masks: Masks) -> tuple[int, int]:
    """Return the number of target weights, and of those that are kept."""
    foreign = [name for name in [*view.target_names, *masks] if name not in state]
    if foreign or not masks.keys() <= set(view.target_names):
        listed = ", ".join(foreign or sorted(masks.keys() - set(view.target_names)))
        raise StateError(f"the sparsifier belongs to another model: {listed} is not among this one's targets")
    sizes = {name: state[name].numel() for name in view.target_names}
    kept = {name: int(masks[name].sum()) if name in masks else size for name, size in sizes.items()}
    return sum(sizes.values()), sum(kept.values())


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _copy(content: Path, file: HashedWriter) -> None:
    with content.open("rb") as source:
        while chunk := source.read(1 << 20):
            file.write(chunk)
