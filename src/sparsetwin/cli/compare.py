"""``sparsetwin compare [RECIPE]``."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sparsetwin.cli._call import DataPath, Switch, parse, print_json, print_table
from sparsetwin.cli._recipe_flags import long_flags, overridden, split_name
from sparsetwin.comparison import TABLES, Keep, Plan, Progress, Runner, compare, find_contender
from sparsetwin.recipes import Recipe, find_recipe, recipe_from_plain, training_samples
from sparsetwin.report import METHOD_HEADINGS, method_cells, method_record
from sparsetwin.training import choose_device
from sparsetwin.training.environment import command_line

_SHORT_EPOCHS, _FEW_SAMPLES = 15, 10_000
_NOTE = (
    "This comparison is a smoke test: it shows that every method runs to its end in one code base, and ranks nothing. "
    f"Runs of under {_SHORT_EPOCHS} epochs, or on under {_FEW_SAMPLES:,} training samples, say little about methods."
)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Train methods x sparsities x seeds from one recipe and write one table, as CSV, Markdown and HTML.

    A comparison that was stopped goes on with the same command. Every field of the recipe can be overridden as in
    sparsetwin train.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    methods: tuple[str, ...] = ("acdc", "gmp", "rigl", "static", "dense")
    """Methods, or LABEL=METHOD,FIELD=VALUE,... with other settings. dense is the dense baseline, small-dense-parameters
    and small-dense-flops are narrower dense networks, equal to the sparse ones in these; acdc+ham, acdc++,
    gmp-pretrained and others have settings of their own."""
    sparsities: tuple[float, ...] = (0.9,)
    """Sparsities at which each is trained."""
    seeds: int = 3
    """Seeds, counted from the recipe's own."""
    trials: int = 0
    """Runs in which each method's settings are chosen on the hold-out, for each sparsity; 0 takes the recipe's."""
    equal_flops: tuple[str, ...] | None = None
    """Train methods that cost less than the reference once more, as long as its FLOPs last: those with these labels, or
    without any all of them."""
    reference: str | None = None
    """What the others are compared with, by its label; by default acdc if it is among them, else the first."""
    jobs: int = 0
    """Runs at a time; 0 is as many as fit on the CPU's cores with the recipe's --threads each, and one where a run may
    take all of them or trains on a GPU."""
    keep: Keep = "all"
    """What stays of a run that has ended: all; pairs, which is all but checkpoints; or records, which are numbers and
    settings alone, enough for tables and for growing. Dense runs keep their pairs, as others may begin from them."""
    data: DataPath = None
    """Folder of the data set, if the recipe needs one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the comparison; runs/compare-RECIPE by default."""
    quiet: Switch = False
    """Show no progress."""
    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    given, rest = split_name(arguments)
    name = given or "digits"
    default = find_recipe(name)
    flags = long_flags(rest)
    args = parse(Compare, flags, command=f"compare {name}", default=Compare(recipe=default))
    recipe = recipe_from_plain(overridden(args.recipe, default=default, flags=flags).plain())
    contenders = tuple(find_contender(text) for text in args.methods)
    labels = [contender.label for contender in contenders]
    reference = args.reference or ("acdc" if "acdc" in labels else (labels or [""])[0])
    plan = Plan(
        recipe=recipe,
        contenders=contenders,
        sparsities=args.sparsities,
        seeds=tuple(range(recipe.seed, recipe.seed + args.seeds)),
        trials=args.trials,
        equal_flops=_longer(
            args.equal_flops, labels=[c.label for c in contenders if not c.is_dense], reference=reference
        ),
        reference=reference,
    )
    out = args.out or Path("runs") / f"compare-{name.replace(':', '-')}"
    is_smoke = _is_smoke_test(recipe)
    runner = Runner(
        out=out,
        recipe_name=name,
        data=args.data,
        jobs=args.jobs or _jobs(recipe),
        keep=args.keep,
        on_progress=_silent if args.quiet else _tell,
    )
    with _stopping_at_once():
        tables = compare(plan, runner, command=command_line(), smoke=_NOTE if is_smoke else None)
    for table, rows in tables.items():
        if rows:
            print_table(METHOD_HEADINGS, [method_cells(row) for row in rows], title=TABLES[table])
    if is_smoke:
        print(_NOTE)
    print(f"tables: {out / 'comparison.csv'}, .md and .html")
    if args.json:
        print_json(
            {"comparison": str(out), **{table: [method_record(row) for row in rows] for table, rows in tables.items()}}
        )
    return 0


def _is_smoke_test(recipe: Recipe) -> bool:
    """Return whether runs are too short, or the data too few, to rank methods by them."""
    samples = training_samples(recipe.dataset)
    return recipe.train.epochs < _SHORT_EPOCHS or (samples is not None and samples < _FEW_SAMPLES)


@contextmanager
def _stopping_at_once() -> Iterator[None]:
    """Let a request to end the process, like an interrupt, stop all runs after their steps."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("stopped and saved; the same command goes on", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _longer(asked: tuple[str, ...] | None, *, labels: Sequence[str], reference: str) -> tuple[str, ...]:
    """Return the labels that are trained to equal FLOPs: those asked for, all if none is named, none if not asked."""
    if asked is None:
        return ()
    return asked or tuple(label for label in labels if label != reference)


def _jobs(recipe: Recipe) -> int:
    if not recipe.threads or choose_device(recipe.device).type != "cpu":
        return 1
    return max(1, (os.cpu_count() or 1) // recipe.threads)


def _silent(progress: Progress) -> None:
    """Say nothing."""


def _tell(progress: Progress) -> None:
    failed = f", {progress.failed} of them failed" if progress.failed else ""
    print(
        f"{progress.finished} of {progress.known} runs finished{failed}; running: {', '.join(progress.running)}",
        file=sys.stderr,
        flush=True,
    )
