"""The kinds of hostile input that `test_fuzz` damages and runs, and the whole folders that they start from."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from nbl_export.files import write_json
from nbl_export.targets.tensorrt.record import EngineRecord

from .canaries import Canaries, put_outside
from .hostile import damage_bytes, damage_json, damage_onnx, damage_safetensors, damage_text
from .hostile_folders import damage_genai, damage_links, damage_run, damage_settings, plant_links
from .tiny import save_gguf

__all__ = ["KINDS", "SMALL", "Kind", "has", "make_pristine", "options", "victim"]

SMALL = ("--calibration-tokens", "64", "--context", "32")
_FOLDERS = ("model", "graph", "run", "deploy", "gguf")  # where canaries are planted
_NAMES = (*_FOLDERS, "ir", "engine", "maps.safetensors", "text.txt", "text.jsonl", "text.jsonl.gz",
          "tiny.gguf")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of hostile input.

    file: what is damaged, in the victim's directory. command: with {here} for that directory; what it writes goes to
    {here}/out. status: how the command ends if nothing is damaged. needs: packages without which it does not run.
    """

    count: int
    file: str
    damage: Callable[[Random, Path], None]
    command: str
    status: int = 0
    needs: tuple[str, ...] = ()


GRAPH = "graph/model.onnx"
REWRITE = "rewrite-graph {here}/graph --maps {here}/maps.safetensors --output {here}/out"
CALIBRATE = "calibrate --model {here}/model --calibration {here}/text.txt --output {here}/out"
GENERATE = "generate {here}/deploy Hi --max-new-tokens 2"
BENCH = "--depth 0 --repetitions 1 --prompt-tokens 8 --generate-tokens 2"
KINDS: dict[str, Kind] = {
    "graph, its bytes, inspected": Kind(600, GRAPH, damage_bytes, "inspect {here}/graph/model.onnx"),
    "graph inspected": Kind(850, GRAPH, damage_onnx, "inspect {here}/graph/model.onnx --json"),
    "graph rewritten": Kind(1200, GRAPH, damage_onnx, REWRITE),
    "data of a graph": Kind(200, "graph/model.onnx.data", damage_bytes, REWRITE),
    "maps": Kind(900, "maps.safetensors", damage_safetensors, REWRITE),
    "nbl.json inspected": Kind(500, "run/nbl.json", damage_json, "inspect {here}/run"),
    "nbl.json reported": Kind(300, "run/nbl.json", damage_json, "report {here}/run"),
    "bench.json reported": Kind(200, "run/bench.json", damage_json, "report {here}/run"),
    "verify.json reported": Kind(150, "run/verify.json", damage_json, "report {here}/run"),
    "config.json": Kind(250, "model/config.json", damage_json, CALIBRATE),
    "tokenizer.json": Kind(150, "model/tokenizer.json", damage_json, CALIBRATE),
    "weights": Kind(150, "model/model.safetensors", damage_safetensors, CALIBRATE),
    "GGUF": Kind(150, "tiny.gguf", damage_bytes, CALIBRATE.replace("/model ", "/tiny.gguf ")),
    "text": Kind(60, "text.txt", damage_text, CALIBRATE),
    "lines of JSON": Kind(40, "text.jsonl", damage_text, CALIBRATE.replace("text.txt", "text.jsonl")),
    "archive": Kind(40, "text.jsonl.gz", damage_text, CALIBRATE.replace("text.txt", "text.jsonl.gz")),
    "config.json that asks for code": Kind(300, "model/config.json", damage_settings, CALIBRATE),
    "tokenizer_config.json": Kind(300, "model/tokenizer_config.json", damage_settings, CALIBRATE),
    "generation_config.json": Kind(150, "model/generation_config.json", damage_settings, CALIBRATE),
    "genai_config.json": Kind(600, "deploy/genai_config.json", damage_genai, GENERATE),
    "genai_config.json benched": Kind(100, "deploy/genai_config.json", damage_genai, "bench {here}/deploy " + BENCH),
    "tokenizer_config.json deployed": Kind(250, "deploy/tokenizer_config.json", damage_settings, GENERATE),
    "links in a checkpoint": Kind(200, "model", damage_links, CALIBRATE),
    "links in a graph": Kind(300, "graph", damage_links, REWRITE),
    "links in a deployed folder": Kind(250, "deploy", damage_links, GENERATE),
    "links in a run": Kind(60, "run", damage_links, "report {here}/run"),
    "foreign run inspected": Kind(300, "run", damage_run, "inspect {here}/run"),
    "foreign run generates": Kind(450, "run", damage_run, "generate {here}/run Hi --max-new-tokens 2"),
    "foreign run benched": Kind(100, "run", damage_run, "bench {here}/run " + BENCH),
    "foreign run reported": Kind(100, "run", damage_run, "report {here}/run"),
    "planted links in a checkpoint": Kind(500, "model", plant_links, CALIBRATE),
    "planted links in a graph": Kind(300, "graph", plant_links, REWRITE),
    "planted links in a deployed folder": Kind(300, "deploy", plant_links, GENERATE),
    "planted links in a run": Kind(300, "run", plant_links, "generate {here}/run Hi --max-new-tokens 2"),
    "planted links beside a GGUF": Kind(300, "gguf", plant_links, CALIBRATE.replace("/model ", "/gguf ")),
    "planted links in an IR": Kind(200, "ir", plant_links, GENERATE.replace("deploy", "ir"), needs=("openvino",)),
    "planted links in an engine": Kind(200, "engine", plant_links, GENERATE.replace("deploy", "engine"), status=1),
}


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def options(command: list[str]) -> tuple[str, ...]:
    """What a command takes beside, to be quick."""
    return SMALL if command[0] == "calibrate" else ()


