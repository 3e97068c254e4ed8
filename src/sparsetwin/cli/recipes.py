"""``sparsetwin recipes``."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsetwin.cli._call import Switch, parse, print_json, print_table
from sparsetwin.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes."""

    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Recipes, arguments, command="recipes")
    summaries = {name: (make.__doc__ or "").strip().splitlines()[0].replace("``", "") for name, make in RECIPES.items()}
    if args.json:
        print_json({"recipes": {name: make().plain() for name, make in RECIPES.items()}})
        return 0
    print_table(["recipe", "what"], [[name, summary] for name, summary in summaries.items()])
    print("sparsetwin train RECIPE --help shows every field; package.module:function names a recipe of your own")
    return 0
