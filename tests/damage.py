"""Ways to damage files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["edit", "flip", "name_code", "named_code", "truncate"]

_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_CODE = ("auto_map", "custom_pipelines", "custom_generate")


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    facts = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}), encoding="utf-8")


def truncate(path: Path, keep: int) -> None:
    """Keep the first bytes only."""
    path.write_bytes(path.read_bytes()[:keep])


def name_code(directory: Path) -> None:
    """Let the settings of a folder name code: beside them, and on the hub."""
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    code = {"auto_map": {name: f"evil/repo--evil.{name}" for name in classes}, "custom_pipelines": {"x": {"impl": "e"}}}
    for name in _SETTINGS:
        edit(directory / name, **code, **({} if name == "tokenizer_config.json" else {"below": [{"auto_map": {}}]}))
    edit(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil/repo--evil.AutoTokenizer", None]})


def named_code(directory: Path) -> list[tuple[str, Any]]:
    """Names of settings at any depth that name code, and what they name."""
    found: list[tuple[str, Any]] = []

    def look(value: Any, name: str) -> None:
        if isinstance(value, dict):
            found.extend((name, value[key]) for key in _CODE if key in value)
        for below in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            look(below, name)

    for file in sorted(directory.rglob("*config.json")):
        look(json.loads(file.read_text(encoding="utf-8")), file.name)
    return found


def flip(path: Path) -> None:
    """Change the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
