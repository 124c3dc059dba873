"""`python -m nbl_export` is `nbl-export`."""

import contextlib
import os
import sys

from nbl_export.cli.app import INTERRUPTED, main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        # CPython (Modules/main.c, Python/pythonrun.c) ends `python -m` by SIGINT, whatever its status, if a
        # KeyboardInterrupt has left code made of a string. Importing dataclasses runs such code, so exit directly.
        if end.code == INTERRUPTED:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):  # the reader is gone
                    stream.flush()
            os._exit(INTERRUPTED)
        raise
