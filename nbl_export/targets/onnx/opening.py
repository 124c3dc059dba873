"""Opens a directory with ONNX Runtime GenAI: threads, provider and sizes over the directory's own settings.

    genai_config.json ◄─ session options ◄─ sizes of a `SequenceLimits` ◄─ provider ─► og.Model

- A directory's sizes are those of the model: `model.context_length` is often 131072, `search.batch_size` is 1.
- GenAI gives NvTensorRtRtx one profile when the model is opened, of at most `search.batch_size` x
  `model.context_length` (src/nvtensorrtrtx/session_options.cpp). A larger batch is outside of it, and memory is planned
  for the whole context. So a `SequenceLimits` replaces both before `og.Model`.
- A generator is refused if its `max_length` is beyond `model.context_length`. `begin` sets it for every sequence.

Checks a folder before ONNX Runtime GenAI opens it; GenAI then opens nothing that was not checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from nbl_export.errors import NblError, one_line
from nbl_export.graph.genai_config import TAKING_TURNS, read_genai_config
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.graph.trust import check_graph_file
from nbl_export.targets.runners import SequenceLimits
from nbl_export.trust.contained import check_folder

__all__ = ["CPU", "SILENT", "Choice", "open_model"]

Choice = tuple[str, dict[str, str]]  # GenAI's name of a provider, and its options
CPU: Choice = ("cpu", {})
SILENT = 4  # ORT severity "fatal": only the exception raised here reports an error


def open_model(
    og: ModuleType,
    directory: Path,
    threads: int,
    provider: Choice | None,
    limits: SequenceLimits | None,
    draft: Mapping[str, Any] | None = None,
) -> Any:
    """The og.Model of a directory.

    Args:
        og: the imported GenAI.
        provider: None uses the directory's provider.
        room: None leaves the sizes of the directory.
        draft: the block `model.draft` of genai_config.json; None leaves the directory's own.

    Raises:
        NblError: the directory is not a model that loads; the message has the path.
    """
    check_genai_folder(directory)
    try:
        config = og.Config(str(directory))  # checked by `check_genai_folder`
        own = read_genai_config(directory)["model"].get("draft") is not None
        config.overlay(json.dumps(_settings(threads, limits, {} if own and draft is None else draft)))
        if provider is not None:
            _choose_provider(config, *provider)
        return og.Model(config)
    except Exception as error:
        raise NblError(f"{directory} does not load in ONNX Runtime GenAI: {one_line(error)}") from error


def _settings(threads: int, limits: SequenceLimits | None, draft: Mapping[str, Any] | None) -> dict[str, Any]:
    """What replaces settings of genai_config.json. draft: None if there is no draft, which GenAI would open else."""
    session: dict[str, Any] = {"intra_op_num_threads": threads, "log_severity_level": SILENT}
    model: dict[str, Any] = {"decoder": {"session_options": session}}
    if draft is not None:
        session |= TAKING_TURNS
        model["draft"] = {**draft, "session_options": session}
    if limits is None:
        return {"model": model}
    return {"model": {**model, "context_length": limits.tokens}, "search": {"batch_size": limits.batch}}


def _choose_provider(config: Any, name: str, options: dict[str, str]) -> None:
    """Choose a provider; if it is the directory's own, the directory's options stay."""
    if name == CPU[0]:
        config.clear_providers()  # the CPU provider is the fallback and must not be named
    for key, value in options.items():
        config.set_provider_option(name, key, value)


def check_genai_folder(directory: Path) -> None:
    """Check links, settings and graph of a folder.

    Raises:
        NblError: something is refused; the message names the file.
    """
    check_folder(directory)
    model = read_genai_config(directory).get("model", {})
    for decoder in (model.get("decoder", {}), *([model["draft"]] if "draft" in model else [])):
        check_graph_file(directory / decoder.get("filename", GRAPH_FILE))
