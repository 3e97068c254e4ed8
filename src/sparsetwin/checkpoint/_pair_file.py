"""``pair.json``: the members of a pair, and during a switch of files the members that there will be."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from sparsetwin.checkpoint._plain import JSON, dump_json, parse_json
from sparsetwin.errors import CheckpointError

_VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Member:
    """One network of a pair."""

    name: str
    sparsity: float  # fraction of the target weights that its masks prune
    step: int  # optimizer steps done when it was saved
    file: str  # name of its file, in the pair's folder
    sha256: str  # of the file, in hexadecimal
    kept: int  # target weights that its masks keep; all of them in a dense network
    targets: int  # weights that may be pruned
    metrics: dict[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True)
class About:
    """What holds for all networks of a pair; empty texts are what nobody told."""

    architecture: str = ""  # the model's class
    notice: str = ""  # origin and licence of the data that they were trained on


@dataclass(frozen=True)
class PairFile:
    """What ``pair.json`` says."""

    members: dict[str, Member]
    switching_to: dict[str, Member] | None = None  # the members, once every file of these is in its place
    about: About = About()


def member_file(name: str) -> str:
    """Return the name of a member's file.

    Raises:
        CheckpointError: If ``name`` cannot be a member's name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        allowed = "lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit"
        raise CheckpointError(f"a member's name holds {allowed}, 100 at most; got {name!r}")
    return f"{name}.safetensors"


def dump_pair(pair: PairFile) -> bytes:
    """Return the text of ``pair.json``; equal members give equal text.

    Raises:
        CheckpointError: If metrics are not plain data, naming the member.
    """
    text: dict[str, object] = {"version": _VERSION, "members": _dump_members(pair.members)}
    if pair.about != About():
        text["about"] = asdict(pair.about)
    if pair.switching_to is not None:
        text["switching_to"] = _dump_members(pair.switching_to)
    return (dump_json(text, what="pair.json", indent=2) + "\n").encode()


def parse_pair(text: bytes, *, where: str) -> PairFile:
    """Return what the text of ``pair.json`` says.

    Args:
        text: The text.
        where: Its path, for messages.

    Raises:
        CheckpointError: If it is not what `dump_pair` writes, or of an unknown version.
    """
    content = parse_json(text, what=where)
    if not isinstance(content, dict) or "version" not in content:
        raise CheckpointError(f"{where} describes no pair: it should be a JSON object with a version")
    if content["version"] != _VERSION:
        raise CheckpointError(f"{where} has version {content['version']!r}, this library reads version {_VERSION}")
    pending = content.get("switching_to")
    members = _parse_members(content.get("members"), where)
    about = _parse_about(content.get("about", {}), where)
    return PairFile(members, None if pending is None else _parse_members(pending, where), about)


def _dump_members(members: Mapping[str, Member]) -> list[dict[str, object]]:
    return [asdict(member) for _, member in sorted(members.items())]


def _parse_members(content: JSON, where: str) -> dict[str, Member]:
    if not isinstance(content, list):
        raise CheckpointError(f"{where} should list its members, got {content!r}")
    members = [_parse_member(item, where) for item in content]
    if len({member.name for member in members}) != len(members):
        raise CheckpointError(f"{where} names a member twice")
    return {member.name: member for member in members}


def _parse_about(content: JSON, where: str) -> About:
    known = {field.name for field in fields(About)}
    if not isinstance(content, dict) or not content.keys() <= known:
        raise CheckpointError(f"{where}: 'about' has {', '.join(sorted(known))}; got {content!r}")
    if not all(isinstance(value, str) for value in content.values()):
        raise CheckpointError(f"{where}: 'about' holds text only, got {content!r}")
    return About(**content)  # type: ignore[arg-type]


def _parse_member(content: JSON, where: str) -> Member:
    expected = {field.name for field in fields(Member)}
    if not isinstance(content, dict) or set(content) != expected:
        raise CheckpointError(f"{where}: a member has {', '.join(sorted(expected))}; got {content!r}")
    values = dict(content)
    sha256, sparsity, metrics = values["sha256"], values["sparsity"], values["metrics"]
    if (
        values["file"] != member_file(str(values["name"]))
        or not (isinstance(sha256, str) and _SHA256.fullmatch(sha256))
        or not isinstance(sparsity, int | float)
        or not isinstance(metrics, dict)
        or not all(type(values[key]) is int for key in ("step", "kept", "targets"))
    ):
        raise CheckpointError(f"{where} has a member with impossible values: {content!r}")
    return Member(**values)  # type: ignore[arg-type]
