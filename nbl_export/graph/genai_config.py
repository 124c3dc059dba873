"""The settings of genai_config.json that a folder may give ONNX Runtime GenAI; others are refused before GenAI runs.

    model      numbers and token ids of the decoder, names of its graph, inputs and outputs
    session    threads, memory, logging, provider_options of `_PROVIDERS`, keys of `_ENTRIES`
    search     how a text is continued
    speculative  how tokens are proposed from the text so far (`targets.onnx.ngram`)

GenAI passes every other session key on to ONNX Runtime. Some of these keys load libraries (custom_ops_library), write
files (enable_profiling, session.optimized_model_filepath) or read folders. Some provider options are paths or addresses
in memory. A pipeline or an encoder would bring session options of their own.
The allowed keys are from src/config.cpp of GenAI 0.18, as far as its builder and mobius write them for a text decoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.graph.names import GENAI_CONFIG
from nbl_export.trust.contained import check_inside
from nbl_export.trust.model_settings import read_object

__all__ = ["GENAI_CONFIG", "check_genai_config", "read_genai_config"]

_MOST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][\w. %/:-]*")
_GRAPH = re.compile(r"[A-Za-z0-9_][\w.-]*\.onnx")
Rule = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float)  # bool is a subclass of int


def _name(value: Any) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _plain(value: Any) -> bool:
    """A number, or a word that names neither a file nor a folder."""
    return _number(value) or (isinstance(value, str) and re.fullmatch(r"[\w,.+-]{0,200}", value) is not None)


def _ids(value: Any) -> bool:
    return value is None or _number(value) or (isinstance(value, list) and all(map(_number, value)))


def _graph(value: Any) -> bool:
    return isinstance(value, str) and _GRAPH.fullmatch(value) is not None


def _names(value: Any) -> bool:
    return isinstance(value, dict) and all(_name(k) and _name(v) for k, v in value.items())


_PROVIDERS: Mapping[str, frozenset[str]] = {
    "cpu": frozenset(),
    "cuda": frozenset({"device_id", "enable_cuda_graph", "enable_skip_layer_norm_strict_mode", "gpu_mem_limit",
                       "arena_extend_strategy", "cudnn_conv_algo_search", "do_copy_in_default_stream", "use_tf32",
                       "prefer_nhwc", "sdpa_kernel", "fuse_conv_bias", "use_ep_level_unified_stream"}),
    "NvTensorRtRtx": frozenset({"device_id", "enable_cuda_graph", "nv_max_workspace_size", "nv_multi_profile_enable"}),
    "dml": frozenset({"device_id", "enable_graph_capture"}),
    "webgpu": frozenset({"enableGraphCapture", "validationMode"}),
}  # fmt: skip
_ENTRIES = frozenset({
    "ep.cuda.fpa_intb_gemm", "mlas.enable_gemm_fastmath_arm64_bfloat16", "optimization.disable_specified_optimizers",
    "session.disable_prepacking", "session.dynamic_block_base", "session.force_spinning_stop",
    "session.inter_op.allow_spinning", "session.intra_op.allow_spinning", "session.qdq_matmulnbits_accuracy_level",
    "session.set_denormal_as_zero", "session.use_device_allocator_for_initializers", "session.use_env_allocators",
})  # fmt: skip


def _providers(value: Any) -> bool:
    """Check a list of {provider: {option: word}}; `_Refused` names the key that is refused."""
    if not isinstance(value, list):
        return False
    for entry in value:
        if not isinstance(entry, dict):
            return False
        for provider, options in entry.items():
            known = {name.lower(): allowed for name, allowed in _PROVIDERS.items()}.get(provider.lower())
            if known is None or not isinstance(options, dict):
                raise _Refused(_shown(provider), "provider_options")
            for option, said in options.items():
                if option not in known or not _plain(said):
                    raise _Refused(_shown(option), f"provider_options.{provider}")
    return True


class _Refused(Exception):
    def __init__(self, key: str, where: str) -> None:
        super().__init__(f"{where}.{key}" if where else key)


def _all(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


_SESSION: dict[str, Any] = {
    **_all(_number, "intra_op_num_threads", "inter_op_num_threads", "log_severity_level", "log_verbosity_level",
           "enable_cpu_mem_arena", "enable_mem_pattern"),
    **_all(_plain, "log_id", "graph_optimization_level", *_ENTRIES),
    "provider_options": _providers,
}  # fmt: skip
_DECODER: dict[str, Any] = {
    **_all(_number, "head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"),
    **_all(_names, "inputs", "outputs"),
    "filename": _graph,
    "session_options": _SESSION,
    "sliding_window": {
        **_all(_number, "window_size", "pad_value", "cache_slack", "slide_key_value_cache", "slide_inputs"),
        **_all(_plain, "alignment"),
        **_all(_ids, "layers"),
    },
}
_SETTINGS: dict[str, Any] = {
    "model": {
        **_all(_number, "context_length", "vocab_size"),
        **_all(_ids, "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
               "bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id", "image_token_id"),
        "type": _plain,
        "decoder": _DECODER,
    },
    "speculative": _all(
        _number, "cooldown", "max_draft_tokens", "min_adaptive_k", "ngram_chained_lookup", "ngram_size"
    ),
    "search": _all(
        _number, "batch_size", "chunk_size", "diversity_penalty", "do_sample", "early_stopping", "length_penalty",
        "max_length", "min_length", "no_repeat_ngram_size", "num_beams", "num_return_sequences",
        "past_present_share_buffer", "random_seed", "repetition_penalty", "temperature", "top_k", "top_p",
    ),
}  # fmt: skip


def read_genai_config(directory: Path) -> dict[str, Any]:
    """Read and check the settings of a folder.

    Raises:
        NblError: the file cannot be read, or has a refused key; the message names the key.
    """
    path = check_inside(directory / GENAI_CONFIG, directory)
    settings = read_object(path, _MOST_BYTES)
    try:
        _hold(settings, _SETTINGS, "")
    except _Refused as refused:
        raise NblError(
            f"{path} sets {refused}, which is refused: a model's folder may not choose libraries, files or devices; "
            "remove the key if you trust the folder"
        ) from refused
    if "\\" in path.read_text(encoding="utf-8"):
        raise NblError(f"{path} contains a backslash, which JSON parsers read differently; remove it")
    return settings


def check_genai_config(directory: Path) -> None:
    """Check the settings of a folder, if the file exists."""
    if (directory / GENAI_CONFIG).is_file() or (directory / GENAI_CONFIG).is_symlink():
        read_genai_config(directory)


def _hold(settings: dict[str, Any], rules: Mapping[str, Any], where: str) -> None:
    for key, value in settings.items():
        rule = rules.get(key)
        if isinstance(rule, dict) and isinstance(value, dict):
            _hold(value, rule, f"{where}.{key}".lstrip("."))
        elif not callable(rule) or not _rule_holds(rule, value, where):
            raise _Refused(_shown(key), where)


def _rule_holds(rule: Rule, value: Any, where: str) -> bool:
    try:
        return rule(value)
    except _Refused as refused:
        raise _Refused(str(refused), where) from refused


def _shown(key: str) -> str:
    return key if len(key) <= 60 and key.isprintable() else repr(key[:60])
