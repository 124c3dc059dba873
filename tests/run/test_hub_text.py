"""Text of the hub in a run directory: split once, and read from there ever after."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_export.files import file_sha256
from nbl_export.methods.linear import collect
from nbl_export.text import corpus
from nbl_export.text.mixture import HUB_MIX

from ..command import Outcome, assert_refused, keys, nbl, stage_lines, text_is_read
from ..damage import flip
from ..fake_datasets import MIX_ROWS, FakeDatasets
from ..fake_hub import FakeHub, fake_hub

pytestmark = [pytest.mark.job, pytest.mark.process]

KEPT = "text.safetensors"
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
        given = ("--model", checkpoint("llama"), "--calibration-tokens", 1024, *keys(context=64))
        return nbl("calibrate", *given, *more, "--output", tmp_path / name)

    return run


def facts_of(run: Path) -> Any:
    return json.loads((run / "nbl.json").read_text())["calibration"]


def test_a_rerun_reads_what_the_first_run_kept(
    calibrate: Calibrate, server: FakeHub, library: FakeDatasets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the hub, to the same moments; another directory reads the hub anew, to the same bytes."""
    run = tmp_path / "run"
    done = calibrate("run")
    assert done.status == 0, done.err
    assert f"reading from the hub: {', '.join(HUB_MIX)}" in done.err
    moments, facts = file_sha256(run / "sums.safetensors"), facts_of(run)
    assert facts["name"].startswith("hub mix: allenai/c4/en, ")
    assert [part["name"] for part in facts["parts"]] == list(HUB_MIX)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    library.serve({})
    before, asked = len(server.requests), list(library.asked)
    assert stage_lines(calibrate("run")) == {"calibrate": "reused"}
    assert stage_lines(nbl("plan", run, "--layers", 1)) == {"calibrate": "reused", "plan": "done"}
    (run / "sums.safetensors").unlink()
    assert stage_lines(calibrate("run")) == {"calibrate": "done"}
    assert file_sha256(run / "sums.safetensors") == moments and facts_of(run) == facts
    assert (len(server.requests), list(library.asked)) == (before, asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    library.serve(MIX_ROWS)
    assert calibrate("again").status == 0
    assert len(library.asked) == 2 * len(asked)
    assert (tmp_path / "again" / KEPT).read_bytes() == (run / KEPT).read_bytes()


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("text", [(), ("--calibration", "org/other")])
def test_a_damaged_text_is_not_read_and_a_lost_one_is_read_again(
    text: tuple[str, ...], calibrate: Calibrate, library: FakeDatasets, tmp_path: Path
) -> None:
    assert calibrate("run", *text).status == 0
    kept, asked = tmp_path / "run" / KEPT, len(library.asked)
    before = kept.read_bytes()
    flip(kept)
    for outcome in (calibrate("run", *text), nbl("plan", tmp_path / "run", "--layers", 1)):
        assert_refused(outcome, 1, kept, "start over with --force")
    assert len(library.asked) == asked
    kept.unlink()
    again = calibrate("run", *text)
    assert text_is_read(again) and stage_lines(again) == {"calibrate": "reused"}
    assert len(library.asked) == 2 * asked and kept.read_bytes() == before


@pytest.mark.usefixtures("server")
def test_an_interrupted_calibration_goes_on_with_the_text_that_was_read(
    calibrate: Calibrate, library: FakeDatasets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(collect, "Collection", lambda *_: 1 / 0)
        assert calibrate("run").status == 1
    library.serve({})
    done = calibrate("run")
    assert done.status == 0 and not text_is_read(done)
    assert len(library.asked) == 3


@pytest.mark.usefixtures("server")
def test_an_interrupted_change_of_text_harms_nothing(
    calibrate: Calibrate, library: FakeDatasets, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert calibrate("run").status == 0
    before, facts = file_sha256(tmp_path / "run" / KEPT), facts_of(tmp_path / "run")
    with monkeypatch.context() as broken:
        broken.setattr(collect, "Collection", lambda *_: 1 / 0)
        assert calibrate("run", "--calibration", "org/other").status == 1
    assert facts_of(tmp_path / "run") == facts and len(library.asked) == 4
    back = nbl("plan", tmp_path / "run", "--layers", 1)
    assert text_is_read(back) and stage_lines(back) == {"calibrate": "reused", "plan": "done"}, back.err
    assert file_sha256(tmp_path / "run" / KEPT) == before
    changed = calibrate("run", "--calibration", "org/other")
    assert stage_lines(changed) == {"calibrate": "done"}
    assert facts_of(tmp_path / "run")["name"] == "org/other"
    asked = len(library.asked)
    assert stage_lines(calibrate("run", "--calibration", "org/other")) == {"calibrate": "reused"}
    assert len(library.asked) == asked


@pytest.mark.usefixtures("server")
def test_a_file_beside_a_dataset_is_read_as_it_is_now(
    calibrate: Calibrate, library: FakeDatasets, text: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copy(text, tmp_path / "own.txt"))
    given = ("run", "--calibration", own, "--calibration", "org/other")
    assert calibrate(*given).status == 0
    assert stage_lines(calibrate(*given)) == {"calibrate": "reused"}
    own.write_text(own.read_text()[5000:])
    assert stage_lines(calibrate(*given)) == {"calibrate": "done"}


def test_a_text_that_changed_only_beyond_what_is_read_calibrates_nothing_anew(
    calibrate: Calibrate, text: Path, tmp_path: Path
) -> None:
    """The tokens that a stage reads are in its key, and not the file."""
    own = Path(shutil.copy(text, tmp_path / "own.txt"))
    given = ("run", "--calibration", own)
    assert calibrate(*given).status == 0
    own.write_text(f"{own.read_text()} and some words more")
    again = calibrate(*given)
    assert text_is_read(again) and stage_lines(again) == {"calibrate": "reused"}
    assert facts_of(tmp_path / "run")["sha256"] == file_sha256(own)
    own.unlink()
    assert stage_lines(nbl("plan", tmp_path / "run", "--layers", 1)) == {"calibrate": "reused", "plan": "done"}
    (tmp_path / "run" / KEPT).unlink()
    assert_refused(nbl("plan", tmp_path / "run", "--layers", 2), 1, "no calibration text at", own)
    shutil.copy(text, own)
    assert_refused(nbl("plan", tmp_path / "run", "--layers", 2), 1, "has changed since this run; restore it")


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
    assert "HF_HUB_OFFLINE is set and the default text (offline)" in caplog.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert stage_lines(calibrate("run")) == {"calibrate": "reused"}
    assert (server.requests, list(library.asked)) == ([], [])
    assert calibrate("run", "--force").status == 0 and len(library.asked) == 3
