"""`Sparsifier`: binds a method to weights and an optimizer."""

from sparsetwin.sparsifier._core import PhaseCallback, PhaseEvent, Sparsifier

__all__ = ["PhaseCallback", "PhaseEvent", "Sparsifier"]
