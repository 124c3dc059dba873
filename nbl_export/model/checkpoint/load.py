"""Torch model, tokenizer and sizes of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.graph import given
from nbl_export.model.architectures import LINEARIZED, windows_of
from nbl_export.model.checkpoint.pretrained import (
    check_weights,
    config_of,
    model_of,
    quiet_transformers,
    reason_of,
    tokenizer_of,
)
from nbl_export.model.checkpoint.source import Source, _check_architecture
from nbl_export.records.decoder import DecoderSpec

__all__ = ["load_model", "load_tokenizer", "read_spec"]


def read_spec(source: Source) -> DecoderSpec:
    """The decoder's sizes, read by optimum's normalized configs.

    Raises:
        NblError: the model is no decoder of a supported architecture, or its configuration contradicts itself.
    """
    if source.graph is not None:
        return given.read_spec(source.graph)
    quiet_transformers()
    from optimum.utils import NormalizedTextConfigWithGQA

    _register(source)
    try:
        config = config_of(source.gguf or source.directory)
        architecture = config.model_type.removeprefix(LINEARIZED if source.linearized else "")
        _check_architecture(architecture, source.directory)
        check_weights(source.gguf or source.directory)
        normal = NormalizedTextConfigWithGQA(config)
        head_dim = getattr(config, "head_dim", None) or normal.hidden_size // normal.num_attention_heads
        windows = windows_of(config)
        return DecoderSpec(
            architecture=architecture,
            num_layers=normal.num_layers,
            hidden_size=normal.hidden_size,
            num_heads=normal.num_attention_heads,
            num_kv_heads=normal.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=normal.vocab_size,
            max_positions=config.max_position_embeddings,
            sliding_window=next(filter(None, windows), None),
            full_layers=tuple(i for i, window in enumerate(windows) if window is None) if any(windows) else (),
        )
    except NblError:
        raise
    except Exception as error:  # transformers raises many kinds on a damaged configuration
        raise NblError(f"{source.name} has no usable decoder configuration: {reason_of(error)}") from error


def _register(source: Source) -> None:
    """Register the classes of an NBL checkpoint with transformers."""
    if source.linearized is not None:
        import nbl_export.model.saved.hf_classes  # noqa: F401


def load_model(directory: Path) -> Any:
    """The torch model in float32, in evaluation mode, on the CPU.

    Raises:
        NblError: transformers cannot load the model.
    """
    try:
        return model_of(directory).eval()
    except (MemoryError, NblError):
        raise
    except Exception as error:
        raise NblError(f"{directory} cannot be loaded by transformers: {reason_of(error)}") from error


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a checkpoint directory.

    Raises:
        NblError: the directory has no tokenizer that transformers can load.
    """
    try:
        return tokenizer_of(directory)
    except NblError:
        raise
    except Exception as error:
        raise NblError(f"{directory} has no usable tokenizer: {error}") from error
