"""Throughput of vLLM on a checkpoint of the original and on NBL checkpoints, and what fits into the same cache.

    python bench/vllm_throughput.py VLLM_PYTHON original=DIRECTORY NAME=DIRECTORY... > bench/results/vllm-<model>.json

VLLM_PYTHON is the Python of an environment with vLLM and nbl-export (`make test-vllm` makes one). Each round loads each
checkpoint in a process of its own, in turn, and generates for all prompts at once: continuous batching as in a server.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS, SEQUENCE = 32, 256, 64, 6, 2048
CHILD = """
import json, random, sys, time
from vllm import LLM, SamplingParams
directory, prompts, length, new = sys.argv[1], *map(int, sys.argv[2:])
llm = LLM(directory, dtype="bfloat16", max_model_len=2048, block_size=32, enforce_eager=True,
          enable_prefix_caching=False, max_num_seqs=prompts)
random.seed(0)
rows = [{"prompt_token_ids": [random.randrange(100, 40000) for _ in range(length)]} for _ in range(prompts)]
wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
llm.generate(rows[:4], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
started = time.perf_counter()
llm.generate(rows, wanted, use_tqdm=False)
seconds = time.perf_counter() - started
cache = llm.llm_engine.vllm_config.cache_config
print("ANSWER", json.dumps({"seconds": seconds, "cache_tokens": cache.num_gpu_blocks * cache.block_size}))
"""


def once(python: str, directory: str) -> dict[str, Any]:
    words = [python, "-c", CHILD, directory, *map(str, (PROMPTS, PROMPT_TOKENS, NEW_TOKENS))]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **settings}, cwd="/")
    answer = next((line for line in done.stdout.splitlines() if line.startswith("ANSWER ")), None)
    if answer is None:
        sys.exit(f"{directory} does not run in vLLM: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(answer.removeprefix("ANSWER "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("checkpoints", nargs="+", help="NAME=DIRECTORY, the original first")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    import dataclasses

    from nbl_export.measure.benchmark import machine
    from nbl_export.records.paired import paired_ratio

    named = dict(text.split("=", 1) for text in options.checkpoints)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in named}
    for turn in range(options.rounds):
        for name in list(named) if turn % 2 == 0 else list(named)[::-1]:
            found[name].append(once(options.python, named[name]))
            print(turn, name, found[name][-1], file=sys.stderr, flush=True)
    base = next(iter(named))
    total = PROMPTS * (PROMPT_TOKENS + NEW_TOKENS)
    rows = {}
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        ratio = paired_ratio([run["seconds"] for run in found[base]], seconds, range(len(seconds)))
        tokens = runs[0]["cache_tokens"]
        rows[name] = {
            "seconds": seconds, "tokens_per_second": total / statistics.median(seconds),
            "ratio": dataclasses.asdict(ratio), "cache_tokens": tokens, "sequences": tokens // SEQUENCE,
        }  # fmt: skip
    asked = {"prompts": PROMPTS, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "sequence": SEQUENCE}
    version = subprocess.run(
        [options.python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    about = {"machine": machine(), "versions": {"vllm": version}, "asked": {**asked, "cache": "1 GiB"}}
    print(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
