"""A GGUF file becomes a checkpoint in float weights, or leaves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint import load
from nbl_export.methods.checkpoint import source as checkpoint_source

from ..tiny import save_gguf


def at_each_dequantisation(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    from transformers import modeling_gguf_pytorch_utils as library

    real = gguf.dequantize

    def watched(*given: Any) -> Any:
        do()
        return real(*given)

    monkeypatch.setattr(gguf, "dequantize", watched)
    monkeypatch.setattr(library, "dequantize", watched, raising=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), OSError(28, "full")])
def test_an_interrupted_conversion_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    source = checkpoint_source.resolve(str(save_gguf(tmp_path / "tiny.gguf")))
    target, calls = tmp_path / "run" / "checkpoint", list[bool]()

    def fail() -> None:
        calls.append(target.exists())  # so a process that is killed leaves none either
        if len(calls) == 12:
            raise error

    with monkeypatch.context() as patch:
        at_each_dequantisation(patch, fail)
        expected = NblError if isinstance(error, Exception) else type(error)
        with pytest.raises(expected, match=r"tiny\.gguf cannot be loaded" if expected is NblError else None) as raised:
            load.materialise(source, target)
        assert error in (raised.value, raised.value.__cause__)  # `friendly_os_errors` sees a full disk
    assert calls == [False] * 12
    assert not list((tmp_path / "run").iterdir())
    assert (load.materialise(source, target) / "model.safetensors").is_file()


def test_a_gguf_larger_than_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbl_export.model.mapped.available_bytes", lambda: 1000)
    source = checkpoint_source.resolve(str(save_gguf(tmp_path / "tiny.gguf")))
    with pytest.raises(NblError, match=r"the conversion of tiny\.gguf \(safetensors need none\) needs the whole torch"):
        load.materialise(source, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
