"""Train once, ship twins: AC/DC training that ends with a dense network and its sparse twin."""

from sparsetwin import errors, schedules

__version__ = "0.1.0"
__all__ = ["__version__", "errors", "schedules"]
