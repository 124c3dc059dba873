"""What the JSON files of a run hold: names, and the kinds of their values. `from_json.check_shape` reads this notation.

A list has any number of such values. {str: shape} has names of any kind. "name?" may be missing or null. Files may hold
more than their shapes say: no stage reads that.
"""

from __future__ import annotations

from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import LayerScore

__all__ = ["BENCHMARK", "EVALUATION", "MANIFEST", "VERIFICATION"]

_ENDS = tuple[float, float] | None
_LONG_RANGE = {
    "text": str, "tokens": int, "windows": int, "perplexity_original": float | None, "perplexity_nbl": float | None,
    "lost": float | None, "lost_interval": _ENDS, "looks?": [int],
}  # fmt: skip
_STEP = {
    "layers": int, "within": bool, "retrieval?": [{
        "text": str, "tokens": int, "windows": int, "lost": float | None, "lost_interval": _ENDS, "judged": bool,
        "perplexity_original?": float, "perplexity_nbl?": float,
    }],
}  # of a choice, one tested candidate  # fmt: skip
_TEXT = {"name": str, "sha256": str}
_SIZES = {"tokens": int, "context": int}
_POINT = {
    "layers": int, "replaced_layers": [int], "increases": [float], "prefill": float, "decode": float,
    "recent_tokens?": int,
}  # fmt: skip
_ENGINE = {
    "engine": str, "version": str, "precision": str, "attention": str, "compute_capabilities": [str], "max_batch": int,
    "max_seq_len": int, "prefill_chunk": int, "cache_layers": int, "cache_bytes_per_token": int, "cache_bytes": int,
    "plan_bytes": int, "build_seconds": float, "profiles": [{"tokens": [int]}],
}  # fmt: skip

MANIFEST = {
    "schema": int, "status": str, "command": str, "sources": list, "num_layers?": int,
    "stages": {str: {"key": str, "seconds": float, "files": {str: str}}},
    "model": {"name": str, "fingerprint": str, "title?": str, "revision?": str, "architecture?": str},
    "decoder": DecoderSpec,
    "options": {"model": str, "engine": str, "precision": str},
    "places?": {"model?": str, "calibration?": [str]},
    "text?": {**_TEXT, **_SIZES, "second": str, "parts": {str: str}, "mix": [_TEXT]},
    "calibration?": {**_TEXT, "tokens?": int, "context?": int, "parts?": [_TEXT], "device?": str, "products?": str},
    "sums?": {"method": str, "collected": {"exits?": [int]}},
    "quantized?": {
        "name": str, "title": str, "fingerprint": str, "place?": str, "method": str | None, "group_size": int | None,
    },
    "torch_device?": str, "logits?": str, "tap?": str, "select?": str, "fit?": {"kind": str},
    "scores?": [LayerScore], "replaced_layers?": [int], "kinds?": [str], "exit?": {"layer": int, "recent_tokens": int},
    "goal?": {"max_perplexity_increase?": str, "default?": bool, "path?": [_STEP], "order?": [int], "share?": float},
    "curve?": {"texts": [str], "tokens": int, "points": [_POINT], "engine?": str, "precision?": str},
    "engines?": {"original": _ENGINE, "nbl": _ENGINE},
    "card?": {"sha256": str},
    "versions?": {str: str},
}  # fmt: skip

VERIFICATION = {
    "passed": bool, "status": str, "precision": str,
    "checks": [{
        "check": str, "subject": str, "metric": str, "value": float | None, "tolerance": float | None, "passed": bool,
        "detail": str,
    }],
    "quality_loss": [{
        "text": str, "tokens": int, "windows": int, "perplexity_original": float | None,
        "perplexity_nbl": float | None, "increase": float | None, "increase_interval": _ENDS, "kl_mean": float | None,
        "kl_interval": _ENDS, "top1_agreement": float | None, "top1_interval": _ENDS, "prompt?": int,
        "looks?": [int],
    }],
    "proof": [str], "warnings": [str], "long_range_by_text?": [_LONG_RANGE], "quality_warning?": str,
    "texts": [{"use": str, "text": str, "tokens": int}],
    "cache_bytes_per_token": {"original": int, "nbl": int},
    "answers": [{"prompt": str, "original": str, "nbl": str}],
}  # fmt: skip

_TEST = {"test": str, "kind": str, "tokens": int, "depth": int}

BENCHMARK = {
    "engine": str, "provider": str, "threads?": int, "repetitions?": int, "base?": str, "apart?": bool,
    "background": {
        "cores": int, "others": float | None, "stolen": float, "waits": int, "gave_up": int, "busy": bool,
    },
    "timings": [{
        **_TEST, "variant": str, "samples_ns": [int], "loads": [int], "first_token_ns?": [int], "token_ns?": [[int]],
    }],
    "skipped?": [{**_TEST, "reason": str}],
    "variants": {str: {
        "peak_memory_bytes": int, "kv_cache_bytes": int, "kv_cache_bytes_per_token": int,
        "model_bytes": int,
    }},
    "machine": {"memory_bytes": int, "cpu": str, "cores": int, "os": str, "python": str},
    "versions": {str: str},
    "arithmetic?": {str: str}, "slots?": int,
    "gpu_clocks?": {"runs": int, "slowed_by": {str: int}, "sm_mhz?": [int], "memory_mhz?": [int]},
}  # fmt: skip

_FIGURE = {"value": float | None, "stderr": float | None}

EVALUATION = {
    "lm_eval": str | None,
    "table": [{
        "task": str, "metric": str, "items": int, "higher_is_better": bool, "figures": {str: _FIGURE},
        "differences": [_FIGURE],
    }],
    "length": [{
        "task": str, "items": int, "test": str, "warnings": [str],
        "rows": [{
            "tokens": int, "figures": {str: {"loss": float | None, "correct": float | None}},
            "differences": [{
                "loss": float | None, "loss_interval": _ENDS, "increase": float | None,
                "increase_interval": _ENDS,
            }],
        }],
    }],
}  # fmt: skip
