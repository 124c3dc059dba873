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
from .command import configured, keys
from .hostile import (
    damage_bytes,
    damage_codes,
    damage_gguf,
    damage_json,
    damage_onnx,
    damage_safetensors,
    damage_sizes,
    damage_text,
    damage_toml,
    damage_xml,
)
from .hostile_folders import (
    damage_engine,
    damage_file,
    damage_genai,
    damage_links,
    damage_run,
    damage_settings,
    damage_sums,
    enlarge,
    plant_decoys,
    plant_links,
)
from .tiny import save_gguf

__all__ = ["COMMANDS", "KINDS", "REFUSED", "WORDS", "Kind", "has", "make_pristine", "victim"]

_FOLDERS = ("model", "graph", "run", "exit", "deploy", "gguf", "nbl", "codes", "awq")  # where canaries are planted
_FILES = ("maps.safetensors", "predicted_kv.safetensors", "text.txt", "text.jsonl", "text.jsonl.gz", "tiny.gguf",
          "options.toml")  # fmt: skip
_NAMES = (*_FOLDERS, "ir", "engine", *_FILES)


@dataclass(frozen=True)
class Kind:
    """One kind of hostile input.

    count: inputs of the long run. file: what is damaged, in the victim's directory. commands: one of them reads it.
    """

    count: int
    file: str
    damage: Callable[[Random, Path], object]
    commands: tuple[str, ...]
    needs: tuple[str, ...] = ()


def nothing(*_: object) -> None:
    """No file is damaged: the words of the command are hostile."""


# In a command, {here} is the victim's directory; what it writes goes to {here}/out or to the run that it names.
# {prompt} and {variables} are words (`hostile_words`).
_SMALL = " --calibration-tokens 64"
_TINY = f" --calibration {{here}}/text.txt --output {{here}}/out{_SMALL} --config "
_CALIBRATE = (
    f"calibrate --calibration {{here}}/text.txt --output {{here}}/out{_SMALL} {' '.join(keys(context=32))} "
    "--model {here}/"
)
_REWRITE = "rewrite-graph {here}/graph --output {here}/out --maps {here}/"
_BENCH = " --depth 0 --repetitions 1 --prompt-tokens 8 --generate-tokens 2"
_JOB = f"--model {{here}}/model{_TINY}{Path(__file__).parent / 'tiny.toml'}"
_GIVEN = f"--model {{here}}/nbl{_TINY}{Path(__file__).parent / 'bare.toml'}"
_OWN = f"--model {{here}}/model{_TINY}{{here}}/options.toml"
_GENERATE = "generate {here}/%s Hi --max-new-tokens 2"
MODEL = (_CALIBRATE + "model", _CALIBRATE + "model", "estimate {here}/model", _JOB)
SIZES = (_JOB, _JOB, "estimate {here}/model/config.json", _CALIBRATE + "model")
GGUF = (_CALIBRATE + "tiny.gguf", "estimate {here}/tiny.gguf")
NBL = ("estimate {here}/nbl", _GIVEN)
GRAPH = (_REWRITE + "maps.safetensors", "inspect {here}/graph/model.onnx --json", "inspect {here}/graph")
DEPLOY = (_GENERATE % "deploy", "bench {here}/deploy" + _BENCH)
_INT4 = " ".join(("--precision int4", *configured(builder_option="accuracy_level=1")))
CODES = (f"{_JOB} {_INT4} --quantized-model {{here}}/codes",)
IR, ENGINE = (_GENERATE % "ir",), (_GENERATE % "engine",)
READ = ("inspect {here}/run", "report {here}/run", _GENERATE % "run", "card {here}/run", "accept {here}/run")
RUN = (
    *READ, "plan {here}/run --layers 2", "rewrite {here}/run", "verify {here}/run", "build {here}/run",
    "bench {here}/run" + _BENCH, "eval {here}/run --perplexity a={here}/text.txt --limit 1 --ppl-context 16",
    "convert {here}/run --output {here}/out --to transformers", "convert {here}/run --output {here}/out --to edge-llm",
    "--config {here}/run/nbl.json --output {here}/out",
)  # fmt: skip
EXIT = (
    "plan {here}/exit --exit-layer 2 --recent-tokens 3", "rewrite {here}/exit", "verify {here}/exit",
    "report {here}/exit",
    _GENERATE % "exit", "convert {here}/exit --output {here}/out --to transformers",
)  # fmt: skip
HUB = MODEL[0].replace("{here}/text.txt", "allenai/c4/en@train")
# Also of whole folders: there is no GPU, and no hub.
REFUSED = {**dict.fromkeys(ENGINE, 1), "accept {here}/run": 1, "build {here}/run": 1, HUB: 1}
_OV = ("openvino",)
_LINKS = {
    "a checkpoint": ("model", MODEL[:3]), "a graph": ("graph", GRAPH), "a deployed folder": ("deploy", DEPLOY),
    "a run": ("run", RUN), "a run with an exit layer": ("exit", EXIT), "an NBL checkpoint": ("nbl", NBL),
    "an IR": ("ir", IR), "an engine": ("engine", ENGINE), "the folder of a GGUF": ("gguf", (_CALIBRATE + "gguf",)),
}  # fmt: skip
_IN_FOLDERS = ((damage_links, "a link in", 40), (plant_links, "planted links in", 80), (enlarge, "1 GiB in", 20))

