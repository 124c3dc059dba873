"""lm-evaluation-harness' own command line, with the model nbl-onnx registered.

Versions of the harness after 0.4.13 find the model through package entry points and do not need this module.
"""

from __future__ import annotations

import sys

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.trust.terminal import visible

__all__ = ["main"]


def main() -> None:
    """Run the command line. An error that the user can correct prints one line."""
    try:
        try:
            from lm_eval.__main__ import cli_evaluate

            import nbl_export.evaluation.lm  # noqa: F401  registers the model
        except ImportError as error:
            raise MissingPackageError("lm_eval", "eval", "evaluation") from error
        cli_evaluate()
    except NblError as error:
        sys.exit(visible(f"nbl-export: {error}"))


if __name__ == "__main__":
    main()
