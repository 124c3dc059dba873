"""The only module that calls transformers on a folder: no code in it runs, no pickle is read, nothing is fetched."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.model.checkpoint import gguf_file
from nbl_export.trust.model_settings import check_checkpoint, check_settings

__all__ = ["config_of", "model_of", "model_with", "quiet_transformers", "tokenizer_of"]


def quiet_transformers() -> None:
    """Turn off progress bars and advice of transformers; the stages report progress themselves."""
    os.environ["TQDM_DISABLE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError("transformers", "export", "reading a checkpoint") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


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


def model_of(directory: Path, gguf: str | None = None) -> tuple[Any, dict[str, Any]]:
    """The model in float32, and transformers' report on its loading.

    Raises:
        NblError: the folder is unsafe or quantised. Whatever transformers raises on a damaged folder.
    """
    given = _check(directory, gguf)
    import torch
    from transformers import AutoModelForCausalLM

    if gguf is None and getattr(config_of(directory), "quantization_config", None) is not None:
        raise NblError(f"{directory} is quantised; give the original as --model, this one as --quantized-model")
    with _reading(gguf):
        model, report = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=torch.float32, output_loading_info=True, trust_remote_code=False,
            use_safetensors=True, local_files_only=True, **given,
        )  # fmt: skip
    return model, report


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
