"""Lightning (``import lightning``): a callback that trains a pair, resumes, and saves both halves.

::

    callback = SparsifierCallback(PhaseLengths(sparsity=0.8, unit="fractions", ...), pair="runs/pair")
    Trainer(callbacks=[callback]).fit(model, loader)

With ``import pytorch_lightning``, use `sparsetwin.integrations.pytorch_lightning` instead: the two packages have
classes of their own.
"""

from lightning.pytorch import Callback

from sparsetwin.integrations._lightning_hooks import SparsifierHooks


class SparsifierCallback(SparsifierHooks, Callback):  # type: ignore[misc]
    """Train dense and sparse halves in turn; `SparsifierHooks` has the arguments and what happens when."""
