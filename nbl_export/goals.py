"""What may be asked of a plan together, read and refused before any work."""

from __future__ import annotations

from nbl_export.errors import NblError, UsageError
from nbl_export.records import DecoderSpec, JobOptions

__all__ = ["check_request", "check_size", "read_rank"]


def check_request(options: JobOptions) -> None:
    """Refuse options that contradict each other, whatever the model.

    Raises:
        UsageError: which, and what to do.
    """
    if options.method == "wo-wv" and options.tap != "normed":
        raise UsageError("--method wo-wv is attention on a layer's normed input; add --tap normed")
    if options.method != "nbl" and options.fit == "distilled":
        raise UsageError(f"--fit distilled trains fitted maps, --method {options.method} has none; leave out one")
    rank = read_rank(options.rank)
    if rank is not None and (options.method != "nbl" or options.fit == "distilled"):
        other = "--fit distilled" if options.method == "nbl" else f"--method {options.method}"
        raise UsageError(f"--rank is for maps fitted in closed form; leave out --rank or {other}")


def check_size(options: JobOptions, spec: DecoderSpec) -> None:
    """Hold what is asked against the decoder.

    Raises:
        NblError: a rank beyond the hidden size.
    """
    rank = read_rank(options.rank)
    if isinstance(rank, int) and rank > spec.hidden_size:
        raise NblError(f"--rank {rank} is beyond the model's hidden size of {spec.hidden_size}")


def read_rank(text: str | None) -> int | str | None:
    """Read `--rank`: a number, "auto", or None for full maps.

    Raises:
        UsageError: it is neither.
    """
    if text is None or text == "auto":
        return text
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise UsageError(f"--rank {text!r} is neither a number from 1 on nor auto")
    return int(text)