KINDS: dict[str, Kind] = {
    "graph": Kind(700, "graph/model.onnx", damage_onnx, GRAPH),
    "graph, its bytes": Kind(200, "graph/model.onnx", damage_bytes, GRAPH[1:]),
    "data of a graph": Kind(60, "graph/model.onnx.data", damage_bytes, GRAPH[:1]),
    "maps": Kind(200, "maps.safetensors", damage_safetensors, GRAPH[:1]),
    "maps of predicted KV": Kind(150, "predicted_kv.safetensors", damage_safetensors,
                                   (_REWRITE + "predicted_kv.safetensors",)),
    "1 GiB of maps": Kind(2, "maps.safetensors", enlarge, GRAPH[:1]),
    "config.json": Kind(150, "model/config.json", damage_json, MODEL),
    "config.json that asks for code": Kind(150, "model/config.json", damage_settings, MODEL[:3]),
    "config.json with other sizes": Kind(120, "model/config.json", damage_sizes, SIZES),
    "tokenizer.json": Kind(80, "model/tokenizer.json", damage_json, MODEL[:2]),
    "tokenizer_config.json": Kind(150, "model/tokenizer_config.json", damage_settings, MODEL),
    "generation_config.json": Kind(60, "model/generation_config.json", damage_settings, MODEL),
    "weights": Kind(80, "model/model.safetensors", damage_safetensors, MODEL[:3]),
    "GGUF": Kind(250, "tiny.gguf", damage_gguf, GGUF),
    "NBL checkpoint": Kind(150, "nbl", damage_file, NBL),
    "codes of a checkpoint": Kind(60, "codes", damage_file, CODES),
    "text": Kind(40, "text.txt", damage_text, MODEL[:1]),
    "lines of JSON": Kind(30, "text.jsonl", damage_text, (MODEL[0].replace("text.txt", "text.jsonl"),)),
    "archive": Kind(30, "text.jsonl.gz", damage_text, (MODEL[0].replace("text.txt", "text.jsonl.gz"),)),
    "1 GiB of text": Kind(2, "text.jsonl", enlarge, (MODEL[0].replace("text.txt", "text.jsonl"),)),
    "configuration": Kind(150, "options.toml", damage_toml, (_OWN,)),
    "1 GiB of a configuration": Kind(2, "options.toml", enlarge, (_OWN,)),
    "genai_config.json": Kind(300, "deploy/genai_config.json", damage_genai, DEPLOY),
    "tokenizer_config.json deployed": Kind(80, "deploy/tokenizer_config.json", damage_settings, DEPLOY[:1]),
    "deployed folder": Kind(100, "deploy", damage_file, DEPLOY),
    "graph of an IR": Kind(150, "ir/openvino_model.xml", damage_xml, IR, _OV),
    "IR": Kind(50, "ir", damage_file, IR, _OV),
    "record of an engine": Kind(100, "engine/engine.json", damage_engine, ENGINE),
    "results of a run": Kind(100, "run/bench.json", damage_json, ("report {here}/run",)),
    "checks of a run": Kind(60, "run/verify.json", damage_json, ("report {here}/run", "card {here}/run")),
    "foreign run": Kind(450, "run", damage_run, RUN),
    "foreign run with an exit layer": Kind(150, "exit", damage_run, EXIT),
    "sums of exit layers": Kind(100, "exit", damage_sums, EXIT[:1]),
    "sums of layers": Kind(100, "run", damage_sums, RUN[5:6]),
    "shapes of codes": Kind(40, "awq/model.safetensors", damage_codes, (CODES[0].replace("/codes", "/awq"),)),
    "a prompt": Kind(40, "strange", nothing, ("generate {here}/deploy {prompt} --raw --max-new-tokens 2",
                                              "generate {here}/run {prompt} --max-new-tokens 2")),
    "variables of torchrun": Kind(60, "strange", nothing, (
        "doctor {variables}", "inspect {here}/run {variables}", _CALIBRATE + "model {variables}",
    )),
    "working directory": Kind(4, "strange", plant_decoys, (
        HUB, "doctor", f"calibrate --model {{here}}/model --output {{here}}/out{_SMALL}", "inspect {here}/graph",
    )),
    **{
        f"{said} {place}": Kind(count, folder, damage, commands, _OV * (folder == "ir"))
        for damage, said, count in _IN_FOLDERS
        for place, (folder, commands) in _LINKS.items()
    },
}  # fmt: skip
WORDS = {"prompt": "Hi", "variables": ""}  # of a whole command
COMMANDS = {command: kind for kind in KINDS.values() for command in kind.commands}


