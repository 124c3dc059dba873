"""This tool's graphs beside other ways to run the same checkpoint on the CPU, interleaved round by round.

    python bench/peers/setup.py
    python bench/peers/run.py DIR [DIR...] --checkpoint MODEL --gguf FILE > bench/results/peers-<model>.json

DIR is a run directory: its original/ and model/ take part. torch reads MODEL, and optimum-onnx and OpenVINO convert it;
llama.cpp reads FILE, and files of other weight types made from it. Each decoder is loaded once, in a
process and environment of its own, and waits while others run. A round is every test on every decoder, in the
same turn each time. One untimed warm-up of each test comes before. Token counts and ids are the same for all.

Whoever cannot take part is listed under "absent" with the reason, and so is one that fails on the way. The table that
compares at equal weight bits goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from child import Child, ChildError
from contenders import PEERS, Absent, Request, contenders
from environments import CACHE
from gguf_types import TYPES
from table import against, print_table

from nbl_export.measure.benchmark import machine
from nbl_export.records.results import Scenario
from nbl_export.run.deployed import is_model_directory
from nbl_export.targets.onnx.genai import default_threads

PROMPT = "The capital of France is"
SAID_TOKENS = 12


def measure(options: argparse.Namespace, checkpoint: Path | None) -> dict[str, Any]:
    """Load everybody, run the rounds, return the value of the results file."""
    tests = [Scenario("pp", n, 0) for n in options.prompt] + [Scenario("tg", options.generate, options.depth)]
    capacity = max(t.depth + t.tokens for t in tests)
    settings = json.loads((options.directories[0] / "original" / "genai_config.json").read_text(encoding="utf-8"))
    ids = np.random.default_rng(options.seed).integers(3, settings["model"]["vocab_size"], capacity).tolist()
    request = Request(options.directories, checkpoint, options.gguf, options.gguf_types, options.peers, options.cache)
    absent: list[Absent] = []
    with contextlib.ExitStack() as stack:
        children = {}
        for who in contenders(request):
            if isinstance(who, Absent):
                absent.append(who)
                _say(f"absent: {who.name}: {who.reason}")
                continue
            try:
                child = Child(who, options.threads, capacity, options.timeout)
            except ChildError as error:
                absent.append(Absent(who.name, who.peer, who.precision, f"does not load: {error}"))
                _say(f"absent: {who.name}: {error}")
                continue
            stack.callback(child.close)
            children[who.name] = child
            _say(f"loaded: {who.name}")
        said = _say_something(children, options.directories[0], absent)
        samples = _rounds(children, tests, options, ids, absent)
        rows = [_describe(child, said[name]) for name, child in children.items()]
    timings = [_timing(name, test, ns) for (name, test), ns in samples.items() if name in children and ns]
    return {
        "machine": machine(),
        "threads": options.threads,
        "rounds": options.rounds,
        "seed": options.seed,
        "order": "every test on every decoder, always in the same turn; one discarded warm-up each",
        "contenders": rows,
        "absent": [asdict(a) for a in absent],
        "timings": timings,
        "against": against(rows, timings),
    }


def _rounds(
    children: dict[str, Child], tests: Sequence[Scenario], options: argparse.Namespace, ids: Sequence[int],
    absent: list[Absent],
) -> dict[tuple[str, Scenario], list[int]]:  # fmt: skip
    """Nanoseconds of each decoder and test; a decoder that fails leaves `children` for `absent`."""
    samples: dict[tuple[str, Scenario], list[int]] = {(n, t): [] for n in children for t in tests}
    for number in range(options.rounds + 1):
        started = time.monotonic()
        for test, name in itertools.product(tests, tuple(children)):
            if name not in children:
                continue
            time.sleep(options.pause)  # threads of whoever ran last stop spinning
            try:
                answer = children[name].ask(
                    kind=test.kind, tokens=test.tokens, ids=ids[: test.depth + test.tokens]
                )  # fmt: skip
            except ChildError as error:
                _drop(children, name, f"{test.test} failed: {error}", absent)
                continue
            if number:
                samples[name, test].append(answer["ns"])
        _say(f"round {number} of {options.rounds}: {time.monotonic() - started:.0f} s")
    return samples


def _drop(children: dict[str, Child], name: str, reason: str, absent: list[Absent]) -> None:
    child = children.pop(name)
    child.close()
    absent.append(Absent(name, child.contender.peer, child.contender.precision, reason))
    _say(f"absent: {name}: {reason}")


def _say_something(children: dict[str, Child], directory: Path, absent: list[Absent]) -> dict[str, str]:
    """What each decoder goes on with, to see that it is the model it should be."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "original" / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    said = {}
    for name in tuple(children):
        try:
            answer = children[name].ask(kind="say", tokens=SAID_TOKENS, ids=prompt)
            said[name] = tokenizer.decode(answer["ids"], skip_special_tokens=False)
            _say(f"{name}: {PROMPT}{said[name]!r}")
        except ChildError as error:
            _drop(children, name, f"does not generate: {error}", absent)
    return said


def _describe(child: Child, said: str) -> dict[str, Any]:
    who = child.contender
    row = {"name": who.name, "peer": who.peer, "precision": who.precision}
    return {**row, **child.facts, "resident_bytes": child.resident_bytes, "says": said}


def _timing(name: str, test: Scenario, samples_ns: Sequence[int]) -> dict[str, Any]:
    speeds = [test.tokens * 1e9 / ns for ns in samples_ns]
    facts = {"test": test.test, "kind": test.kind, "tokens": test.tokens, "depth": test.depth}
    return {"name": name, **facts, "tokens_per_second_median": statistics.median(speeds), "tokens_per_second": speeds}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="run directory of nbl-export")
    parser.add_argument("--gguf", nargs="+", type=Path, default=[], metavar="FILE", help="what llama.cpp reads")
    parser.add_argument("--gguf-types", nargs="*", default=list(TYPES), choices=TYPES, help="made from the first FILE")
    parser.add_argument("--checkpoint", type=Path, help="directory with safetensors of the same model")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="who takes part beside DIR")
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory that setup.py installed into")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", nargs="+", type=int, default=[512, 2048], help="tokens of each prefill test")
    parser.add_argument("--generate", type=int, default=47, help="tokens of the decode test")
    parser.add_argument("--depth", type=int, default=512, help="tokens in the cache before them")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two tests")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that loading, or a test, may take")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for directory in options.directories:
        if not all(is_model_directory(directory / part) for part in ("original", "model")):
            parser.error(f"{directory} has no decoder in original/ and model/: give a finished run")
    for file in options.gguf:
        if not file.is_file():
            parser.error(f"{file} is not a file")
    if len({d.name for d in options.directories}) < len(options.directories):
        parser.error("two directories have the same name, by which the rows are told apart: rename one")
    return options


def main() -> None:
    options = _options()
    result = measure(options, options.checkpoint and options.checkpoint.absolute())
    print_table(result)
    json.dump(result, sys.stdout, indent=1, ensure_ascii=False)
    print()


if __name__ == "__main__":
    main()
