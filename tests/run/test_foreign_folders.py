"""Folders that a stranger made: pipes and devices in them, links out of them, and results that were edited."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.report import console, model, page
from nbl_export.run.deployed import describe
from nbl_export.run_directory import RunDirectory
from nbl_export.text.corpus import Corpus
from nbl_export.text.windows import pack

from ..command import assert_refused, nbl, snapshot
from ..hostile import places
from ..hostile_folders import rehash

pytestmark = pytest.mark.job


def test_a_prompt_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    assert_refused(nbl("generate", tmp_path, "w1 \udcff\udcfe", "--raw"), 1, "the prompt is not text in UTF-8")


def test_no_command_waits_for_a_pipe(
    checkpoint: Callable[[str], Path], exported: Callable[..., Path], run: Path, text: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    graph = shutil.copytree(exported("llama"), tmp_path / "graph")
    file = shutil.copytree(exported("llama"), tmp_path / "file")
    deployed = shutil.copytree(run / "model", tmp_path / "deployed")
    pipes = {
        model / "config.json": ("calibrate", "--model", model, "--calibration", text, "--output", tmp_path / "out"),
        graph / "genai_config.json": ("inspect", graph),
        file / "config.json": ("inspect", file / "model.onnx"),
        deployed / "tokenizer.json": ("generate", deployed, "Hi"),
        run / "model" / "tokenizer.json": ("generate", run, "Hi"),
        run / "bench.json": ("report", run),
    }
    for pipe, command in pipes.items():
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        assert_refused(nbl(*command), 1, pipe, "a pipe")
        pipe.unlink()


def test_a_graph_beside_a_socket_of_somebody_else_is_read(exported: Callable[..., Path], tmp_path: Path) -> None:
    """A file is looked at by itself: what else lies in its directory is no part of the model."""
    copy = shutil.copytree(exported("llama"), tmp_path / "graph")
    os.mkfifo(copy / "of-another-program")
    assert nbl("inspect", copy / "model.onnx").status == 0


@pytest.mark.parametrize("command", ["inspect", "rewrite"])
def test_settings_that_are_a_link_out_are_not_opened(
    command: str, exported: Callable[..., Path], finished: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(exported("llama"), tmp_path / "graph"))
    (copy / "genai_config.json").rename(tmp_path / "secret")
    (copy / "genai_config.json").symlink_to("../secret")
    maps = ("--maps", finished / "maps.safetensors", "--output", tmp_path / "out")
    for path in (copy, copy / "model.onnx"):
        arguments = ("inspect", path) if command == "inspect" else ("rewrite-graph", path, *maps)
        assert_refused(nbl(*arguments), 1, copy / "genai_config.json", "is a link out of its directory")
    assert not (tmp_path / "out").exists()


def test_no_sizes_are_read_through_a_link_out(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    (copy / "config.json").rename(tmp_path / "secret")
    (copy / "config.json").symlink_to("../secret")
    for path in (copy, copy / "config.json"):
        assert_refused(nbl("estimate", path), 1, copy / "config.json", "is a link out of its directory")


@pytest.mark.parametrize(("name", "key"), [("verify.json", "top1_agreement"), ("bench.json", "loads")])
def test_results_that_were_edited_and_hashed_again(name: str, key: str, run: Path) -> None:
    """The hash does not tell; a report is refused in one sentence, and nothing is lost."""
    value = json.loads((run / name).read_text(encoding="utf-8"))
    for row in (*value.get("quality_loss", ()), *value.get("timings", ())):
        row.pop(key)
    (run / name).write_text(json.dumps(value), encoding="utf-8")
    rehash(run, run / name)
    (run / "report.json").unlink()
    before = snapshot(run)
    assert_refused(nbl("report", run), 1, run / name, f"'{key}' is missing", "delete it", "--force")
    assert snapshot(run) == before


@pytest.mark.parametrize("name", ["nbl.json", "verify.json", "bench.json"])
def test_any_value_of_another_kind_is_refused_or_shown(name: str, run: Path) -> None:
    """Every value is missing, or of each other kind: what a command says of the run ends in a sentence of ours."""
    file, refused = run / name, 0
    others: tuple[Any, ...] = (None, [], {}, "x", [[]], -1, 1e300)
    whole = json.loads(file.read_text(encoding="utf-8"))
    for place in range(len(list(places(whole, 1)))):
        for wrong in others:
            changed = json.loads(json.dumps(whole))
            container, key = list(places(changed, 1))[place]
            if type(container[key]) is type(wrong):
                continue
            container[key] = wrong
            if wrong is None and isinstance(container, dict):
                del container[key]
            file.write_text(json.dumps(changed), encoding="utf-8")
            try:
                opened = RunDirectory.existing(run)
                console.checks_table(opened.read_json("verify.json"))
                console.describe_table(describe(run))
                model.scores(opened.manifest)
                report = page.of_run(opened)
                if report["bench"]:
                    console.speed_table(report)
            except NblError:
                refused += 1
    assert refused > 99


def test_an_architecture_that_is_none(run: Path) -> None:
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    manifest["decoder"]["architecture"] = "llama\n"
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert_refused(nbl("report", run), 1, "is not supported", "such as llama")


def test_a_tokenizer_with_settings_of_a_wrong_kind() -> None:
    def tokenizer(_piece: str, **_: object) -> None:
        raise TypeError("'>' not supported between instances of 'int' and 'str'")

    with pytest.raises(NblError, match="the model's tokenizer fails on t"):
        pack(Corpus("t", "0", ("words",)), tokenizer, 64, 32)


@pytest.mark.parametrize("name", ["bench.json", "maps.safetensors", "model/tokenizer.json", "nbl.json", "original"])
def test_a_link_out_of_a_run_directory_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    """Even to the very file that was there, or to a directory on another disk."""
    kept = shutil.move(run / name, tmp_path / "elsewhere")
    (run / name).symlink_to(kept)
    for command in (("report", run), ("inspect", run)):
        assert_refused(nbl(*command), 1, run / name, "link out of its directory")
