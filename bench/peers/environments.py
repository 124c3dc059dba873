"""Where the peers' own environments lie, and what each is made from.

CACHE/<peer>/           a virtual environment, or node_modules
CACHE/<peer>/.pinned    the pins it was made from, written last
CACHE/models/<digest>/  what was converted from one checkpoint or GGUF file
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CACHE", "HERE", "PEERS", "binary", "missing", "pins"]

HERE = Path(__file__).parent
CACHE = Path(".peers")
PEERS = ("torch", "optimum-onnx", "openvino", "llama-cpp")
_MARK = ".pinned"


def pins(peer: str) -> str:
    """The pinned packages of a peer, as text."""
    file = HERE / "llama-cpp" / "package-lock.json" if peer == "llama-cpp" else HERE / "requirements" / f"{peer}.txt"
    return file.read_text(encoding="utf-8")


def mark(cache: Path, peer: str) -> Path:
    """The file that says an environment is complete."""
    return cache / peer / _MARK


def missing(cache: Path, peer: str) -> str:
    """Why an environment cannot be used, or nothing."""
    make = f"python bench/peers/setup.py {peer} --cache {cache}"
    if not mark(cache, peer).is_file():
        return f"not installed: {cache / peer} is not there or not complete; {make}"
    if mark(cache, peer).read_text(encoding="utf-8") != pins(peer):
        return f"{cache / peer} was made from other pins than these; {make}"
    return ""


def binary(cache: Path, peer: str, name: str) -> Path:
    """A program of a peer's virtual environment."""
    folder, suffix = ("Scripts", ".exe") if os.name == "nt" else ("bin", "")
    return (cache / peer / folder / (name + suffix)).absolute()
