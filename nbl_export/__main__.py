"""`python -m nbl_export` is `nbl-export`."""

import contextlib
import os
import sys

from nbl_export.cli import main
from nbl_export.cli_exit import INTERRUPTED

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        # CPython (Modules/main.c, Python/pythonrun.c) ends `python -m` by SIGINT, whatever its status, where a
        # KeyboardInterrupt has left code made of a string, as importing dataclasses runs it: so end without it.
        if end.code == INTERRUPTED:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # nobody reads it any more
                    stream.flush()
            os._exit(INTERRUPTED)
        raise
