"""``python -m sparsetwin``: the command line, also for ``torchrun -m sparsetwin``."""

import os
import sys

from sparsetwin.cli.__main__ import main

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # gloo's threads live on where meshes still hold their group, and abort a process that has succeeded if they
        # release a tensor while the interpreter ends (pytorch/pytorch#190489); all files are closed by now
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
