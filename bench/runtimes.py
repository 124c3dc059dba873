"""Time to the first token, time a token, memory and loss of several runtimes on one model, in turns.

    python bench/runtimes.py TOKENIZER "ONNX Runtime int8=genai:DIR" "OpenVINO int8=openvino:DIR"
        "llama.cpp Q4_K_M=llama.cpp:FILE.gguf" [--text NAME=FILE ...] > RAW.json

    a runtime a process    loads its model once, then answers lines of JSON
    a round                one prompt in each runtime, in an order that changes from round to round
    loss                   -log p of 64 tokens that follow a prompt of 768 tokens one by one, as served; of windows
                           of each text, by each runtime on the same tokens

TOKENIZER is a directory with tokenizer.json. The first runtime is the one that others are compared with. Random
tokens are prompts of the timing. `npm install node-llama-cpp@3.22.1` in bench/runtimes/ gives llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve()
PROMPT, SCORED = 768, 64  # tokens of a window of the loss
FIRST, LAST = 100, 40_000  # random tokens of a prompt: no control token, and in every vocabulary here
Answer = Callable[[list[int], int], dict[str, Any]]


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def timed(tokens: Iterator[Any]) -> dict[str, Any]:
    """Milliseconds to the first token, and of each further one."""
    times = []
    before = time.perf_counter()
    for _ in tokens:
        now = time.perf_counter()
        times.append(1000 * (now - before))
        before = now
    return {"first_ms": times[0], "token_ms": times[1:], "peak_bytes": peak_bytes()}


def loss_of(logits_V: np.ndarray, token: int) -> float:
    wide = logits_V.astype(np.float64)
    return float(wide.max() + math.log(np.exp(wide - wide.max()).sum()) - wide[token])


class Genai:
    """ONNX Runtime GenAI; the folder names the threads."""

    def __init__(self, directory: str, threads: int, context: int) -> None:
        import onnxruntime_genai as og

        self._og = og
        config = og.Config(directory)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = og.Model(config)
        self.version = f"onnxruntime-genai {og.__version__}"
        self._context = context

    def _generator(self, ids: list[int]) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(max_length=min(self._context, len(ids) + 80), do_sample=False)
        return self._og.Generator(self._model, params)

    def tokens(self, ids: list[int], count: int) -> Iterator[Any]:
        generator = self._generator(ids)
        generator.append_tokens(ids)
        for _ in range(count):
            generator.generate_next_token()
            yield generator.get_next_tokens()

    def losses(self, ids: list[int], following: list[int]) -> list[float]:
        generator = self._generator(ids)
        found = []
        given = ids
        for token in following:
            generator.append_tokens(given)
            found.append(loss_of(np.asarray(generator.get_logits())[0, -1], token))
            given = [token]
        return found


class OpenVino:
    """OpenVINO GenAI with its default back end. The loss comes from the same form of the graph in OpenVINO itself."""

    def __init__(self, directory: str, threads: int, context: int) -> None:
        import openvino
        import openvino_genai as genai

        self._openvino = openvino
        self._genai = genai
        self._directory = Path(directory)
        self._threads = threads
        self._context = context
        self.version = f"openvino-genai {genai.__version__}"
        config = genai.SchedulerConfig()
        config.enable_prefix_caching = False
        config.max_num_batched_tokens = 1 << 20
        self._pipeline: Any = genai.LLMPipeline(
            directory, "CPU", scheduler_config=config, INFERENCE_NUM_THREADS=threads
        )

    def tokens(self, ids: list[int], count: int) -> dict[str, Any]:
        given = self._genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        found = self._pipeline.generate(self._openvino.Tensor(np.array([ids], np.int64)), given).perf_metrics
        return {"first_ms": found.get_ttft().mean, "token_ms": [found.get_tpot().mean], "peak_bytes": peak_bytes()}

    def losses(self, ids: list[int], following: list[int]) -> list[float]:
        from nbl_export.graph.ir.paged import PagedIr

        if self._pipeline is not None:
            self._pipeline = None
            self._paged = PagedIr(self._directory, threads=self._threads)
        self._paged.begin(self._context)
        found = []
        given = ids
        for token in following:
            logits = self._paged.step({0: np.array(given)}, np.array([len(given) - 1]))[0]
            found.append(loss_of(logits, token))
            given = [token]
        return found


SERVED = {"genai": Genai, "openvino": OpenVino}


def serve(kind: str, path: str, threads: int, context: int) -> None:
    """Answer lines of JSON, as bench/runtimes/llama_cpp.mjs does."""
    runtime = SERVED[kind](path, threads, context)
    out = os.fdopen(os.dup(1), "w")  # libraries write to 1
    os.dup2(2, 1)
    print(json.dumps({"version": runtime.version}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "next" in asked:
            answer: dict[str, Any] = {"losses": runtime.losses(asked["ids"], asked["next"])}
        else:
            made = runtime.tokens(asked["ids"], asked["new"])
            answer = made if isinstance(made, dict) else timed(made)
        print(json.dumps(answer), file=out, flush=True)


class Runtime:
    """A process that serves a model."""

    def __init__(self, text: str, threads: int, context: int) -> None:
        self.title, _, rest = text.partition("=")
        kind, _, path = rest.partition(":")
        words = [path, str(threads), str(context)]
        if kind == "llama.cpp":
            command = ["node", str(HERE.parent / "runtimes" / "llama_cpp.mjs"), *words]
        else:
            command = [sys.executable, str(HERE), "--serve", kind, *words]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.version = self._line()["version"]

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.title}: the process ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, **asked: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return self._line()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def times(runtimes: Sequence[Runtime], lengths: Sequence[int], rounds: int, count: int) -> dict[str, Any]:
    """Of each length and runtime: the answers of all rounds behind a first one, which is not counted."""
    rng = random.Random(0)
    found: dict[str, Any] = {}
    for length in lengths:
        answers: dict[str, list[Any]] = {runtime.title: [] for runtime in runtimes}
        for turn in range(rounds + 1):
            ids = [rng.randrange(FIRST, LAST) for _ in range(length)]
            for runtime in runtimes[turn % len(runtimes) :] + runtimes[: turn % len(runtimes)]:
                answer = runtime.ask(ids=ids, new=count)
                if turn:
                    answers[runtime.title].append(answer)
        found[str(length)] = {title: summary(own) for title, own in answers.items()}
        for title, own in found[str(length)].items():
            print(length, title, own["first_ms"]["median"], own["token_ms"]["median"], file=sys.stderr, flush=True)
    return found


def summary(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    firsts = [answer["first_ms"] for answer in answers]
    tokens = [statistics.mean(answer["token_ms"]) for answer in answers]
    return {
        "first_ms": {"median": statistics.median(firsts), "all": firsts},
        "token_ms": {"median": statistics.median(tokens), "all": tokens},
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
    }


def losses(runtimes: Sequence[Runtime], tokenizer: str, texts: Sequence[str], windows: int) -> dict[str, Any]:
    """Of each text and runtime: the mean loss of each window."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json"))
    found: dict[str, Any] = {}
    for item in texts:
        name, _, file = item.partition("=")
        ids = encoder.encode(
            Path(file).read_text(encoding="utf-8")[: 40 * windows * PROMPT], add_special_tokens=False
        ).ids
        starts = np.linspace(0, len(ids) - PROMPT - SCORED - 1, windows).astype(int).tolist()
        found[name] = {}
        for runtime in runtimes:
            own = []
            for start in starts:
                window = ids[start : start + PROMPT + SCORED]
                own.append(statistics.mean(runtime.ask(ids=window[:PROMPT], next=window[PROMPT:])["losses"]))
            found[name][runtime.title] = own
            print(name, runtime.title, statistics.mean(own), file=sys.stderr, flush=True)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        return
    from nbl_export.measure.benchmark import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("runtimes", nargs="+", help="TITLE=KIND:PATH")
    parser.add_argument("--lengths", default="512,2048,4096")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=17)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE")
    parser.add_argument("--windows", type=int, default=8)
    options = parser.parse_args()
    lengths = [int(n) for n in options.lengths.split(",") if n]
    context = max([*lengths, PROMPT]) + 128
    runtimes = [Runtime(text, options.threads, context) for text in options.runtimes]
    found = {
        "machine": machine(),
        "threads": options.threads,
        "versions": {runtime.title: runtime.version for runtime in runtimes},
        "times": times(runtimes, lengths, options.rounds, options.new),
        "losses": losses(runtimes, options.tokenizer, options.text, options.windows),
    }
    for runtime in runtimes:
        runtime.close()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
