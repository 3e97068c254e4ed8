"""The table of commands; their modules are imported when they run."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command: a module with a function ``main(arguments) -> exit code``."""

    module: str
    summary: str

    def load(self) -> Callable[[Sequence[str]], int]:
        """Import the command's module and return its main function."""
        main: Callable[[Sequence[str]], int] = importlib.import_module(f"sparsetwin.cli.{self.module}").main
        return main


COMMANDS: dict[str, Command] = {
    "train": Command("train", "train a dense network and its sparse twin from a recipe"),
    "resume": Command("resume", "continue a stopped run from its last checkpoint"),
    "compare": Command("compare", "train methods, sparsities and seeds side by side and write one table"),
    "eval": Command("evaluation", "evaluate a half of a pair on the test set"),
    "schedule": Command("schedule", "print phases and FLOPs before anything is trained"),
    "export": Command("export", "write a half for another engine or in another file format"),
    "bench": Command("bench", "time a half on every engine that is installed"),
    "report": Command("report", "write one HTML page about one or more runs"),
    "recipes": Command("recipes", "list the recipes"),
    "methods": Command("methods", "list the sparse-training methods"),
    "doctor": Command("doctor", "show what this machine can do"),
}
