"""What may be asked of a plan together, read and refused before any work."""

from __future__ import annotations

from nbl_export.errors import UsageError
from nbl_export.records import JobOptions

__all__ = ["check_request"]


def check_request(options: JobOptions) -> None:
    """Refuse options that contradict each other, whatever the model.

    Raises:
        UsageError: which, and what to do.
    """
    if options.method == "wo-wv" and options.tap != "normed":
        raise UsageError("--method wo-wv is attention on a layer's normed input; add --tap normed")
    if options.method != "nbl" and options.fit == "distilled":
        raise UsageError(f"--fit distilled trains fitted maps, --method {options.method} has none; leave out one")
