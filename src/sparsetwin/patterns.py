"""Which weights live and die together: pure descriptions; `sparsetwin.selection` turns them into masks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unstructured:
    """Every weight by itself."""


Pattern = Unstructured
