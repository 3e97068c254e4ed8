"""Which methods a trainer can run that makes optimizers and learning-rate schedulers by itself."""

from sparsetwin.errors import ConfigError
from sparsetwin.methods import Method


def refuse_unserved(method: Method) -> None:
    """Refuse, before training, a method that such a trainer would train wrongly.

    Args:
        method: Of the run.

    Raises:
        ConfigError: Saying where the method can be used instead.
    """
    name = type(method).__name__
    if type(method).learned is not Method.learned:
        raise ConfigError(
            f"{name} learns parameters of its own, in a new group of the optimizer, for which this trainer's learning "
            "rate scheduler and checkpoints are not made; use `sparsetwin train`, or a loop of your own that makes the "
            "scheduler after the Sparsifier"
        )
    rate_steps, total_steps = method.learning_rate_steps, method.schedule.total_steps
    if rate_steps != total_steps:
        raise ConfigError(
            f"{name} goes back in a learning rate schedule of {rate_steps} steps, but this trainer's own runs once "
            f"through all {total_steps} steps; use `sparsetwin train`, or a loop of your own that sets the learning "
            "rate by method.learning_rate_step(step)"
        )
    if method.needs_closure:
        raise ConfigError(
            f"{name} passes more than once over each batch, but this trainer does one forward and backward pass and "
            "offers no place for another; use `sparsetwin train`, or a loop of your own with "
            "sparsifier.backward(closure)"
        )
