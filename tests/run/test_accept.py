"""`accept` on a finished run: files, statuses and refusals. The CPU provider stands in for CUDA."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import CorruptError, NblError
from nbl_export.run import accept as accepting
from nbl_export.run.deployed import Located
from nbl_export.run.progress import Ui
from nbl_export.targets import load_engine

from ..command import assert_refused, nbl
from ..fake_engine import ChildHere, Faulty

pytestmark = pytest.mark.trt


@dataclasses.dataclass(frozen=True)
class StandInProvider:
    fault: str = ""

    def open(self, directory: Path, _threads: int | None = None) -> Any:
        if self.fault == "no GPU":
            raise NblError("no GPU is here")
        return Faulty(load_engine("ort", "cuda").open_checked(directory), self.fault)


def accepted(run: Path, fault: str = "") -> dict[str, Any]:
    return accepting.accept(run, Ui(quiet=True), open_runner=StandInProvider(fault).open)


@pytest.fixture(scope="module")
def made(same: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for the CUDA provider. Never write to it."""
    output = tmp_path_factory.mktemp("accept-cuda") / "run"
    done = nbl(*same, "--provider", "cuda", "--output", output)
    assert done.status == 0, done.err
    return output


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks run in this process."""
    monkeypatch.setattr(accepting, "Child", ChildHere)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_both_decoders_pass(run: Path) -> None:
    """Each in a process of its own, as on a GPU."""
    found = accepted(run)
    assert found["status"] == "verified", found
    checks = [(check["subject"], check["check"]) for check in found["checks"]]
    order = ["last_token", "text", "clock"]
    assert [check for subject, check in checks if subject == "original"] == [*["original"] * 6, *order]
    assert [check for subject, check in checks if subject == "nbl"] == [*["nbl"] * 6, *order]
    assert found["engine"] == "ort --provider cuda"
    assert found["versions"]["onnxruntime"]
    assert json.loads((run / "acceptance.json").read_text(encoding="utf-8")) == found


@pytest.mark.usefixtures("here")
def test_an_interrupted_acceptance_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another engine has passed does not count; neither do the checks of an edited file."""
    examined = accepting.examined
    asked: list[str] = []

    def stops(open_runner: Any, subject: str, *given: Any) -> list[dict[str, Any]]:
        asked.append(subject)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return examined(open_runner, subject, *given)

    monkeypatch.setattr(accepting, "examined", stops)
    with pytest.raises(KeyboardInterrupt):
        accepted(run)
    note = run / "acceptance.json"
    before = note.read_text(encoding="utf-8")
    found = json.loads(before)
    assert found["status"] == "incomplete" and {check["subject"] for check in found["checks"]} == {"original"}
    for changed, expected in (
        ({}, ["nbl"]),
        ({"stages": {}}, ["original", "nbl"]),
        ({"checks": [{"subject": "original"}]}, ["original", "nbl"]),
    ):
        note.write_text(json.dumps({**found, **changed}), encoding="utf-8")
        asked[:] = ["", ""]
        assert accepted(run)["status"] == "verified"
        assert asked[2:] == expected
    asked[:] = ["", ""]
    accepted(run)  # a finished one starts anew
    assert asked[2:] == ["original", "nbl"]


@pytest.mark.usefixtures("here")
def test_the_command_ends_with_its_statuses(run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fault, status, said in (("", 0, ""), ("nan", 3, "check original of original failed: relative rms ")):
        monkeypatch.setattr(Located, "open", StandInProvider(fault).open)
        done = nbl("accept", run, "--json")
        assert done.status == status and said in done.err, done
        assert json.loads(done.out)["status"] == {0: "verified", 3: "failed"}[status]
    assert "Acceptance, ort --provider cuda" in nbl("accept", run).out
    monkeypatch.setattr(Located, "open", StandInProvider("no GPU").open)
    assert_refused(nbl("accept", run), 1, "cannot be accepted here: no GPU is here")
    assert_refused(nbl("accept", finished), 1, "accept is for engines of a GPU")


def test_a_run_without_values_is_refused(run: Path) -> None:
    (run / "acceptance-values.json").unlink()
    with pytest.raises(CorruptError, match=r"acceptance-values\.json is missing"):
        accepted(run)
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    del manifest["stages"]["verify"]["files"]["acceptance-values.json"]
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert_refused(nbl("accept", run), 1, "acceptance-values.json is missing, which verification leaves")
    assert not (run / "acceptance.json").exists()


def test_values_of_another_precision_are_refused(run: Path) -> None:
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    manifest["options"]["precision"] = "fp16" if manifest["options"]["precision"] != "fp16" else "int4"
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert_refused(nbl("accept", run), 1, "acceptance-values.json is of", "verify again where it was made")
