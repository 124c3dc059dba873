"""The only module that calls transformers on a folder: no code in it runs, no pickle is read, nothing is fetched."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.model.checkpoint import gguf_file
from nbl_export.trust.model_settings import check_checkpoint, check_settings

__all__ = ["check_weights", "config_of", "model_of", "model_with", "quiet_transformers", "reason_of", "tokenizer_of"]


def quiet_transformers() -> None:
    """Turn off progress bars and advice of transformers; the stages report progress themselves."""
    os.environ["TQDM_DISABLE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError("transformers", "export", "reading a checkpoint") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def reason_of(error: Exception) -> str:
    """A library's message on one line, unless the message refers to a report that is not shown."""
    if "ignore_mismatched_sizes" in str(error):
        return "weights do not have the shapes that config.json states; fetch the model again"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _check(directory: Path, gguf: str | None) -> dict[str, Any]:
    """Refuse an unsafe folder. Returns the argument that names a GGUF file to transformers."""
    quiet_transformers()
    if gguf is None:
        check_checkpoint(directory)
        return {}
    check_settings(directory)
    return {"gguf_file": gguf}


def _reading(gguf: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if gguf is None else gguf_file.shared()


def config_of(directory: Path, gguf: str | None = None) -> Any:
    """The configuration of a checkpoint, or of a GGUF in a folder.

    Raises:
        NblError: the folder is unsafe. Whatever transformers raises on a damaged folder.
    """
    given = _check(directory, gguf)
    from transformers import AutoConfig

    with _reading(gguf):
        return AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True, **given)


def check_weights(directory: Path, gguf: str | None = None) -> None:
    """Compare names and shapes of the weights that the configuration asks for with those in the files.

    The model is built on torch's meta device, so no weight is allocated and none is read. Weights of a quantised
    checkpoint have other names; they are left to their reader.

    Raises:
        NblError: the folder is unsafe, or lacks a weight. Whatever transformers raises on a damaged folder or on
            another shape.
    """
    config = config_of(directory, gguf)
    if getattr(config, "quantization_config", None) is not None and gguf is None:
        return
    if gguf is None:
        _load(directory, device_map="meta")  # the names are matched as in a real load
    else:
        _check_gguf(directory / gguf, config)


def model_of(directory: Path, gguf: str | None = None) -> Any:
    """The model in float32.

    Raises:
        NblError: the folder is unsafe or quantised, or lacks a weight. Whatever transformers raises on a damaged
            folder.
    """
    given = _check(directory, gguf)
    if gguf is None and getattr(config_of(directory), "quantization_config", None) is not None:
        raise NblError(f"{directory} is quantised; give the original as --model, this one as --quantized-model")
    check_weights(directory, gguf)
    with _reading(gguf):
        return _load(directory, **given)


def _load(directory: Path, **given: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=torch.float32, output_loading_info=True, trust_remote_code=False,
        use_safetensors=True, local_files_only=True, **given,
    )  # fmt: skip
    _refuse_missing(directory, report["missing_keys"])
    return model


def _refuse_missing(where: Path, missing: Iterable[str]) -> None:
    names = sorted(missing)
    if names:
        raise NblError(f"{where} lacks the weights {names[0]} and {len(names) - 1} more; fetch the model again")


def _check_gguf(file: Path, config: Any) -> None:
    """Compare a model's parameters with the tensors of a GGUF file, by transformers' map of their names."""
    import torch
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    with torch.device("meta"):
        model = model_with(config)
    with gguf_file.shared():
        names = get_gguf_hf_weights_map(model, TensorProcessor())
    shapes = {
        names[tensor.name]: tuple(int(n) for n in reversed(tensor.shape))
        for tensor in gguf_file.reader(file).tensors
        if tensor.name in names
    }
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}  # a tied one once
    _refuse_missing(file, parameters.keys() - shapes.keys())
    other = [name for name, shape in parameters.items() if shapes[name] != shape]
    if other:
        found, stated = list(shapes[other[0]]), list(parameters[other[0]])
        raise NblError(f"{file} has {other[0]} in shape {found}, and its keys state {stated}; fetch the model again")


def model_with(config: Any, *, lm_head: bool = True) -> Any:
    """A float32 model of a configuration, with the weights of no checkpoint."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if lm_head else AutoModel
    return kind.from_config(config, dtype=torch.float32, trust_remote_code=False)


def tokenizer_of(directory: Path, gguf: str | None = None) -> Any:
    """The tokenizer of a checkpoint, or of a GGUF in a folder.

    Raises:
        NblError: the folder is unsafe. Whatever transformers raises on a damaged folder.
    """
    given = _check(directory, gguf)
    from transformers import AutoTokenizer

    with _reading(gguf):
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True, **given)
