"""Text of the hub in a run directory: kept at first, read from there ever after, and whole or not there."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_export.calibrate import collect
from nbl_export.files import file_sha256
from nbl_export.text import corpus
from nbl_export.text.mixture import HUB_MIX

from ..command import Outcome, assert_refused, nbl, stage_lines
from ..fake_datasets import MIX_ROWS, FakeDatasets
from ..fake_hub import FakeHub, fake_hub

KEPT = "calibration.jsonl.gz"
WORDS = "words of an other text that somebody gave to the hub, in a few rows of a single column. "
OTHER = {"org/other@train": [{"text": f"{i} {WORDS * 20}"} for i in range(30)]}
Calibrate = Callable[..., Outcome]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    found = FakeDatasets(tmp_path / "library", monkeypatch)
    found.serve({**MIX_ROWS, **OTHER})
    return found


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: FakeDatasets) -> Iterator[FakeHub]:
    with fake_hub() as found:
        for name, value in found.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def calibrate(checkpoint: Callable[[str], Path], tmp_path: Path) -> Calibrate:
    """(name of the run directory, more options) -> what the command says."""

    def run(name: str, *more: object) -> Outcome:
        given = ("--model", checkpoint("llama"), "--calibration-tokens", 1024, "--context", 64)
        return nbl("calibrate", *given, *more, "--output", tmp_path / name)

    return run


def facts_of(run: Path) -> Any:
    return json.loads((run / "nbl.json").read_text())["calibration"]


def damage(path: Path) -> None:
    """Another word in one document; the file is as well packed as before."""
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"words", b"sword", 1)))


def test_a_rerun_reads_what_the_first_run_kept(
    calibrate: Calibrate, server: FakeHub, library: FakeDatasets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the hub, to the same moments; another directory reads the hub anew, to the same bytes."""
    run = tmp_path / "run"
    done = calibrate("run")
    assert done.status == 0, done.err
    assert f"reading from the hub: {', '.join(HUB_MIX)}" in done.err
    moments, facts = file_sha256(run / "moments.safetensors"), facts_of(run)
    assert facts["name"].startswith("hub mix: allenai/c4/en, ")
    assert [part["name"] for part in facts["parts"]] == list(facts["hub"]) == list(HUB_MIX)
    assert {part["sha256"] for part in facts["parts"]} == {found["sha256"] for found in facts["hub"].values()}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library.serve({})
    before, asked = len(server.requests), list(library.asked)
    assert stage_lines(calibrate("run")) == {"calibrate": "reused"}
    assert stage_lines(nbl("plan", run, "--layers", 1)) == {"calibrate": "reused", "plan": "done"}
    (run / "moments.safetensors").unlink()
    assert stage_lines(calibrate("run")) == {"calibrate": "done"}
    assert file_sha256(run / "moments.safetensors") == moments and facts_of(run) == facts
    assert (len(server.requests), list(library.asked)) == (before, asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    library.serve(MIX_ROWS)
    assert calibrate("again").status == 0
    assert len(library.asked) == 2 * len(asked)
    assert (tmp_path / "again" / KEPT).read_bytes() == (run / KEPT).read_bytes()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("action", [damage, Path.unlink, cut])
@pytest.mark.parametrize("text", [(), ("--calibration", "org/other")])
def test_a_damaged_kept_text_is_not_read(
    text: tuple[str, ...], action: Callable[[Path], Any], calibrate: Calibrate, library: FakeDatasets, tmp_path: Path
) -> None:
    assert calibrate("run", *text).status == 0
    kept, asked = tmp_path / "run" / KEPT, len(library.asked)
    before = kept.read_bytes()
    action(kept)
    for outcome in (calibrate("run", *text), nbl("plan", tmp_path / "run", "--layers", 1)):
        assert_refused(outcome, 1, kept, "restore it, or start over with --force")
    assert len(library.asked) == asked
    done = calibrate("run", *text, "--force")
    assert stage_lines(done) == {"calibrate": "done"} and kept.read_bytes() == before


@pytest.mark.usefixtures("server")
def test_before_the_first_finished_stage_the_hub_is_read_anew(
    calibrate: Calibrate, library: FakeDatasets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(collect, "Collection", lambda *_: 1 / 0)
        assert calibrate("run").status == 1
    before = (tmp_path / "run" / KEPT).read_bytes()
    assert calibrate("run").status == 0 and len(library.asked) == 3
    (tmp_path / "run" / "nbl.json").write_text(
        json.dumps({**json.loads((tmp_path / "run" / "nbl.json").read_text()), "stages": {}})
    )
    damage(tmp_path / "run" / KEPT)
    assert calibrate("run").status == 0 and len(library.asked) == 6
    assert (tmp_path / "run" / KEPT).read_bytes() == before


@pytest.mark.usefixtures("server")
def test_an_interrupted_change_of_text_harms_nothing(
    calibrate: Calibrate, library: FakeDatasets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert calibrate("run").status == 0
    with monkeypatch.context() as broken:
        broken.setattr(collect, "Collection", lambda *_: 1 / 0)
        assert calibrate("run", "--calibration", "org/other").status == 1
    asked = len(library.asked)
    assert stage_lines(calibrate("run")) == {"calibrate": "reused"}
    assert len(library.asked) == asked
    changed = calibrate("run", "--calibration", "org/other")
    assert stage_lines(changed) == {"calibrate": "done"}
    assert list(facts_of(tmp_path / "run")["hub"]) == ["org/other"]
    assert stage_lines(calibrate("run", "--calibration", "org/other")) == {"calibrate": "reused"}


@pytest.mark.usefixtures("server")
def test_a_file_beside_a_dataset_is_read_as_it_is_now(
    calibrate: Calibrate, library: FakeDatasets, text: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copy(text, tmp_path / "own.txt"))
    given = ("run", "--calibration", f"{own}:2", "--calibration", "org/other")
    assert calibrate(*given).status == 0
    assert stage_lines(calibrate(*given)) == {"calibrate": "reused"}
    own.write_text(own.read_text()[5000:])
    assert stage_lines(calibrate(*given)) == {"calibrate": "done"}
    assert list(library.asked) == ["org/other@train"]
    assert calibrate("run", "--calibration", own, "--force").status == 0
    assert not (tmp_path / "run" / KEPT).exists()


def test_a_dataset_that_breaks_leaves_nothing(calibrate: Calibrate, library: FakeDatasets, tmp_path: Path) -> None:
    library.serve({"org/other@train": [*OTHER["org/other@train"], "break"]})
    outcome = calibrate("run", "--calibration", "org/other")
    assert_refused(outcome, 1, "hub dataset org/other cannot be read (ConnectionError: the network is gone)")
    assert not (tmp_path / "run").exists()


def test_a_run_that_began_without_the_hub_goes_on_without_it(
    calibrate: Calibrate, server: FakeHub, library: FakeDatasets, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(corpus, "_package_files", list)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert calibrate("run").status == 0
    assert "HF_HUB_OFFLINE is set and the package" in caplog.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert stage_lines(calibrate("run")) == {"calibrate": "reused"}
    assert "began without the hub (--force starts over)" in caplog.text
    assert (server.requests, list(library.asked)) == ([], [])
    assert calibrate("run", "--force").status == 0 and len(library.asked) == 3
