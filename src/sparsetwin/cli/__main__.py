"""The command line: ``sparsetwin COMMAND``."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from sparsetwin.cli.commands import COMMANDS
from sparsetwin.errors import ConfigError, SparsetwinError, nearest

USAGE_ERROR = 2
FAILURE = 1
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        The exit code: 0, 1 for a failure with a message, 2 for a wrong call, 130 after an interrupt.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if given[0] == "--version":
        from sparsetwin import __version__

        print(__version__)
        return 0
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        return _main_of(given[0])(given[1:])
    except ConfigError as error:
        _tell(error)
        return USAGE_ERROR
    except SparsetwinError as error:
        _tell(error)
        return FAILURE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


def _tell(error: SparsetwinError) -> None:
    """Print the message; of several processes that torchrun started, all but the first say which they are."""
    rank = os.environ.get("RANK", "0")
    print(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}", file=sys.stderr)


def _main_of(name: str) -> Callable[[Sequence[str]], int]:
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}; known: {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    return COMMANDS[name].load()


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sparsetwin COMMAND ...",
            "",
            "Train once, ship twins: a dense network and its sparse twin out of one run.",
            "",
            *lines,
            "",
            "sparsetwin COMMAND --help tells more. To begin with: sparsetwin train",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
