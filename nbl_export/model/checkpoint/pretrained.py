"""The only module that calls transformers on a model: none of its code runs, no pickle is read, nothing is fetched.

A model is a checkpoint directory or a GGUF file. What lies beside a GGUF file does not belong to the model.
transformers would read settings and templates there, so it gets an empty directory and the file's absolute path.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.model.checkpoint import gguf_file
from nbl_export.trust.model_settings import check_checkpoint

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


@contextlib.contextmanager
def _checked(model: Path) -> Iterator[dict[str, Any]]:
    """Arguments with which transformers finds a model and nothing else. Refuses an unsafe folder."""
    quiet_transformers()
    given = {"trust_remote_code": False, "local_files_only": True}
    if not model.is_file():
        check_checkpoint(model)
        yield {"pretrained_model_name_or_path": str(model), **given}
        return
    with tempfile.TemporaryDirectory(prefix="nbl-export-") as empty, gguf_file.shared():
        yield {"pretrained_model_name_or_path": empty, "gguf_file": str(model.absolute()), **given}


def config_of(model: Path) -> Any:
    """The configuration of a checkpoint or of a GGUF file.

    Raises:
        NblError: the folder is unsafe. Whatever transformers raises on a damaged model.
    """
    with _checked(model) as given:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(**given)


def model_of(model: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float32, and transformers' report on its loading.

    Raises:
        NblError: the folder is unsafe or quantised. Whatever transformers raises on a damaged model.
    """
    with _checked(model) as given:
        import torch
        from transformers import AutoModelForCausalLM

        if model.is_dir() and getattr(config_of(model), "quantization_config", None) is not None:
            raise NblError(f"{model} is quantised; give the original as --model, this one as --quantized-model")
        loaded, report = AutoModelForCausalLM.from_pretrained(
            dtype=torch.float32, output_loading_info=True, use_safetensors=True, **given
        )
    return loaded, report


def model_with(config: Any, *, lm_head: bool = True) -> Any:
    """A float32 model of a configuration, with the weights of no checkpoint."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    kind = AutoModelForCausalLM if lm_head else AutoModel
    return kind.from_config(config, dtype=torch.float32, trust_remote_code=False)


def tokenizer_of(model: Path) -> Any:
    """The tokenizer of a checkpoint or of a GGUF file.

    Raises:
        NblError: the folder is unsafe. Whatever transformers raises on a damaged model.
    """
    with _checked(model) as given:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**given)
