"""The settings of genai_config.json that a folder may give ONNX Runtime GenAI; others are refused before GenAI runs.

    model, search, ...   numbers and token ids under any key, words under the keys of `_WORDS`
    inputs, outputs      names
    session_options      numbers and words under the keys of `_KEYS`; provider_options: the same for each provider

GenAI passes every other session key on to ONNX Runtime. Some of these keys load libraries (custom_ops_library), write
files (enable_profiling, session.optimized_model_filepath) or read folders. Some provider options are paths or addresses
in memory. A pipeline or an encoder would bring session options of their own.
The allowed keys are from src/config.cpp of GenAI 0.18, as far as its builder and mobius write them for a text decoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.files import read_json
from nbl_export.graph.names import GENAI_CONFIG
from nbl_export.trust.contained import check_inside
from nbl_export.trust.model_settings import read_object, read_text

__all__ = ["GENAI_CONFIG", "check_genai_config", "providers_of", "read_genai_config"]

_MOST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][\w. %/:-]*")
_WORD = re.compile(r"[\w,.+-]{0,200}")  # names neither a file nor a folder
_WORDS = {
    "model.type": _WORD,
    "model.decoder.filename": re.compile(r"[A-Za-z0-9_][\w.-]*\.onnx"),
    "model.decoder.sliding_window.alignment": _WORD,
}
_NUMBERS = ("model", "model.decoder", "model.decoder.sliding_window", "search", "speculative")
_NAMES = ("model.decoder.inputs", "model.decoder.outputs")
_SESSION = "model.decoder.session_options"
_PROVIDERS = f"{_SESSION}.provider_options"
_KEYS = {
    _SESSION: {
        "intra_op_num_threads", "inter_op_num_threads", "log_severity_level", "log_verbosity_level", "log_id",
        "enable_cpu_mem_arena", "enable_mem_pattern", "graph_optimization_level", "ep.cuda.fpa_intb_gemm",
        "mlas.enable_gemm_fastmath_arm64_bfloat16", "optimization.disable_specified_optimizers",
        "session.disable_prepacking", "session.dynamic_block_base", "session.force_spinning_stop",
        "session.inter_op.allow_spinning", "session.intra_op.allow_spinning", "session.set_denormal_as_zero",
        "session.qdq_matmulnbits_accuracy_level", "session.use_device_allocator_for_initializers",
        "session.use_env_allocators", "session.x64quantprecision",
    },
    _PROVIDERS: set(),
    f"{_PROVIDERS}.cpu": set(),
    f"{_PROVIDERS}.cuda": {
        "device_id", "enable_cuda_graph", "enable_skip_layer_norm_strict_mode", "gpu_mem_limit",
        "arena_extend_strategy", "cudnn_conv_algo_search", "do_copy_in_default_stream", "use_tf32", "prefer_nhwc",
        "sdpa_kernel", "fuse_conv_bias", "use_ep_level_unified_stream",
    },
    f"{_PROVIDERS}.nvtensorrtrtx": {
        "device_id", "enable_cuda_graph", "nv_max_workspace_size", "nv_multi_profile_enable",
    },
    f"{_PROVIDERS}.dml": {"device_id", "enable_graph_capture"},
    f"{_PROVIDERS}.webgpu": {"enableGraphCapture", "validationMode"},
}  # fmt: skip


def read_genai_config(directory: Path) -> dict[str, Any]:
    """Read and check the settings of a folder.

    Raises:
        NblError: the file cannot be read, or has a refused key; the message names the key.
    """
    path = check_inside(directory / GENAI_CONFIG, directory)
    settings = read_object(path, _MOST_BYTES)
    for refused in _refused(settings, ""):
        raise NblError(
            f"{path} sets {refused}, which is refused: a model's folder may not choose libraries, files or devices; "
            "remove the key if you trust the folder"
        )
    if "\\" in read_text(path):
        raise NblError(f"{path} contains a backslash, which JSON parsers read differently; remove it")
    return settings


def check_genai_config(directory: Path) -> None:
    """Check the settings of a folder, if the file exists."""
    if (directory / GENAI_CONFIG).is_file() or (directory / GENAI_CONFIG).is_symlink():
        read_genai_config(directory)


def providers_of(directory: Path) -> set[str]:
    """Names of the execution providers that a folder asks for; none if the file is missing or damaged.

    Raises:
        CorruptError: the file is a link out of the directory.
    """
    check_inside(directory / GENAI_CONFIG, directory)
    try:
        settings = read_json(directory / GENAI_CONFIG)
        named = settings["model"]["decoder"]["session_options"]["provider_options"]
        return {name for entry in named for name in entry}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _refused(settings: Mapping[str, Any], part: str) -> Iterator[str]:
    """Names of settings that are refused, each with the parts that it is in."""
    for key, value in settings.items():
        name = f"{part}.{key if len(key) <= 60 and key.isprintable() else repr(key[:60])}".lstrip(".")
        inner = value if name == _PROVIDERS and isinstance(value, list) else [value]
        is_part = name in (*_NUMBERS, *_NAMES) or _place(name) in _KEYS
        if is_part and all(isinstance(mapping, dict) for mapping in inner):
            for mapping in inner:
                yield from _refused(mapping, name)
        elif is_part or not _may_be(value, key, name, part):
            yield name


def _may_be(value: Any, key: str, name: str, part: str) -> bool:
    is_number = isinstance(value, int | float)  # bool is a subclass of int
    if _place(part) in _KEYS:
        return key in _KEYS[_place(part)] and (is_number or _matches(_WORD, value))
    if part in _NAMES:
        return _matches(_NAME, key) and _matches(_NAME, value)
    if name in _WORDS:
        return _matches(_WORDS[name], value)
    if key.endswith("_id") or key == "layers":
        is_number |= value is None or (isinstance(value, list) and all(isinstance(item, int | float) for item in value))
    return part in _NUMBERS and is_number


def _place(part: str) -> str:
    """The part as `_KEYS` has it: GenAI compares names of providers without case."""
    return part.lower() if part.startswith(_PROVIDERS) else part


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
