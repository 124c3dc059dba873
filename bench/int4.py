"""Perplexity, size and time of the original graph of one model, rounded to int4 by several methods.

    python bench/int4.py DATA float32=DIR rtn=DIR k_quant=DIR ... > bench/results/int4-methods-<model>.json

Each DIR is the `original/` of a run, or a copy of it. Perplexity is measured in windows of 512 tokens of C4 and of
WikiText-2, the same for all graphs. Its increase is over the first graph, window by window. Time is that of one core,
spent by this process, so that other work on the machine counts little. Rounds load all graphs but the first anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.evaluation.measure import windows
from nbl_export.evaluation.scorer import Request, graph_scorer
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.records.quality import increase_interval, perplexity
from nbl_export.targets.onnx.facts import read_facts
from nbl_export.text.corpus import read_text

TEXTS = {"c4": "c4/c4_demo.json", "wikitext": "wikitext-2-raw/wiki.valid.raw"}
CONTEXT = 512  # of a window, and of the prefill that is timed
DECODED = 48


def losses(directory: Path, data: Path, count: int) -> dict[str, list[float]]:
    """Mean loss of each window, in nats, by text."""
    scorer, found = graph_scorer(directory), {}
    for name, file in TEXTS.items():
        exit_layer = windows(read_text(str(data / file)), scorer.tokenizer, CONTEXT, count)
        scores = scorer.score([Request(tuple(ids[:1]), tuple(ids[1:])) for ids in exit_layer])
        found[name] = [-score / (CONTEXT - 1) for score, _ in scores]
    return found


def judged(before: list[float], after: list[float]) -> dict[str, Any]:
    """Perplexity, and its increase with an interval."""
    rise = increase_interval(before, after)
    value = perplexity(np.array(after))
    return {"perplexity": value, "increase": rise.value, "increase_interval": rise.ends, "losses": after}


def seconds(graphs: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of one core for a prefill, and for tokens behind it, by graph and round; the first round warms up."""
    ids = np.random.default_rng(0).integers(100, 1000, (1, CONTEXT))
    found: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in graphs}
    names = list(graphs)
    for k in range(rounds + 1):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            decoder = OnnxDecoder(graphs[name], read_facts(graphs[name]).head_dim, 1, file=GRAPH_FILE)
            decoder.begin(1)
            decoder.step(ids[:, :32])
            decoder.begin(1)
            taken = {"prefill": _taken(decoder, [ids])}
            taken["decode"] = _taken(decoder, [ids[:, i : i + 1] for i in range(DECODED)])
            for phase, value in taken.items() if k else ():
                found[name][phase].append(value)
    return found


def _taken(decoder: OnnxDecoder, steps: list[np.ndarray]) -> float:
    begun = time.process_time()
    for ids in steps:
        decoder.step(ids)
    return time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("graphs", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--windows", type=int, default=16, help="of each text; 0 measures no perplexity")
    parser.add_argument("--rounds", type=int, default=12, help="0 measures no time")
    asked = parser.parse_args()
    graphs = {name: Path(place) for name, _, place in (word.partition("=") for word in asked.graphs)}
    first, rows = next(iter(graphs)), dict[str, Any]()
    for name, directory in graphs.items() if asked.windows else ():
        found = losses(directory, asked.data, asked.windows)
        base = {text: row["losses"] for text, row in rows[first].items()} if rows else found
        rows[name] = {text: judged(base[text], after) for text, after in found.items()}
        print(name, {text: row["increase"] for text, row in rows[name].items()}, file=sys.stderr, flush=True)
    sizes = {name: sum(f.stat().st_size for f in place.glob(f"{GRAPH_FILE}*")) for name, place in graphs.items()}
    times = seconds({name: place for name, place in graphs.items() if name != first}, asked.rounds)
    print(json.dumps({"windows": asked.windows, "bytes": sizes, "rows": rows, "core_seconds": times}, indent=1))


if __name__ == "__main__":
    main()
