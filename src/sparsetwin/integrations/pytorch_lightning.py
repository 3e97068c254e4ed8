"""Lightning under its older name (``import pytorch_lightning``); see `sparsetwin.integrations.lightning`."""

from pytorch_lightning import Callback

from sparsetwin.integrations._lightning_hooks import SparsifierHooks


class SparsifierCallback(SparsifierHooks, Callback):  # type: ignore[misc]
    """Train dense and sparse halves in turn; `SparsifierHooks` has the arguments and what happens when."""
