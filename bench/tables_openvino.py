"""Tables of OpenVINO, made from raw results of `nbl-export bench DIR/original DIR/model ... --json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Rows = list[Sequence[str]]
Read = Callable[[str], Any]
_RUNS = {
    "fp16": ("openvino-prefill-fp16", "openvino-decode-fp16"),
    "int8": ("openvino-prefill-int8", "openvino-decode-int8"),
    "int4": ("openvino-prefill-int4", "openvino-decode-int4"),
}
_TESTS = (("pp512", 0, "prefill 512"), ("pp2048", 0, "prefill 2048"), ("tg64", 512, "decode behind 512"))


def openvino(read: Read) -> Rows:
    """Tokens per second of the original IR and of the NBL IR, and their ratio with its interval."""
    rows: Rows = [("precision", "test", "original", "NBL", "ratio", "interval"), "llrrrr"]
    for precision, names in _RUNS.items():
        prefill, decode = map(read, names)
        for test, depth, title in _TESTS:
            run = decode if depth else prefill
            speeds = {v: r["tokens_per_second_median"] for r in run["rows"] if r["test"] == test
                      for v in ("original", "model") if r["variant"].endswith(v)}  # fmt: skip
            found = next(r for r in run["ratios"] if r["test"] == test)
            pair = [f"{speeds[v]:,.{0 if test[0] == 'p' else 1}f}" for v in ("original", "model")]
            interval = f"{found['low']:.2f} to {found['high']:.2f}"
            rows.append((precision, title, *pair, f"×{found['ratio']:.2f}", interval))
    return rows