def has(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def make_pristine(here: Path, folders: Mapping[str, Path], text: str) -> None:
    """Everything that is damaged, whole; `folders` are those that other code makes."""
    for name, source in folders.items():
        shutil.copytree(source, here / name)
    if "ir" in folders:
        shutil.copytree(folders["ir"], here / "ir" / "deeper")
    for run, name in (("run", "maps"), ("exit", "predicted_kv")):
        shutil.copyfile(here / run / "maps.safetensors", here / f"{name}.safetensors")
    shutil.copyfile(Path(__file__).parent / "tiny.toml", here / "options.toml")
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
        "trt", "10.15", "fp16", "fused", ("8.9",), "NVIDIA L4", 1, 8, 64, (), (), (), 0, 0, 0, 0.0,
        len(plan), digest,
    )  # fmt: skip
    (here / "engine" / "decoder.engine").write_bytes(plan)
    write_json(here / "engine" / "engine.json", record.to_json())


def victim(pristine: Path, here: Path, kind: Kind, command: str, canaries: Canaries) -> Path:
    """A copy of what the command reads, with canaries in it, and what of it is to be damaged."""
    shutil.rmtree(here, ignore_errors=True)
    put_outside(here / "outside")
    for name in ("strange", "home", "temporary"):
        (here / name).mkdir()
    canaries.plant(here / "strange")
    for name in _NAMES:
        if f"{{here}}/{name}" not in command:
            continue
        if (pristine / name).is_dir():
            shutil.copytree(pristine / name, here / name)
        else:
            shutil.copyfile(pristine / name, here / name)
    if kind.damage is not damage_links:  # they are of the folder's own files
        for folder in _FOLDERS:
            if (here / folder).is_dir():
                canaries.plant(here / folder)
        for run in ("run", "exit"):
            if (here / run).is_dir():
                canaries.plant(here / run / "model")
    return here / kind.file
