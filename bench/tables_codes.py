"""Tables of matrices in few bits: a GGUF file's own codes beside rounding, made from raw results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tables_speed import cell, level

Rows = list[Sequence[str]]
Read = Callable[[str], Any]
_MODELS = {"SmolLM2": ("codes-smollm2",), "Qwen": ("codes-qwen", "codes-qwen-k-quant")}
_SPEEDS = {"SmolLM2": "codes-smollm2-speed", "Qwen": "codes-qwen-speed"}
_SAID = {"SmolLM2": "codes-smollm2-text", "Qwen": "codes-qwen-text"}
_WEIGHTS = {
    "fp32": "float32", "gguf": "the file's codes", "int4": "int4, rounded again", "int4, awq": "int4, `awq`",
    "int4, k_quant": "int4, `k_quant`", "int4, awq and k_quant": "int4, `awq` and `k_quant`",
    "int4, k_quant_mixed": "int4, `k_quant_mixed`",
}  # fmt: skip
_TEXTS = ("c4", "wikitext", "news")
_DECODERS = ("the file's codes", "the file's codes, NBL", "int4, NBL", "llama.cpp, the file itself")
_TESTS = (("pp512", 0), ("pp2048", 0), ("tg48", 0), ("tg48", 512))


def codes(read: Read) -> Rows:
    """Perplexity of both decoders in float32, and how much of it every other form of the weights adds.

    A further file of a model replaces other layers: its rows are relative to its own float32 graphs.
    """
    heads = ("original: C4", "WikiText-2", "news", "NBL: C4", "WikiText-2", "news")
    rows: Rows = [("model", "weights", "MB", *heads), "llrrrrrrr"]
    for model, name in ((model, name) for model, names in _MODELS.items() for name in names):
        found = read(name)["rows"]
        plain = found["fp32"]
        for key, title in _WEIGHTS.items():
            if key not in found or (key == "fp32" and name != _MODELS[model][0]):
                continue
            cells = [_cell(found[key], plain, which, text) for which in ("original", "nbl") for text in _TEXTS]
            rows.append((model, title, f"{found[key]['model_bytes']['original'] / 1e6:.0f}", *cells))
    return rows


def _cell(row: Any, plain: Any, which: str, text: str) -> str:
    value, base = (_perplexity(r, which, text) for r in (row, plain))
    return f"{base:.2f}" if row is plain else f"{100 * (value / base - 1):+.1f}%"


def _perplexity(row: Any, which: str, text: str) -> float:
    found = next(r for r in row["quality"] if r["task"] == f"perplexity:{text}")
    return float(found["figures"][which]["value"])


def speeds(read: Read) -> Rows:
    """Tokens per second over those of the original in int4, by interleaved rounds."""
    heads = ("prefill 512", "prefill 2048", "decode", "decode behind 512")
    runs = {model: read(name)["ratios"] for model, name in _SPEEDS.items()}
    kind = level(r for run in runs.values() for r in run)
    rows: Rows = [("model", f"decoder ({kind})", *heads), "ll" + "r" * len(heads)]
    for model, run in runs.items():
        ratios = {(r["variant"], r["test"], r["depth"]): r for r in run}
        for decoder in _DECODERS:
            found = [ratios.get((decoder, *test)) for test in _TESTS]
            rows.append((model, decoder, *("" if r is None else cell(r) for r in found)))
    return rows


def texts(read: Read) -> Rows:
    """How far greedy text of two programs on the same weights is the same."""
    rows: Rows = [("model", "pair", "prompts with the same 64 tokens", "largest margin at a difference"), "llrr"]
    for model, name in _SAID.items():
        found = read(name)["rows"]
        for pair in (key for key in found[0] if key != "prompt"):
            margins = [row[pair]["margin"] for row in found if row[pair]["margin"] is not None]
            equal = f"{len(found) - len(margins)} of {len(found)}"
            rows.append((model, pair.replace(", ", " and "), equal, f"{max(margins):.2f}" if margins else "none"))
    return rows
