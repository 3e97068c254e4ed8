"""Every error that sparsetwin raises on purpose.

::

    SparsetwinError
    ├── ScheduleError      a schedule that cannot be: lengths, sparsity, units        (also a ValueError)
    ├── TargetError        parameters that cannot be pruned as asked                  (also a ValueError)
    ├── SelectionError     scores or budgets from which no mask can be chosen         (also a ValueError)
    ├── UsageError         a call that is missing or out of order                     (also a RuntimeError)
    ├── AgreementError     processes that train together and have come apart          (also a RuntimeError)
    ├── StateError         saved state that does not fit the objects it is loaded in  (also a RuntimeError)
    ├── CheckpointError    a file that is missing, corrupted, truncated or foreign    (also a RuntimeError)
    ├── ExportError        a network or file that cannot be exported as asked         (also a RuntimeError)
    ├── ConfigError        an unknown recipe, model, field or value                   (also a ValueError)
    ├── DataError          a data set that is missing, corrupted or of another shape  (also a RuntimeError)
    └── TrainingError      a run that cannot go on, such as one whose loss is NaN     (also a RuntimeError)

`SparsityWarning` is the one warning of our own: what works, but should be known.
A message says what was given, what is expected and what would work.
"""

import difflib
from collections.abc import Iterable


class SparsetwinError(Exception):
    """Base of all errors of this library."""


class ScheduleError(SparsetwinError, ValueError):
    """A schedule that cannot be."""


class TargetError(SparsetwinError, ValueError):
    """Parameters that cannot be pruned as asked."""


class SelectionError(SparsetwinError, ValueError):
    """Scores or budgets from which no mask can be chosen."""


class UsageError(SparsetwinError, RuntimeError):
    """A call that is missing or out of order."""


class AgreementError(SparsetwinError, RuntimeError):
    """Processes that train together and have come apart."""


class StateError(SparsetwinError, RuntimeError):
    """Saved state that does not fit the objects it is loaded into."""


class CheckpointError(SparsetwinError, RuntimeError):
    """A file that is missing, corrupted, truncated or foreign."""


class ExportError(SparsetwinError, RuntimeError):
    """A network or file that cannot be exported as asked."""


class ConfigError(SparsetwinError, ValueError):
    """An unknown recipe, model, field or value."""


class DataError(SparsetwinError, RuntimeError):
    """A data set that is missing, corrupted or of another shape."""


class TrainingError(SparsetwinError, RuntimeError):
    """A run that cannot go on."""


class SparsityWarning(UserWarning):
    """Something about masks, phases or counts that works, but that the user should know."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``, or ``""`` if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
