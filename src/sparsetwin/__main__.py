"""``python -m sparsetwin``: the command line, also for ``torchrun -m sparsetwin``."""

import sys

from sparsetwin.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
