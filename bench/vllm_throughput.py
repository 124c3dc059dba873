"""Throughput of vLLM on a checkpoint of the original and on NBL checkpoints, and what fits into the same cache.

    python bench/vllm_throughput.py VLLM_PYTHON original=DIRECTORY NAME=DIRECTORY... > bench/results/vllm-<model>.json

VLLM_PYTHON is the Python of an environment with vLLM and nbl-export (`make test-vllm` makes one). Each checkpoint is
loaded once, in a process of its own, and the rounds take them in turn. A round generates for all prompts at once:
continuous batching as in a server.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

PROMPTS, PROMPT_TOKENS, NEW_TOKENS, ROUNDS, SEQUENCE = 32, 256, 64, 6, 2048
CHILD = """
import json, random, sys, time
from vllm import LLM, SamplingParams
directory, prompts, length, new = sys.argv[1], *map(int, sys.argv[2:])
llm = LLM(directory, dtype="bfloat16", max_model_len=max(2048, length + new), block_size=32, enforce_eager=True,
          enable_prefix_caching=False, max_num_seqs=prompts)
random.seed(0)
rows = [{"prompt_token_ids": [random.randrange(100, 40000) for _ in range(length)]} for _ in range(prompts)]
wanted = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
llm.generate(rows[:4], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
cache = llm.llm_engine.vllm_config.cache_config
tokens = cache.num_gpu_blocks * cache.block_size
print("ANSWER", json.dumps({"cache_tokens": tokens}), flush=True)
for _ in sys.stdin:
    started = time.perf_counter()
    llm.generate(rows, wanted, use_tqdm=False)
    seconds = time.perf_counter() - started
    print("ANSWER", json.dumps({"seconds": seconds, "cache_tokens": tokens}), flush=True)
"""


class Loaded:
    """A checkpoint in vLLM, in a process of its own."""

    def __init__(self, python: str, directory: str, asked: tuple[int, int, int]) -> None:
        self._directory = directory
        # In one process: an engine that waits in a process of its own would take a core.
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        self._child = subprocess.Popen([python, "-c", CHILD, directory, *map(str, asked)], text=True, cwd="/",
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env={**os.environ, **settings})  # fmt: skip
        self._answer()

    def once(self) -> dict[str, Any]:
        """Generate for all prompts."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("ANSWER "):
                found: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return found
        sys.exit(f"{self._directory} does not run in vLLM; its messages are above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("checkpoints", nargs="+", help="NAME=DIRECTORY, the original first")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=60, help="begin no round after this time, loading included")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    options = parser.parse_args()
    from nbl_export.measure.benchmark import machine

    named = dict(text.split("=", 1) for text in options.checkpoints)
    end = time.monotonic() + 60 * options.minutes
    asked = (options.prompts, options.prompt_tokens, options.new_tokens)
    loaded = {name: Loaded(options.python, directory, asked) for name, directory in named.items()}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in named}
    for turn in range(options.rounds):
        if time.monotonic() > end:
            break
        for name in list(named) if turn % 2 == 0 else list(named)[::-1]:
            found[name].append(loaded[name].once())
            print(turn, name, found[name][-1], file=sys.stderr, flush=True)
    rows = {}
    for name, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        tokens = runs[0]["cache_tokens"]
        rows[name] = {"seconds": seconds, "cache_tokens": tokens, "sequences": tokens // SEQUENCE}
    facts = {**dict(zip(("prompts", "prompt_tokens", "new_tokens"), asked, strict=True)), "sequence": SEQUENCE}
    version = subprocess.run(
        [options.python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    about = {"machine": machine(), "versions": {"vllm": version}, "asked": {**facts, "cache": "1 GiB"}}
    print(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
