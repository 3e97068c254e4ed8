"""``sparsetwin export RUN``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import torch
import tyro
from torch import Tensor, nn

from sparsetwin.checkpoint import (
    JSON,
    Member,
    Pair,
    SparseNetwork,
    Values,
    is_sparse_bitmask,
    load_sparse,
    load_sparse_bitmask,
    save_sparse,
    save_sparse_bitmask,
)
from sparsetwin.cli._call import DataPath, Switch, parse, print_json
from sparsetwin.cli._description import read_description
from sparsetwin.errors import ConfigError, ExportError, nearest
from sparsetwin.export import check_two_four, export_onnx, export_openvino, export_program
from sparsetwin.recipes import model_factory
from sparsetwin.training import RunFolder

Format: TypeAlias = Literal["onnx", "openvino", "torch-export", "safetensors", "sparse-bitmask", "2:4"]
_TRACED = ("onnx", "openvino", "torch-export")
_WITH_VALUES = ("safetensors", "2:4")
_SUFFIXES = {"openvino": ".xml", "torch-export": ".pt2"}  # which these engines insist on


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write one half of a pair for another engine, or in a smaller or an older file format.

    onnx, openvino and torch-export hold the whole network, traced with a free batch size; the file is run in its engine
    and compared before it is kept. safetensors is one bit a weight and the kept values; sparse-bitmask is the layout
    that compressed-tensors had; 2:4 is safetensors after a check that the weights are 2:4, the first that is not is
    named.
    """

    source: Annotated[Path, tyro.conf.arg(name="run", metavar="RUN"), tyro.conf.Positional]
    """Run folder, as sparsetwin train wrote it, or a file of safetensors or sparse-bitmask to convert."""
    to: Format
    """What to write."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """File to write; replaced when the new one is complete. openvino puts the weights in a .bin file beside it."""
    half: str = "sparse"
    """Member of the pair: sparse, dense, or another that the run saved, such as sparse-best."""
    values: Values = "exact"
    """How safetensors and 2:4 store the kept values of a sparse half; int8 has one scale for each output of a layer."""
    opset: int = 18
    """Version of ONNX's operators."""
    data: DataPath = None
    """Folder of the data set, if it moved."""
    json: Switch = False
    """End with one JSON object on the last line."""


@dataclass(frozen=True)
class _Source:
    """What is exported."""

    name: str
    weights: SparseNetwork
    notes: dict[str, str] = field(default_factory=dict)
    traced: Callable[[], tuple[nn.Module, Tensor]] | None = None  # the model and an input; None for a bare file


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Export, arguments, command="export")
    _check_options(args)
    source = _open_file(args.source) if args.source.is_file() else _open_run(args)
    checked = _write(args, source)
    written = sum(path.stat().st_size for path in (args.out, *_beside(args)))
    dense = sum(tensor.numel() * tensor.element_size() for tensor in _untied(source.weights.tensors))
    print(
        f"{source.name} as {args.to}: {args.out}, {written / 1e6:.3g} MB ({written / dense:.1%} of its tensors in "
        f"dense form)" + (f", {checked}" if checked else "")
    )
    if args.json:
        told: dict[str, Any] = {"file": str(args.out), "to": args.to, "bytes": written, "dense_bytes": dense}
        print_json({**told, "checked": checked or None})
    return 0


def _check_options(args: Export) -> None:
    if args.values != "exact" and args.to not in _WITH_VALUES:
        raise ConfigError(f"--values {args.values} is for {' and '.join(_WITH_VALUES)}; {args.to} holds exact weights")
    if args.opset != 18 and args.to != "onnx":
        raise ConfigError(f"--opset is for onnx, not for {args.to}")
    suffix = _SUFFIXES.get(args.to)
    if suffix is not None and args.out.suffix != suffix:
        raise ConfigError(f"a file of {args.to} ends in {suffix}, got --out {args.out}")
    if args.out.is_dir():
        raise ConfigError(f"--out {args.out} is a folder; name the file to write")


def _open_file(path: Path) -> _Source:
    if is_sparse_bitmask(path):
        return _Source(path.name, load_sparse_bitmask(path))
    weights = load_sparse(path)
    notes = {key: value for key, value in weights.card.items() if key == "data_notice" and isinstance(value, str)}
    return _Source(path.name, weights, notes)


