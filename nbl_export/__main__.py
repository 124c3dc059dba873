"""`python -m nbl_export` is `nbl-export`."""

from nbl_export.cli import main

if __name__ == "__main__":
    main()
