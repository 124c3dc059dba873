"""OpenVINO's own front end: a stateful IR of the torch model, its weights compressed by nncf.

The folder is what OpenVINO GenAI (`LLMPipeline`) and optimum-intel (`OVModelForCausalLM`) load. optimum-intel itself is
not used: optimum-intel 2.2 requires transformers below 5.6 and huggingface-hub below 1.22, which would hold back every
other part of this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from nbl_export.errors import MissingPackageError
from nbl_export.targets.export.finish import add_text_files, captured
from nbl_export.targets.openvino.states import make_stateful
from nbl_export.targets.openvino.trace import convert

__all__ = ["build"]


def build(checkpoint: Path, out: Path, precision: str, mapped: bool = False) -> None:
    """Write openvino_model.xml and .bin, the tokenizer as IR, and the checkpoint's text files to `out`.

    Args:
        mapped: the weights stay in the checkpoint's files, from which nncf takes one matrix after the other.

    Raises:
        NblError: OpenVINO refuses the checkpoint; the message has the reason.
        MissingPackageError: openvino, openvino-tokenizers or nncf is not installed.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("openvino", "openvino", "making an IR") from error
    from nbl_export.model.checkpoint import load
    from nbl_export.targets.openvino.ir.files import save_ir
    from nbl_export.targets.openvino.rewrite import compress

    out.mkdir(parents=True)
    with captured("OpenVINO", checkpoint):
        model = load.load_mapped(checkpoint) if mapped else load.load_model(checkpoint)
        found = convert(model)
        make_stateful(found)
        group = _group(model, precision)
        save_ir(compress(found, precision, group=group), out, precision, group)
        del model, found
    add_text_files(checkpoint, out)
    _convert_tokenizer(checkpoint, out)


def _group(model: Any, precision: str) -> int:

    from nbl_export.targets.openvino.rewrite import group_size

    if precision != "int4":
        return 0
    widths = {m.weight.shape[1] for m in model.get_decoder().modules() if isinstance(m, nn.Linear)}
    return group_size(model.config.hidden_size, tuple(sorted(widths)))


def _convert_tokenizer(checkpoint: Path, out: Path) -> None:
    """Write tokenizer and detokenizer as IRs, for OpenVINO GenAI.

    Raises:
        NblError: openvino-tokenizers does not convert the tokenizer.
    """
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError as error:
        raise MissingPackageError("openvino-tokenizers", "openvino", "converting the tokenizer") from error
    import openvino

    from nbl_export.graph.names import DETOKENIZER_IR, TOKENIZER_IR
    from nbl_export.model.checkpoint import load

    with captured("openvino-tokenizers", checkpoint):
        pair: Any = convert_tokenizer(load.load_tokenizer(checkpoint), with_detokenizer=True)
        for model, name in zip(pair, (TOKENIZER_IR, DETOKENIZER_IR), strict=True):
            openvino.save_model(model, str(out / name), compress_to_fp16=False)
