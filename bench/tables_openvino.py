"""Tables of OpenVINO, made from raw results of `nbl-export bench DIR/original DIR/model ... --json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    rows: Rows = [("layers", "precision", "test", "original", "NBL", "ratio", "interval"), "rllrrrr"]
    for (layers, precision), names in _RUNS.items():
        prefill, decode = map(read, names)
        for test, depth, title in _TESTS:
            run = decode if depth else prefill
            # the last decoder of a run has the layers of the row; the other run holds 8 layers too
            base, *_, ours = run["variants"]
            speeds = {r["variant"]: r["tokens_per_second_median"] for r in run["rows"] if r["test"] == test}
            found = next(r for r in run["ratios"] if r["test"] == test and r["variant"] == ours)
            pair = [f"{speeds[v]:,.{0 if test[0] == 'p' else 1}f}" for v in (base, ours)]
            interval = f"{found['low']:.2f} to {found['high']:.2f}"
            rows.append((str(layers), precision, title, *pair, f"×{found['ratio']:.2f}", interval))
    return rows


_PEERS = {"int8": "openvino-peers-int8", "int4": "openvino-peers-int4"}
_DECODERS = {
    "OV/original": "OpenVINO, `original/`", "OV/model": "OpenVINO, NBL",
    "ORT/original": "ONNX Runtime, `original/`", "ORT/model": "ONNX Runtime, NBL",
}  # fmt: skip


def engines(read: Read) -> Rows:
    """Tokens per second of both engines, all decoders in turn; the fastest of each column and precision is bold."""
    tests = ("pp512", "pp2048", "tg32")
    rows: Rows = [("precision", "decoder", "prefill 512", "prefill 2048", "decode"), "llrrr"]
    for precision, name in _PEERS.items():
        speeds = {(r["variant"], r["test"]): r["tokens_per_second_median"] for r in read(name)["rows"]}
        best = {test: max(speeds[decoder, test] for decoder in _DECODERS) for test in tests}
        for decoder, title in _DECODERS.items():
            cells = []
            for test in tests:
                value = speeds[decoder, test]
                shown = f"{value:,.0f}" if test != "tg32" else f"{value:.1f}"
                cells.append(f"**{shown}**" if value == best[test] else shown)
            rows.append((precision, title, *cells))
    return rows
