"""Tables of verification: differences from torch, sources of graphs, architectures and runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Rows = list[Sequence[str]]
Read = Callable[[str], Any]


def verified(read: Read) -> Rows:
    rows: Rows = [("", "exporter", "original", "NBL", "NBL as shipped", "text: margin"), "lrrrrr"]
    for row in read("verified")["rows"]:
        rounded = row["precision"] in ("int8", "int4")
        exporter = f"{row['exporter']:+.1%}" if rounded else f"{row['exporter']:.1e}"
        shipped = "–" if row["shipped"] is None else f"{row['shipped']:.1%}"
        name = f"{row['model']}, {row['precision']}, {row['layers']}"
        rows.append((name, exporter, f"{row['original']:.1e}", f"{row['nbl']:.1e}", shipped, f"{row['margin']:.2g}"))
    return rows


def parity(read: Read) -> Rows:
    run = read("parity-smollm2")
    rows: Rows = [("largest logit difference of a position", "of", "original", "NBL", "NBL / original"), "llrrr"]
    for name, title in (
        ("graph to torch", "graph to torch"),
        ("graph to float64", "graph to torch in float64"),
        ("torch to float64", "torch to torch in float64"),
    ):
        for key, of in (("rms", "rms"), ("p99", "99th percentile"), ("max", "largest")):
            old, new = (run[subject]["distances"][name][key] for subject in ("original", "nbl"))
            rows.append((title if key == "rms" else "", of, f"{old:.1e}", f"{new:.1e}", f"{new / old:.2f}"))
    return rows


_SOURCES = {
    "genai-fp32": "GenAI builder",
    "mobius-default": "mobius, default form",
    "mobius-cpu": "mobius, CPU form",
    "transformers-20": "transformers, opset 20",
    "transformers-23": "transformers, opset 23",
    "optimum": "optimum-onnx",
}


def sources(read: Read) -> Rows:
    rows: Rows = [("graph from", "positions", "largest difference from torch", "median"), "lrrr"]
    found = read("sources-smollm2")["from_torch"]
    for name, title in _SOURCES.items():
        apart = found[name]
        rows.append((title, str(apart["positions"]), f"{apart['largest']:.1e}", f"{apart['median']:.1e}"))
    return rows


_ARCHITECTURES = {
    "llama": "Llama 2",
    "llama3": "Llama 3 (llama3 scaling)",
    "llama-linear": "Llama (linear scaling)",
    "llama-yarn": "Llama (yarn scaling)",
    "llama-bias": "Llama with biases",
    "mistral": "Mistral",
    "mistral-window": "Mistral, sliding window",
    "qwen2": "Qwen2",
    "qwen2-window": "Qwen2, sliding window",
    "qwen3": "Qwen3",
    "phi3": "Phi-3",
    "phi3-window": "Phi-3, sliding window",
    "phi3-long": "Phi-3, long context",
    "phi4-mini": "Phi-4-mini",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "olmo2": "OLMo 2",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "granitemoehybrid": "Granite 4.0, attention alone",
    "olmo": "OLMo",
    "olmo3": "OLMo 3",
    "ministral": "Ministral",
    "ministral3": "Ministral 3 (text)",
    "nemotron": "Nemotron",
    "ernie4_5": "Ernie 4.5",
    "hunyuan": "HunYuan dense",
    "glm": "GLM",
    "glm4": "GLM-4",
    "exaone4": "EXAONE 4",
    "seed_oss": "Seed-OSS",
    "apertus": "Apertus",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
    "gemma": "Gemma",
    "arcee": "Arcee",
    "helium": "Helium",
    "cwm": "CWM",
    "qwen3_moe": "Qwen3 with experts",
    "qwen2_moe": "Qwen2 with experts",
    "olmoe": "OLMoE",
    "granitemoe": "Granite with experts",
    "gpt_oss": "GPT-OSS",
    "phimoe": "Phi with experts",
    "mixtral": "Mixtral",
}


def architectures(read: Read) -> Rows:
    """The largest logit difference of each source's NBL graph from torch, or the status if there is none."""
    runs = read("architectures")["rows"]
    found = {(row["architecture"], row["source"], row["precision"]): row for row in runs}
    ran = {row["architecture"] for row in runs}
    if not ran <= set(_ARCHITECTURES):
        raise ValueError("architectures.json has other architectures than the table")
    columns = (("genai", "fp32"), ("genai", "int4"), ("mobius", "fp32"), ("mobius", "fp16"), ("static", "fp32"),
               ("openvino", "fp32"), ("openvino", "int4"))  # fmt: skip
    head = ("", "GenAI builder", "GenAI, int4", "mobius", "mobius, fp16", "TensorRT form", "OpenVINO", "OpenVINO, int4")
    rows: Rows = [head, "lrrrrrrr"]
    for name, title in ((n, t) for n, t in _ARCHITECTURES.items() if n in ran):
        rows.append((title, *(_difference(found.get((name, *column))) for column in columns)))
    return rows


def _difference(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    status = str(row["status"])
    if status in ("verified", "parity") and row["precision"] != "int4":  # whose difference is that of the codes
        return f"{row['nbl']:.1e}"
    return status.replace("parity failed", "fails verification")


_EXPORTERS = {"genai": "GenAI builder", "mobius": "mobius", "static": "TensorRT form", "openvino": "OpenVINO"}


def refusals(read: Read) -> Rows:
    """Reasons of the refusals, each with the architectures that a source refuses for it."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in read("architectures")["rows"]:
        if row["status"] == "refused":
            place = (_EXPORTERS[row["source"]], str(row["reason"]).rpartition(": ")[2])
            names, title = found.setdefault(place, []), _ARCHITECTURES[row["architecture"]]
            if title not in names:
                names.append(title)
    rows: Rows = [("source", "reason", "architectures"), "lll"]
    return [*rows, *((source, reason, ", ".join(names)) for (source, reason), names in found.items())]


def runtimes(read: Read) -> Rows:
    rows: Rows = [("runtime", "version", "given", "result"), "llll"]
    for row in read("runtimes-smollm2")["runtimes"]:
        given = "`model/`" if row["given"].startswith("model/") else "`nbl-export card DIR --transformers-js OUT`"
        rows.append((row["runtime"], row["version"] or "–", given, row["result"].split(":")[0]))
    return rows
