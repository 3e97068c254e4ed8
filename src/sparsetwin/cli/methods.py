"""``sparsetwin methods``."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from sparsetwin.cli._call import Switch, parse, print_json, print_table
from sparsetwin.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the sparse-training methods."""

    json: Switch = False
    """End with one JSON object on the last line."""


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    args = parse(Methods, arguments, command="methods")
    listed = {
        name: {
            "summary": (method.__doc__ or "").strip().splitlines()[0],
            "fields": [field.name for field in dataclasses.fields(method)],
        }
        for name, method in METHODS.items()
    }
    if args.json:
        print_json({"methods": listed})
        return 0
    rows = [[name, str(entry["summary"]), ", ".join(entry["fields"])] for name, entry in listed.items()]
    print_table(["method", "what", "fields"], rows)
    return 0
