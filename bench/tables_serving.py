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
