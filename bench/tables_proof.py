"""Tables of architectures and runtimes, made from raw results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Rows = list[Sequence[str]]
Read = Callable[[str], Any]


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


_SOURCES = {"genai": "GenAI builder", "mobius": "mobius", "static": "TensorRT form", "openvino": "OpenVINO"}
_SAID = {"parity": "verified", "parity failed": "fails verification"}


def architectures(read: Read) -> Rows:
    """What each source of graphs makes of an architecture in float32. Those with the same answers share a row."""
    found: dict[str, dict[str, str]] = {}
    for row in read("architectures")["rows"]:
        if row["precision"] == "fp32":
            found.setdefault(row["architecture"], {})[row["source"]] = _SAID.get(row["status"], str(row["status"]))
    alike: dict[tuple[str, ...], list[str]] = {}
    if found.keys() != _ARCHITECTURES.keys():
        raise ValueError("architectures.json has other architectures than the table")
    for name, title in _ARCHITECTURES.items():
        alike.setdefault(tuple(found[name][source] for source in _SOURCES), []).append(title)
    return [("", *_SOURCES.values()), "lllll", *(("; ".join(names), *said) for said, names in alike.items())]


def runtimes(read: Read) -> Rows:
    rows: Rows = [("runtime", "version", "given", "result"), "llll"]
    for row in read("runtimes-smollm2")["runtimes"]:
        given = "`model/`" if row["given"].startswith("model/") else "`bench/runtimes/layout.py`"
        rows.append((row["runtime"], row["version"] or "–", given, row["result"].split(":")[0]))
    return rows
