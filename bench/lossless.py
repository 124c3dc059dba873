"""Greedy tokens of lossless/ beside original/ on 64 prompts of four kinds, and the prefill of a long prompt on both.

    python bench/lossless.py RUN > bench/results/lossless-tokens-<model>.json

RUN was made with --draft. A round loads both folders anew and answers one prompt of each kind with up to 128 tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

KINDS, EACH, NEW_TOKENS = 4, 16, 128
LONG, LOADS = 2048, 6


def log(done: int, total: int) -> None:
    if done * 20 // total > (done - 1) * 20 // total:
        print(f"{done} of {total}", file=sys.stderr, flush=True)


def prefills(openers: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of the prefill of a long prompt, by folder; a pair of loads a round."""
    import numpy as np

    found: dict[str, list[float]] = {name: [] for name in openers}
    ids = np.random.default_rng(0).integers(3, 40_000, LONG).tolist()
    for turn in range(LOADS):
        for name in sorted(openers, reverse=bool(turn % 2)):
            with openers[name]() as runner:
                runner.generation(ids[:64], 1, {})
                found[name].append(runner.generation(ids, 1, {}).prefill_ns / 1e9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=EACH, help="of each kind")
    options = parser.parse_args()
    from nbl_export.files import versions
    from nbl_export.measure.benchmark import machine
    from nbl_export.measure.speculative import Asked, Way, overall, rows, time_ways
    from nbl_export.records.capabilities import GENAI_PROPOSERS
    from nbl_export.run.stages.speculative import first_differences, margin
    from nbl_export.targets.onnx.speculative import SpeculativeRunner
    from nbl_export.text.prompts import prompts

    chosen = json.loads((options.run / "lossless.json").read_text(encoding="utf-8"))["chosen"]["name"]
    proposer = next(p for p in GENAI_PROPOSERS if p.name == chosen)
    openers = {name: functools.partial(SpeculativeRunner, options.run / name) for name in ("original", "lossless")}
    ways = [Way(None, "original"), Way(proposer, "lossless")]
    loads: dict[int, list[Asked]] = {}
    with openers["original"]() as runner:
        for k, prompt in enumerate(prompts(options.prompts)):
            ids = runner.encode(prompt.text, chat=prompt.chat)[:512]
            number = k % options.prompts
            loads.setdefault(number, []).append(Asked(prompt.kind, number, tuple(ids)))
    samples = time_ways(ways, openers, loads, NEW_TOKENS, log)
    with openers["original"]() as runner:
        differences = first_differences(samples, functools.partial(margin, runner))
    about = {"machine": machine(), "versions": versions(("onnxruntime", "onnxruntime-genai"))}
    found = {"new_tokens": NEW_TOKENS, "rows": rows(samples), "overall": overall(samples), "differences": differences}
    print(json.dumps({**about, "proposer": chosen, **found, "prefill_seconds": prefills(openers)}, indent=1))


if __name__ == "__main__":
    main()
