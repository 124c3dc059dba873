"""Mistakes that people make often: one sentence that says what was meant, or the value is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint.source import resolve

from ..command import assert_refused, nbl

pytestmark = pytest.mark.job


def test_weights_are_named_instead_of_their_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(NblError, match=f"give its directory, {tmp_path}$"):
        resolve(str(tmp_path / "model.safetensors"))


def test_a_run_is_named_instead_of_its_model(tmp_path: Path) -> None:
    (tmp_path / "nbl.json").write_text("{}")
    with pytest.raises(NblError, match="is a run directory, not a model; give the model that the run was made from"):
        resolve(str(tmp_path))


def test_serve_is_no_command() -> None:
    assert_refused(nbl("serve", "DIR"), 2, "serve is no command", "nbl-export convert DIR", "docs/serving.md")


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    assert_refused(nbl("inspect", tmp_path / "junk.gguf"), 1, "junk.gguf is a file, and no run directory")


def test_an_evaluation_refuses_an_option_without_effect(tmp_path: Path) -> None:
    done = nbl("eval", tmp_path / "none", "--tasks", "piqa", "--ppl-context", "64")
    assert_refused(done, 2, "--ppl-context is for --perplexity")
