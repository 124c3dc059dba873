"""Tables of speed, size and cost, made from raw results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nbl_export.measure.paired import PairedRatio, paired_ratio
from nbl_export.measure.rows import spoken_ratio
from nbl_export.text.window_intervals import spoken_price

Rows = list[Sequence[str]]
Read = Callable[[str], Any]


def spoken(found: PairedRatio) -> str:
    """A ratio with its interval. An interval that contains 1 is no difference; too few loads give no verdict."""
    if found.loads == 1:
        return f"×{spoken_ratio(found.ratio)} (one load)"
    interval = f"{spoken_ratio(found.low)} to {spoken_ratio(found.high)}"
    if found.verdict == "too few loads":
        return f"×{spoken_ratio(found.ratio)} ({interval} in {found.loads} loads)"
    if found.verdict == "no clear difference":
        return f"no clear difference ({interval})"
    return f"×{spoken_ratio(found.ratio)} ({interval})"


def paired(run: Mapping[str, Any], variant: str, test: str, depth: int) -> PairedRatio:
    """Ratio of a test, by load, from a report.json or from the output of `bench --format json`."""
    base = run.get("base", "original")
    old, new = (_of(run["rows"], name, test, depth) for name in (base, variant))
    loads = old.get("loads") or _loads_by(run.get("order") or run["bench"]["order"], len(old["samples"]))
    return paired_ratio([1 / s for s in old["samples"]], [1 / s for s in new["samples"]], loads)


def _loads_by(order: str, rounds: int) -> list[int]:
    """The load of each round from the recorded order of rounds, for raw results without loads."""
    return [number // 2 if "loaded anew every two rounds" in order else 0 for number in range(rounds)]


def _of(rows: Sequence[Mapping[str, Any]], variant: str, test: str, depth: int) -> Mapping[str, Any]:
    (found,) = [r for r in rows if (r["variant"], r["test"], r["depth"]) == (variant, test, depth)]
    return found


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(new: float, old: float) -> str:
    return f"{100 * (new / old - 1):+.0f}%"


def demo(read: Read) -> Rows:
    run = read("demo-smollm2-fp32")
    rows: Rows = [("", "original", "NBL", ""), "lrrl"]
    for name, test, depth in (
        ("prefill of 512 tokens", "pp512", 0),
        ("prefill of 512 after 2048", "pp512", 2048),
        ("decode of 128", "tg128", 0),
        ("decode of 128 after 2048", "tg128", 2048),
    ):
        speeds = [_of(run["rows"], v, test, depth)["tokens_per_second_median"] for v in ("original", "nbl")]
        rows.append((name, *(f"{_speed(s)} tok/s" for s in speeds), spoken(paired(run, "nbl", test, depth))))
    cache = run["cache_bytes_per_token"]
    change = f"−{100 * (1 - cache['nbl'] / cache['original']):.1f}%"
    rows.append(("cache bytes a token", f"{cache['original']:,}", f"{cache['nbl']:,}", change))
    names = ("held back from the calibration text", "Python's documentation (not calibrated on)")
    priced = read("price-smollm2")  # the same layers and maps as in the demo
    assert priced["replaced_layers"] == run["replaced_layers"]
    for name, price in zip(names, priced["price"], strict=True):
        old, new = price["perplexity_original"], price["perplexity_nbl"]
        rows.append((f"perplexity, {name}", f"{old:.1f}", f"{new:.1f}", spoken_price(price)["increase"]))
    return rows


def int4(read: Read) -> Rows:
    variants = {
        "nbl-8-cca": "8 layers (0, 7, 24-29)",
        "nbl-12-cca": "12 layers (0, 5-8, 22, 24-29)",
        "nbl-12-computed": "the same 12, layer 0 computed",
        "nbl-12-fused": "the same 12, gate and up as one product",
        "nbl-12-greedy": "12 layers of `greedy` (6-9, 15, 17, 24-29)",
        "original": "`original/`",
    }
    run = read("int4-smollm2")
    rows: Rows = [("over the stock graph", *variants.values()), "lllllll"]
    for name, test, depth in (
        ("prefill of 512", "pp512", 0),
        ("prefill of 2048", "pp2048", 0),
        ("prefill of 2048 after 512", "pp2048", 512),
        ("decode of 47", "tg47", 0),
        ("decode of 47 after 512", "tg47", 512),
    ):
        rows.append((name, *(spoken(paired(run, v, test, depth)) for v in variants)))
    return rows


def precisions(read: Read) -> Rows:
    names = {
        "fp32": "float32",
        "int8": "int8",
        "int4": "int4",
        "int4, maps at 8 bits": "int4, maps in 8 bits",
        "int4, maps in float32": "int4, maps in float32",
        "int4, k_quant": "int4, `algo_config=k_quant`",
        "int4, k_quant_last": "int4, `algo_config=k_quant_last` (head and embedding in 8 bits)",
        "int4, k_quant_mixed": "int4, `algo_config=k_quant_mixed`",
    }
    rows: Rows = [
        ("", "on disk", "C4", "WikiText-2", "realnews", "prefill 512", "2048", "decode after 512"),
        "lrrrrrrr",
    ]
    # a later file replaces rows of an earlier one
    files = ("precision-rows-smollm2", "precision-row-k-quant-last", "precision-rows-anew")
    results = {name: row for file in files for name, row in read(file)["rows"].items()}
    for name, title in names.items():
        row = results[name]
        size = " → ".join(f"{row['model_bytes'][v] / 1e6:.0f}" for v in ("original", "nbl")) + " MB"
        texts = [
            " → ".join(f"{text['figures'][v]['value']:.1f}" for v in ("original", "nbl")) for text in row["quality"]
        ]
        tests = (("pp512", 0), ("pp2048", 0), ("tg47", 512))
        rows.append((title, size, *texts, *(f"×{_of(row['ratios'], 'nbl', *t)['ratio']:.2f}" for t in tests)))
    return rows


# title, contenders in one row, bits a weight
_PEERS = (
    ("**NBL, fp32**", ("q12_fp32/model",), "32"),
    ("`original/`, fp32", ("q12_fp32/original",), "32"),
    ("torch 2.13 eager; `torch.compile`", ("torch fp32", "torch-compile fp32"), "32"),
    ("optimum-onnx 0.1.0; with io-binding", ("optimum-onnx fp32", "optimum-onnx fp32 io-binding"), "32"),
    ("OpenVINO GenAI 2026.4", ("openvino fp32",), "32"),
    ("llama.cpp f32 (node-llama-cpp 3.22.1)", ("llama.cpp f32",), "32"),
    ("torch bfloat16; `torch.compile`", ("torch bf16", "torch-compile bf16"), "16"),
    ("OpenVINO GenAI, fp16 file, computes in bfloat16", ("openvino fp16",), "16"),
    ("llama.cpp f16", ("llama.cpp f16",), "16"),
    ("**NBL, int8**", ("q12_int8/model",), "9.0"),
    ("`original/`, int8", ("q12_int8/original",), "9.0"),
    ("OpenVINO GenAI, int8, computes in bfloat16", ("openvino int8",), "8.0"),
    ("llama.cpp Q8_0", ("llama.cpp q8_0",), "8.5"),
    ("**NBL, int4**", ("q12_int4/model",), "5.0"),
    ("`original/`, int4", ("q12_int4/original",), "5.0"),
    ("OpenVINO GenAI, int4, computes in bfloat16", ("openvino int4",), "5.0"),
    ("llama.cpp Q4_0", ("llama.cpp q4_0",), "4.5"),
)


def peers(read: Read) -> Rows:
    run = read("peers-smollm2")
    speeds = {(t["name"], t["test"]): t["tokens_per_second_median"] for t in run["timings"]}
    bits = {c["name"]: c["bits_per_weight"] for c in run["contenders"]}
    tests = list(dict.fromkeys(t["test"] for t in run["timings"]))
    rows: Rows = [("", "bits", "prefill 512", "prefill 2048", "decode"), "llrrr"]
    for title, names, shown in _PEERS:
        if any(round(bits[name], 1) != float(shown) for name in names):
            raise ValueError(f"{names[0]} has {bits[names[0]]} bits a weight, not {shown}")
        cells = ["; ".join(_speed(speeds[name, test]) for name in names) for test in tests]
        rows.append((title, shown, *((f"**{c}**" for c in cells) if title.startswith("**") else cells)))
    return rows


def overhead(read: Read) -> Rows:
    """Extra time of calibration over the plain forward pass, median and range over rounds; peak memory of stages."""
    rows: Rows = [
        ("", "rounds", "one tap", "both taps", "peak of `calibrate`", "peak of `plan`", "peak of `rewrite`"),
        "lrrrrrr",
    ]
    for name in ("overhead-smollm2", "overhead-smollm2-amx"):
        run = read(name)
        cells = []
        for taps in ("moments", "both_taps"):
            low, high = run["overhead_range"][taps]
            cells.append(f"{100 * run['overhead_median'][taps]:+.0f}% ({100 * low:.0f} to {100 * high:.0f})")
        peaks = [f"{run['peak_memory_bytes'][stage] / 1e9:.2f} GB" for stage in ("calibrate", "plan", "rewrite")]
        cpu = run["machine"]["cpu"].replace("(R)", "").replace(" Processor", "")
        rows.append((cpu, str(len(run["rounds_seconds"])), *cells, *peaks))
    return rows


def intervals(read: Read) -> Rows:
    """The share of trials whose interval contains the true ratio; the lowest over all kinds of noise."""
    columns = {
        "6 loads": "6 loads",
        "12 loads": "12 loads",
        "24 loads": "24 loads",
        "until narrow": "rounds end when narrow",
        "12 loads, rounds as if independent": "12 loads, rounds taken as independent",
        "12 loads, signed rank": "12 loads, signed rank",
        "24 loads, signed rank": "24 loads, signed rank",
    }
    rows: Rows = [("correlation of two rounds of a load", *columns.values()), "l" + "r" * len(columns)]
    found = read("intervals")["rows"]
    for correlation in sorted({row["correlation"] for row in found}):
        held = [row["held"] for row in found if row["correlation"] == correlation]
        rows.append((f"{correlation:g}", *(f"{100 * min(h[column] for h in held):.1f}%" for column in columns)))
    return rows
