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


# bits of a weight -> title of a decoder -> its name in the run
_DECODERS = {
    "32": {
        "NBL, ONNX Runtime": "ort_fp32/model", "`original/`, ONNX Runtime": "ort_fp32/original",
        "OpenVINO GenAI, stock IR": "openvino fp32", "llama.cpp": "llama.cpp f32",
    },
    "16": {
        "NBL, OpenVINO": "ov_fp16/model", "`original/`, OpenVINO": "ov_fp16/original",
        "OpenVINO GenAI, stock IR": "openvino fp16", "NBL, llama.cpp": "llama.cpp NBL-F16",
        "llama.cpp": "llama.cpp f16",
    },
    "8": {
        "NBL, OpenVINO": "ov_int8/model", "`original/`, OpenVINO": "ov_int8/original",
        "OpenVINO GenAI, stock IR": "openvino int8", "NBL, ONNX Runtime": "ort_int8/model",
        "`original/`, ONNX Runtime": "ort_int8/original", "NBL, llama.cpp Q8_0": "llama.cpp NBL-Q8_0",
        "llama.cpp Q8_0": "llama.cpp q8_0",
    },
    "4": {
        "NBL, OpenVINO": "ov_int4/model", "`original/`, OpenVINO": "ov_int4/original",
        "OpenVINO GenAI, stock IR": "openvino int4", "NBL, ONNX Runtime": "ort_int4/model",
        "`original/`, ONNX Runtime": "ort_int4/original", "NBL, llama.cpp Q4_1": "llama.cpp NBL-Q4_1",
        "llama.cpp Q4_1": "llama.cpp Q4_1", "llama.cpp Q4_0": "llama.cpp q4_0",
    },
}  # fmt: skip


def engines(read: Read) -> Rows:
    """Tokens per second of all engines, all decoders in turn; the fastest of each column and size is bold."""
    run = read("engines-smollm2")
    speeds = {(t["name"], t["test"]): t["tokens_per_second_median"] for t in run["timings"]}
    tests = list(dict.fromkeys(t["test"] for t in run["timings"]))
    rows: Rows = [("bits", "decoder", "prefill 512", "prefill 2048", "decode behind 512"), "rlrrr"]
    for bits, decoders in _DECODERS.items():
        best = {test: max(speeds[name, test] for name in decoders.values()) for test in tests}
        for title, name in decoders.items():
            cells = []
            for test in tests:
                value = speeds[name, test]
                shown = f"{value:,.1f}" if test.startswith("tg") else f"{value:,.0f}"
                cells.append(f"**{shown}**" if value == best[test] else shown)
            rows.append((bits, title, *cells))
    return rows
