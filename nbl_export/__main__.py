"""`python -m nbl_export` is `nbl-export`."""

from nbl_export.cli import main

if __name__ == "__main__":
    try:
        main()
    finally:
        # CPython (Modules/main.c, Python/pythonrun.c) ends `python -m` by SIGINT, whatever its status, where a
        # KeyboardInterrupt has left an exec() of a string, as importing dataclasses does; the next one forgets it.
        exec("")
