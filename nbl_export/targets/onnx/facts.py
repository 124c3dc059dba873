"""Sizes of a GenAI directory, and the provider that it asks for."""

from __future__ import annotations

import json
from pathlib import Path

from nbl_export.errors import CorruptError, NblError
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE
from nbl_export.graph.sizes import read_graph_facts
from nbl_export.targets.base import DecoderFacts
from nbl_export.targets.onnx.settings import GenaiSettings
from nbl_export.targets.providers import PROVIDERS

__all__ = ["provider_of", "read_facts"]


def read_facts(directory: Path) -> DecoderFacts:
    """Sizes from genai_config.json and the graph; no weights are read.

    Raises:
        NblError: the directory proposes tokens, or genai_config.json lacks a size. CorruptError: a file is damaged.
    """
    settings = GenaiSettings.read(directory)
    if settings.lossless:
        raise NblError(
            f"{directory} proposes tokens, so single steps say nothing: measure with nbl-export bench RUN --lossless"
        )
    if settings.head_dim is None:
        raise CorruptError(f"{directory / GENAI_CONFIG} gives no head_size; export the model again")
    graph = read_graph_facts(directory / GRAPH_FILE, settings.head_dim)
    return DecoderFacts(
        settings.vocab_size, settings.context_length, settings.head_dim, graph.cache_bytes_per_token, graph.parameters
    )


def provider_of(directory: Path) -> str:
    """The flag of the provider that a GenAI directory asks for; "cpu" if it asks for no provider in `PROVIDERS`."""
    try:
        settings = json.loads((directory / GENAI_CONFIG).read_text(encoding="utf-8"))
        named = settings["model"]["decoder"]["session_options"]["provider_options"]
        asked = {name for entry in named for name in entry}
    except (OSError, ValueError, KeyError, TypeError):
        return "cpu"  # opening the directory reports the error
    return next((flag for flag, provider in PROVIDERS.items() if provider.genai in asked), "cpu")
