"""Who takes part: every decoder with its child's command, and who is absent, with the reason."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import conversions
from environments import HERE, binary, missing
from gguf_types import bits_of_gguf

__all__ = ["Absent", "Contender", "Request", "contenders"]

_ROOT = HERE.parent.parent
PEERS = ("torch", "torch-compile", "optimum-onnx", "openvino", "llama-cpp")


@dataclass(frozen=True)
class Contender:
    """A decoder that can be started. config: what its child is told, beside threads and capacity."""

    name: str
    peer: str
    precision: str
    command: tuple[str, ...]
    config: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Absent:
    """A decoder that does not take part."""

    name: str
    peer: str
    precision: str
    reason: str


@dataclass(frozen=True)
class Request:
    """What the user asked run.py for."""

    directories: Sequence[Path]
    checkpoint: Path | None
    ggufs: Sequence[Path]
    gguf_types: Sequence[str]
    peers: Sequence[str]
    cache: Path


def contenders(request: Request) -> Iterator[Contender | Absent]:
    """Ours first. Conversions that are not there yet are made on the way, which takes minutes."""
    yield from _ours(request.directories)
    makers = {"optimum-onnx": _optimum, "openvino": _openvino, "llama-cpp": _llama}
    for peer in PEERS:
        if peer not in request.peers:
            yield Absent(peer, peer, "", "left out by --peers")
        elif peer in makers:
            yield from makers[peer](request)
        else:
            yield from _torch(request, peer)


def _ours(directories: Sequence[Path]) -> Iterator[Contender]:
    for directory in directories:
        precision = json.loads((directory / "nbl.json").read_text(encoding="utf-8"))["options"]["precision"]
        for part in ("original", "model"):
            path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {"PYTHONPATH": os.pathsep.join(path)}
            command = (sys.executable, str(HERE / "nbl.py"))
            name = f"{directory.name}/{part}"
            yield Contender(name, "nbl-export", precision, command, {"model": str(directory / part)}, environment)


def _torch(request: Request, peer: str) -> Iterator[Contender | Absent]:
    lacking = missing(request.cache, "torch") or _no_checkpoint(request)
    for precision in ("fp32", "bf16"):
        name = f"{peer} {precision}"
        if lacking:
            yield Absent(name, peer, precision, lacking)
            continue
        config = {"model": str(request.checkpoint), "precision": precision, "variant": peer.partition("-")[2]}
        command = (str(binary(request.cache, "torch", "python")), str(HERE / "torch_peer.py"))
        yield Contender(name, peer, precision, command, config)


def _optimum(request: Request) -> Iterator[Contender | Absent]:
    lacking = missing(request.cache, "optimum-onnx") or _no_checkpoint(request)
    model: Path | None = None
    if not lacking:
        assert request.checkpoint is not None
        try:
            model = conversions.optimum_onnx(request.cache, request.checkpoint, _models(request, request.checkpoint))
        except Exception as error:  # a foreign tool's, whatever it is
            lacking = str(error)
    for variant in ("", "io-binding"):
        name = f"optimum-onnx fp32 {variant}".strip()
        if model is None:
            yield Absent(name, "optimum-onnx", "fp32", lacking)
            continue
        command = (str(binary(request.cache, "optimum-onnx", "python")), str(HERE / "optimum_peer.py"))
        yield Contender(name, "optimum-onnx", "fp32", command, {"model": str(model), "variant": variant})


def _openvino(request: Request) -> Iterator[Contender | Absent]:
    lacking = missing(request.cache, "openvino") or _no_checkpoint(request)
    for precision in ("fp32", "fp16", "int8", "int4"):
        name, reason = f"openvino {precision}", lacking
        if not reason:
            assert request.checkpoint is not None
            try:
                models = _models(request, request.checkpoint)
                model = conversions.openvino(request.cache, request.checkpoint, precision, models)
                command = (str(binary(request.cache, "openvino", "python")), str(HERE / "openvino_peer.py"))
                yield Contender(name, "openvino", precision, command, {"model": str(model)})
                continue
            except Exception as error:
                reason = str(error)
        yield Absent(name, "openvino", precision, reason)


def _llama(request: Request) -> Iterator[Contender | Absent]:
    lacking = missing(request.cache, "llama-cpp")
    node = shutil.which("node")
    if not lacking and node is None:
        lacking = "node is not on the path"
    if not lacking and not request.ggufs:
        lacking = "no --gguf was given"
    if lacking:
        for kind in request.gguf_types:
            yield Absent(f"llama.cpp {kind}", "llama-cpp", kind, lacking)
        return
    assert node is not None
    models = _models(request, request.ggufs[0])
    made = [(kind, conversions.converted_gguf(request.ggufs[0], kind, models)) for kind in request.gguf_types]
    for kind, path in [*made, *((p.stem, p) for p in request.ggufs)]:
        nominal, real = bits_of_gguf(path)
        packages = str((request.cache / "llama-cpp").absolute())
        config = {"model": str(path.absolute()), "packages": packages, "weight_bits": nominal, "bits_per_weight": real}
        command = (node, str(HERE / "llama-cpp" / "peer.mjs"))
        yield Contender(f"llama.cpp {kind}", "llama-cpp", kind, command, config)


def _no_checkpoint(request: Request) -> str:
    if request.checkpoint is None:
        return "no checkpoint: give one with --checkpoint"
    return ""


def _models(request: Request, source: Path) -> Path:
    return request.cache / "models" / conversions.digest_of(source)
