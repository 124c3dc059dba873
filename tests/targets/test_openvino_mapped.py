"""Weights that stay in a checkpoint's files while OpenVINO makes an IR in codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.model import mapped
from nbl_export.model.checkpoint import load
from nbl_export.targets.openvino.export import build
from nbl_export.targets.openvino.ir.files import difference, read_ir

from ..tiny import made_by, narrowed, record_of

Checkpoint = Callable[[str], Path]
FEW = [("gemma3", "bfloat16", "int8"), ("qwen2", "float16", "int4"), ("llama", "float32", "int4")]
MORE = [(name, "bfloat16", "int8") for name in made_by("openvino") if record_of(name).experts is None]


@pytest.mark.parametrize(
    ("name", "dtype", "precision"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.fuzz) for case in MORE if case not in FEW)],
)
def test_the_ir_is_that_of_the_whole_model(
    name: str, dtype: str, precision: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    given = narrowed(checkpoint(name), tmp_path / "checkpoint", dtype)
    for from_files in (True, False):
        build(given, tmp_path / str(from_files), precision, from_files)
    assert difference(read_ir(tmp_path / "True"), read_ir(tmp_path / "False")) == ""


def test_weights_stay_in_their_files(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a model that does not fit into memory, which is refused if it has to."""
    given = narrowed(checkpoint("llama"), tmp_path / "narrow", "bfloat16")
    mixed = narrowed(checkpoint("llama"), tmp_path / "mixed", "bfloat16", but="norm.weight")
    monkeypatch.setattr(mapped, "available_bytes", lambda: 1000)
    parameters = list(load.load_mapped(given).parameters())
    if sys.platform == "linux":
        assert set(map(_file_of, parameters)) == {given / "model.safetensors"}
    for refused in (lambda: load.load_mapped(mixed), lambda: load.load_model(given)):
        with pytest.raises(NblError, match="needs the whole torch model in memory"):
            refused()


def _file_of(parameter: Any) -> Path | None:
    """The file that a parameter's memory is mapped from."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        place, *_, file = line.split(maxsplit=5)
        first, end = (int(edge, 16) for edge in place.split("-"))
        if first <= parameter.data_ptr() < end:
            return Path(file)
    return None
