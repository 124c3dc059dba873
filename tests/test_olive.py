"""The passes for Olive with a stand-in for Olive's classes: what they write, and what they leave alone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nbl_export.errors import NblError


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `nbl_export.olive`, whose jobs write a graph and nothing else."""
    names = {"olive": (), "olive.model": ("HfModelHandler", "ONNXModelHandler"), "olive.passes": ("Pass",),
             "olive.passes.pass_config": ("PassConfigParam",)}  # fmt: skip
    for name, classes in names.items():
        module = ModuleType(name)
        vars(module).update({kind: type(kind, (), {}) for kind in classes})
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "nbl_export.olive", raising=False)
    found = importlib.import_module("nbl_export.olive")
    monkeypatch.setattr(found, "_handler", lambda _before, directory, graph: directory / graph)
    monkeypatch.setattr(found, "run_job", lambda _options, run, _ui: _write(run / "model"))
    monkeypatch.setattr(found, "rewrite_given", lambda _source, _maps, _layers, _tap, out: _write(out))
    yield found
    sys.modules.pop("nbl_export.olive")


def _write(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "model.onnx").write_text("ours")


@pytest.mark.parametrize("name", ["v1.5", "v1.5.onnx"])
@pytest.mark.parametrize("kind", ["Nbl", "NblRewrite"])
def test_directories_of_similar_names_stay(kind: str, name: str, passes: Any, tmp_path: Path) -> None:
    model = SimpleNamespace(model_path=str(tmp_path / "given.onnx"), model_name_or_path="org/name")
    config = SimpleNamespace(options={}, maps="maps", layers=None, tap=None)
    mine = {tmp_path / place / "mine" for place in ("v1", "v1.5")}
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "mine").write_text("mine")
    written = getattr(passes, kind)()._run_for_config(model, config, str(tmp_path / name))
    assert written.parent == tmp_path / "v1.5" and (tmp_path / "v1.5" / "model.onnx").read_text() == "ours"
    (tmp_path / "v1.5" / "mine").write_text("mine")
    with pytest.raises((NblError, FileExistsError)):
        getattr(passes, kind)()._run_for_config(model, config, str(tmp_path / name))
    assert {file.read_text() for file in mine} == {"mine"}
