"""`Sparsifier`: binds a method to weights and an optimizer."""

from sparsetwin.sparsifier._core import PhaseCallback, PhaseEvent, Sparsifier
from sparsetwin.sparsifier._state import cut_like
from sparsetwin.sparsifier._whole import WholeView, gathered, whole_view

__all__ = ["PhaseCallback", "PhaseEvent", "Sparsifier", "WholeView", "cut_like", "gathered", "whole_view"]
