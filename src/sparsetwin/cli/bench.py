"""``sparsetwin bench inference RUN|FILE``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from sparsetwin.bench import BenchResult, BenchSettings, Contest, Row, bench_inference, write_result
from sparsetwin.checkpoint import Pair, SparseFile, is_sparse_bitmask, load_sparse_bitmask
from sparsetwin.cli._call import DataPath, Switch, parse, print_json, print_table
from sparsetwin.cli._description import read_description
from sparsetwin.cli.doctor import examine
from sparsetwin.data import Batches
from sparsetwin.errors import ConfigError, UsageError
from sparsetwin.models import build
from sparsetwin.recipes import ModelSettings, import_object, model_factory
from sparsetwin.report import BENCH_FILE, write_report
from sparsetwin.training import RunFolder

_HEADINGS = ("engine", "precision", "median ms", "quartiles", "min", "a second", "x eager", "error", "same", "note")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Time one half of a pair on this machine, on every engine that is installed.

    Engines take turns. Each gets the same inputs and the same number of threads, and its answers are compared with
    PyTorch's; one that fails is listed with the reason. A run's result is kept in its folder, and its report gets a
    section.
    """

    what: Annotated[Literal["inference"], tyro.conf.Positional]
    """What to time."""
    sources: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN|FILE ..."), tyro.conf.Positional]
    """Run folders, as sparsetwin train wrote them, or files of safetensors or sparse-bitmask with --model.name."""
    half: str = "sparse"
    """Member of the pair: sparse, dense, or another that the run saved, such as sparse-best."""
    settings: Annotated[BenchSettings, tyro.conf.arg(name="")] = field(default_factory=BenchSettings)
    """Which engines, and how they are timed."""
    model: ModelSettings = field(default_factory=lambda: ModelSettings(name=""))
    """The network of a file; a run knows its own."""
    input: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = ()
    """Shape of one sample of a file's network, such as 3 224 224; the samples are random then."""
    data: DataPath = None
    """Folder of a run's data set, if it moved."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON file to write; of a run by default bench-inference.json in its folder."""
    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Bench, arguments, command="bench")
    _check(args)
    machine = examine()
    features = ", ".join(machine["cpu_features"]) or "none known"
    print(f"processor features: {features}; threads: {args.settings.threads}")
    results = {str(source): _one(args, source, machine) for source in args.sources}
    if args.json:
        print_json({"results": {name: result.plain() for name, result in results.items()}})
    return 0


def _check(args: Bench) -> None:
    if not args.sources:
        raise UsageError("nothing to time: give a run folder, or a file with --model.name and --input")
    if args.out is not None and len(args.sources) > 1:
        raise ConfigError(f"--out takes the result of one source, got {len(args.sources)}")
    for source in args.sources:
        if source.is_file() and not (args.model.name and args.input):
            raise UsageError(
                f"{source} holds weights and no network; add --model.name NAME or module:callable, and --input with "
                "the shape of one sample, such as --input 3 224 224"
            )
        if not source.is_file() and (args.model.name or args.input):
            raise ConfigError(f"--model and --input are for files; {source} is none, and a run knows its own network")


def _one(args: Bench, source: Path, machine: dict[str, object]) -> BenchResult:
    torch.set_num_threads(args.settings.threads)
    is_run = not source.is_file()
    model, samples = _of_run(args, source) if is_run else _of_file(args, source)
    name = f"{source.resolve().name}, {args.half} half" if is_run else source.name
    kept = _sparsity(model)
    result = bench_inference(
        model,
        samples,
        name=f"{name}, {kept:.1%} zeros",
        settings=args.settings,
        machine=machine,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    _show(result)
    out = args.out or (source / BENCH_FILE if is_run else None)
    if out is not None:
        write_result(result, out)
        print(f"result: {out}")
    if is_run and out == source / BENCH_FILE:
        folder = RunFolder(source)
        print(f"report: {write_report([source], folder.report)}")
    return result


def _of_run(args: Bench, source: Path) -> tuple[nn.Module, Tensor]:
    """Return a member and samples of the test set."""
    folder = RunFolder(source)
    described = read_description(folder)
    recipe = described.recipe
    splits = recipe.dataset.load(
        args.data or described.data,
        batch_size=recipe.train.batch_size,
        eval_batch_size=recipe.train.eval_batch_size,
        seed=recipe.seed,
        device=torch.device("cpu"),
    )
    model = Pair(folder.pair).load(args.half, model_factory(recipe.model, splits, torch.device("cpu"))())
    return model, _first(splits.test, args.settings.batch, splits.example_input)


def _first(batches: Batches, count: int, example: Tensor) -> Tensor:
    found: list[Tensor] = []
    for inputs, _ in batches.epoch(0) if len(batches) else ():
        found.append(inputs)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count] if found else example


def _of_file(args: Bench, source: Path) -> tuple[nn.Module, Tensor]:
    """Return a network with a file's weights, and random samples."""
    name, options = args.model.name, args.model.options
    if ":" in name:
        try:
            model = import_object(name)(**options)
        except TypeError as error:
            raise ConfigError(f"{name} cannot be called with --model.options {options}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module")
    else:
        model = build(name, **options)
    if is_sparse_bitmask(source):
        tensors = load_sparse_bitmask(source).tensors
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ConfigError(f"{source} does not fit {name}: {error}") from error
    else:
        with SparseFile.open(source) as file:
            file.load_into(model)
    return model, torch.randn(args.settings.batch, *args.input, generator=torch.Generator().manual_seed(0))


def _sparsity(model: nn.Module) -> float:
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    total = sum(weight.numel() for weight in weights)
    return sum(int((weight == 0).sum()) for weight in weights) / total if total else 0.0


def _show(result: BenchResult) -> None:
    for contest in result.contests:
        print_table(
            _HEADINGS, [_cells(row, contest) for row in contest.rows], title=f"{result.name}, batch {contest.batch}"
        )
        for name, reason in contest.missing.items():
            print(f"not measured: {name}: {reason}")
        for verdict in contest.verdicts():
            print(verdict)
    for note in result.notes:
        print(note)


def _cells(row: Row, contest: Contest) -> list[str]:
    plain = next((r for r in contest.rows if (r.engine, r.precision) == ("PyTorch eager", "fp32")), None)
    low, high = row.quartiles_ms
    return [
        row.engine,
        row.precision,
        f"{row.median_ms:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row.min_ms:.3f}",
        f"{row.per_second:,.0f}",
        "" if plain is None else f"{plain.median_ms / row.median_ms:.2f}",
        f"{row.relative_error:.1e}",
        f"{row.same_predictions:.1%}",
        row.note,
    ]
