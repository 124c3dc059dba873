"""Greedy answers of the original with and without n-gram decoding in ONNX Runtime GenAI, in turns.

    python bench/ngram.py DIR/original NGRAM > RAW.json

NGRAM is a copy of DIR/original with the settings of docs/drafts.md. A round loads both directories anew and asks each
of them one prompt of each kind, which no other round asks. Each uses one thread. So its processor time is that of its
own work, also on a machine that other work shares.
"""

from __future__ import annotations

import argparse
import calendar
import difflib
import fnmatch
import heapq
import inspect
import json
import shlex
import statistics
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.targets.onnx.genai import GenaiRunner, load_package, open_model

NEW_TOKENS = 96
WAYS = ("original", "ngram")
EDITED = (textwrap.dedent, heapq.merge, statistics.median_grouped, difflib.get_close_matches, shlex.join,
          fnmatch.filter, calendar.monthrange, heapq.nsmallest)  # fmt: skip
QUESTIONS = (
    "Why is the sky blue?", "How do I bake bread at home?", "Explain how a bicycle stays upright.",
    "What should I pack for a week in the mountains?", "How does a refrigerator work?",
    "Describe a quiet morning by the sea.", "Why do leaves change colour in autumn?", "How do I change a flat tyre?",
)  # fmt: skip
KINDS = {
    "code to edit": [f"Write this code again with type hints:\n\n{inspect.getsource(f)[:1200]}" for f in EDITED],
    "a question": list(QUESTIONS),
}


def answer(model: Any, ids: list[int]) -> dict[str, Any]:
    """Tokens, wall clock and processor time of prefill and answer, and what was proposed and accepted."""
    og = load_package("onnxruntime_genai")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + NEW_TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    clocks = [(time.perf_counter_ns(), time.process_time_ns())]
    generator.append_tokens(np.asarray(ids, np.int32))
    clocks.append((time.perf_counter_ns(), time.process_time_ns()))
    while not generator.is_done():
        generator.generate_next_token()
    clocks.append((time.perf_counter_ns(), time.process_time_ns()))
    stats = generator.get_speculative_stats()
    spans = {}
    for part, begun, ended in zip(("prefill", "decode"), clocks, clocks[1:], strict=False):
        spans[f"{part}_wall_ns"], spans[f"{part}_processor_ns"] = (b - a for a, b in zip(begun, ended, strict=True))
    return {"tokens": [int(i) for i in generator.get_sequence(0)[len(ids) :]], **spans,
            "proposed": stats["draft_tokens_evaluated"], "accepted": stats["draft_tokens_accepted"]}  # fmt: skip


def row(kind: str, found: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """How many answers of both ways are equal."""
    equal = sum(pair["original"]["tokens"] == pair["ngram"]["tokens"] for pair in found)
    return {"kind": kind, "prompts": len(found), "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("ngram", type=Path)
    parser.add_argument("--rounds", type=int, default=len(QUESTIONS))
    asked = parser.parse_args()
    directories = {"original": asked.original, "ngram": asked.ngram}
    with GenaiRunner(asked.original, 1) as runner:
        prompts = {kind: [runner.encode(text, chat=True) for text in texts] for kind, texts in KINDS.items()}
    answers: dict[str, list[dict[str, dict[str, Any]]]] = {kind: [{} for _ in range(asked.rounds)] for kind in KINDS}
    for turn in range(asked.rounds):
        for way in WAYS[:: 1 if turn % 2 else -1]:
            model = open_model(load_package("onnxruntime_genai"), directories[way], 1, on_cpu=False)
            answer(model, prompts["a question"][turn][:8])  # the first answer of a load is slower
            for kind, texts in prompts.items():
                answers[kind][turn][way] = answer(model, texts[turn])
            del model
            print(f"round {turn + 1}, {way}", file=sys.stderr, flush=True)
    rows = [row(kind, found) for kind, found in answers.items()]
    for one in (pair[way] for found in answers.values() for pair in found for way in WAYS):
        one["tokens"] = len(one["tokens"])
    print(json.dumps({"new_tokens": NEW_TOKENS, "threads": 1, "rows": rows, "answers": answers}))


if __name__ == "__main__":
    main()
