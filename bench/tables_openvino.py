"""The table of OpenVINO, made from raw results of `nbl-export bench DIR/original DIR/model ... --json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tables_speed import cell, level

Rows = list[Sequence[str]]
Read = Callable[[str], Any]
# Layers, precision -> the runs of prefill and decode.
_RUNS = {
    (8, "fp16"): ("openvino-prefill-fp16", "openvino-decode-fp16"),
    (8, "int8"): ("openvino-prefill-int8", "openvino-decode-int8"),
    (8, "int4"): ("openvino-prefill-int4", "openvino-decode-int4"),
    (12, "fp16"): ("openvino12-prefill-fp16", "openvino12-decode-fp16"),
    (12, "int8"): ("openvino12-prefill-int8", "openvino12-decode-int8"),
    (12, "int4"): ("openvino12-prefill-int4", "openvino12-decode-int4"),
}
_TESTS = (("pp512", 0, "prefill 512"), ("pp2048", 0, "prefill 2048"), ("tg64", 512, "decode behind 512"))


def openvino(read: Read) -> Rows:
    """Tokens per second of the original IR and of the NBL IR, and their ratio with its interval."""
    found, kinds = [], []
    for (layers, precision), names in _RUNS.items():
        prefill, decode = map(read, names)
        for test, depth, title in _TESTS:
            run = decode if depth else prefill
            # the last decoder of a run has the layers of the row; the other run holds 8 layers too
            base, *_, ours = run["variants"]
            speeds = {r["variant"]: r["tokens_per_second_median"] for r in run["rows"] if r["test"] == test}
            ratio = next(r for r in run["ratios"] if r["test"] == test and r["variant"] == ours)
            pair = [f"{speeds[v]:,.{0 if test[0] == 'p' else 1}f}" for v in (base, ours)]
            found.append((str(layers), precision, title, *pair, cell(ratio)))
            kinds.append(ratio)
    return [("layers", "precision", "test", "original", "NBL", f"NBL over original ({level(kinds)})"), "rllrrr", *found]
