"""Sources of decoder graphs: a checkpoint in, one file a source.

genai and mobius leave a GenAI model directory (model.onnx), static a decoder.onnx for a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nbl_export.decoders import genai, mobius
from nbl_export.decoders.directory import finish_directory

__all__ = ["PRECISIONS", "SOURCES", "build_decoder"]

SOURCES: dict[str, Callable[[Path, Path, str], None]] = {"genai": genai.build, "mobius": mobius.build}
PRECISIONS = {
    "genai": genai.PRECISIONS,
    "mobius": mobius.PRECISIONS,
    "static": ("fp32", "fp16", "bf16", "int4"),  # stated here: the module needs onnx_ir, which a build machine has not
}


def build_decoder(
    source: str,
    checkpoint: Path,
    out: Path,
    precision: str,
    *,
    slots: int = 0,
    provider: str = "cpu",
    options: Sequence[str] = (),
    codes: Path | None = None,
) -> None:
    """Export a checkpoint directory to a deployable directory with the named source.

    Args:
        slots: of a cache, for the static source alone.
        provider: ONNX Runtime's execution provider; other than "cpu" for the GenAI source alone.
        options: KEY=VALUE of `genai.OPTIONS`, for the GenAI source alone.
        codes: a quantised checkpoint of the same model, for the GenAI source alone.

    Raises:
        NblError: the source refuses the checkpoint or the precision, with its reason.
    """
    if source == "static":
        from nbl_export.decoders import static

        static.build(checkpoint, out, precision, max_seq_len=slots)
        return
    if source == "genai":
        genai.build(checkpoint, out, precision, provider, options, codes)
    else:
        SOURCES[source](checkpoint, out, precision)
    finish_directory(checkpoint, out)