def _open_run(args: Export) -> _Source:
    folder = RunFolder(args.source)
    described = read_description(folder)
    pair = Pair(folder.pair)
    member = _member(pair, args.half)
    if args.out.resolve().parent == folder.pair.resolve():
        raise ExportError(f"{args.out} is in the pair's own folder, which holds its members only; give another --out")
    notes = {
        "half": member.name, "sparsity": f"{member.sparsity:.6g}", "step": str(member.step), "data_notice": pair.notice
    }  # fmt: skip

    def build() -> tuple[nn.Module, Tensor]:
        recipe = described.recipe
        torch.set_num_threads(described.threads)
        splits = recipe.dataset.load(
            args.data or described.data,
            batch_size=recipe.train.batch_size,
            eval_batch_size=recipe.train.eval_batch_size,
            seed=recipe.seed,
            device=torch.device("cpu"),
        )
        notes["data_notice"] = pair.notice or splits.notice
        model = pair.load(member.name, model_factory(recipe.model, splits, torch.device("cpu"))())
        return model.eval(), splits.example_input

    return _Source(f"{member.name} half", pair.network(member.name), notes, build)


def _member(pair: Pair, name: str) -> Member:
    members = pair.members
    if not members:
        raise ExportError(f"{pair.folder} has no members yet; the first is saved when the first phase ends")
    if name not in members:
        raise ExportError(f"no half {name!r} in {pair.folder}; it has {', '.join(members)}{nearest(name, members)}")
    return members[name]


def _write(args: Export, source: _Source) -> str:
    """Write the file, and return what it was checked with."""
    weights = source.weights
    if args.to in _TRACED:
        if source.traced is None:
            known = ", ".join(name for name in get_args(Format) if name not in _TRACED)
            raise ExportError(
                f"{args.source} holds weights and no network; {args.to} needs a run, a file goes to {known}"
            )
        model, example = source.traced()
        return _trace(args, model, example, source)
    if not weights.masks:
        _check_dense(args, source)
    if args.to == "sparse-bitmask":
        save_sparse_bitmask(args.out, weights.tensors, weights.masks)
        return ""
    if args.to == "2:4":
        check_two_four(weights.tensors, names=list(weights.masks))
    card: dict[str, JSON] = {**{key: value for key, value in source.notes.items() if value}, **weights.card}
    save_sparse(args.out, weights.tensors, weights.masks, card=card, values=args.values)
    return "all pruned weights are 2:4" if args.to == "2:4" else ""


def _check_dense(args: Export, source: _Source) -> None:
    """Refuse, for weights of which none is pruned, what is said of pruned ones alone."""
    if args.to == "2:4":
        raise ExportError(f"{source.name} has no pruned weights; 2:4 is for a sparse one")
    if args.to == "sparse-bitmask":
        raise ExportError(f"{source.name} has no pruned weights; sparse-bitmask is for a sparse one; take safetensors")
    if args.values != "exact":
        raise ExportError(
            f"{source.name} has no pruned weights, and --values {args.values} is how the kept ones of a sparse one are "
            "stored; leave --values out, which writes a plain file of safetensors"
        )


def _trace(args: Export, model: nn.Module, example: Tensor, source: _Source) -> str:
    masks = source.weights.masks
    notes = {key: value for key, value in source.notes.items() if value}
    if args.to == "onnx":
        is_checked = export_onnx(model, example, path=args.out, masks=masks, opset=args.opset, notes=notes)
        return "checked in ONNX Runtime" if is_checked else "not run: pip install onnxruntime to have it checked"
    if args.to == "openvino":
        export_openvino(model, example, path=args.out, masks=masks, notes=notes)
        return "checked in OpenVINO"
    export_program(model, example, path=args.out, masks=masks, notes=notes)
    return "loaded again and checked"


def _beside(args: Export) -> tuple[Path, ...]:
    return (args.out.with_suffix(".bin"),) if args.to == "openvino" else ()


def _untied(tensors: dict[str, Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors.values()}.values())