def make_pristine(here: Path, folders: Mapping[str, Path], text: str) -> None:
    """Everything that is damaged, whole; `folders` are those that other code makes."""
    for name, source in folders.items():
        shutil.copytree(source, here / name)
    if "ir" in folders:
        shutil.copytree(folders["ir"], here / "ir" / "deeper")
    shutil.copyfile(here / "run" / "maps.safetensors", here / "maps.safetensors")
    (here / "text.txt").write_text(text[:3000])
    lines = "".join(json.dumps({"text": part}) + "\n" for part in text[:4000].split("\n\n"))
    (here / "text.jsonl").write_text(lines)
    (here / "text.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    save_gguf(here / "tiny.gguf")
    (here / "gguf").mkdir()
    shutil.copyfile(here / "tiny.gguf", here / "gguf" / "tiny.gguf")
    (here / "engine").mkdir()
    shutil.copyfile(here / "model" / "tokenizer.json", here / "engine" / "tokenizer.json")
    plan = b"an engine"
    digest = hashlib.sha256(plan).hexdigest()
    record = EngineRecord(
        "trt", "10.15", "fp16", "fused", ("8.9",), "NVIDIA L4", None, 1, 8, 64, (), (), (), 0, 0, 0, 0.0, 0.0,
        len(plan), digest, {},
    )  # fmt: skip
    (here / "engine" / "decoder.engine").write_bytes(plan)
    write_json(here / "engine" / "engine.json", record.to_json())


def victim(pristine: Path, here: Path, kind: Kind, canaries: Canaries) -> Path:
    """A copy of what the command reads, with canaries in it, and what of it is to be damaged."""
    shutil.rmtree(here, ignore_errors=True)
    put_outside(here / "outside")
    (here / "strange").mkdir()
    canaries.plant(here / "strange")
    for name in _NAMES:
        if f"{{here}}/{name}" not in kind.command:
            continue
        if (pristine / name).is_dir():
            shutil.copytree(pristine / name, here / name)
        else:
            shutil.copyfile(pristine / name, here / name)
    if not here.joinpath(kind.file).is_dir() or kind.damage is not damage_links:  # they are of the folder's own files
        for folder in _FOLDERS:
            if (here / folder).is_dir():
                canaries.plant(here / folder)
        if (here / "run").is_dir():
            canaries.plant(here / "run" / "model")
    return here / kind.file
