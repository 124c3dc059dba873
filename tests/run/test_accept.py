"""`accept` on a finished run: files, statuses and refusals. The CPU provider stands in for CUDA."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import CorruptError
from nbl_export.run import accept as accepting
from nbl_export.run.progress import Ui
from nbl_export.targets import load_engine
from nbl_export.targets.base import Availability

from ..command import assert_refused, nbl
from ..fake_engine import Faulty

pytestmark = pytest.mark.trt


@dataclasses.dataclass(frozen=True)
class StandInProvider:
    fault: str = ""

    def probe_run(self) -> Availability:
        return Availability(self.fault != "no GPU", "a stand-in" if self.fault != "no GPU" else "no GPU is here")

    def open_runner(self, directory: Path, _threads: int | None = None) -> Any:
        return Faulty(load_engine("ort", "cuda").open_checked(directory), self.fault)


def here(find: Any, *given: Any) -> Generator[accepting.Event, None, None]:
    """The checks in this process."""
    events: list[accepting.Event] = []
    before = list(logging.getLogger().handlers)
    accepting.examine(events.append, find, *given)
    logging.getLogger().handlers[:] = before
    yield from events


def accepted(run: Path, fault: str = "", **how: Any) -> dict[str, Any]:
    find: Any = functools.partial(StandInProvider, fault)
    return accepting.accept(run, Ui(quiet=True), find=find, **{"look": here, **how})


@pytest.fixture(scope="module")
def made(same: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run for the CUDA provider. Never write to it."""
    output = tmp_path_factory.mktemp("accept-cuda") / "run"
    done = nbl(*same, "--provider", "cuda", "--output", output)
    assert done.status == 0, done.err
    return output


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_both_decoders_pass(run: Path) -> None:
    """Each in a process of its own, as on a GPU."""
    found = accepted(run, look=accepting.examined)
    assert found["status"] == "passed", found
    checks = [(check["subject"], check["check"]) for check in found["checks"]]
    order = ["last_token", "text", "clock"]
    assert [check for subject, check in checks if subject == "original"] == ["structure", *["original"] * 7, *order]
    assert [check for subject, check in checks if subject == "nbl"] == ["structure", *["nbl"] * 7, *order]
    assert found["engine"] == "ort --provider cuda"
    assert found["versions"]["onnxruntime"]
    assert json.loads((run / "acceptance.json").read_text(encoding="utf-8")) == found


def test_each_result_is_written_as_it_comes(run: Path) -> None:
    def stops(*given: Any) -> Generator[accepting.Event, None, None]:
        for number, event in enumerate(here(*given)):
            if number == 4:
                raise KeyboardInterrupt
            yield event

    with pytest.raises(KeyboardInterrupt):
        accepted(run, look=stops)
    found = json.loads((run / "acceptance.json").read_text(encoding="utf-8"))
    assert found["status"] == "incomplete" and [check["check"] for check in found["checks"]] == ["structure"]


def test_the_command_ends_with_its_statuses(run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fault, status, said in (
        ("", 0, ""),
        ("no GPU", 1, "cannot be accepted here: no GPU is here"),
        ("nan", 3, "check original of original failed: relative rms "),
    ):
        find: Any = functools.partial(StandInProvider, fault)
        monkeypatch.setattr(accepting, "accept", functools.partial(_accept, find))
        done = nbl("accept", run, "--json")
        assert done.status == status and said in done.err, done
        found = json.loads(done.out)
        assert found["status"] == {0: "passed", 3: "failed", 1: "cannot run"}[status]
        assert bool(found["checks"]) == (fault != "no GPU")
    assert "Acceptance, ort --provider cuda" in nbl("accept", run).out
    monkeypatch.undo()
    assert_refused(nbl("accept", finished), 1, "accept is for engines of a GPU")


_REAL = accepting.accept


def _accept(find: Any, directory: Path, ui: Ui, **how: Any) -> dict[str, Any]:
    return _REAL(directory, ui, find=find, look=here, **how)


def test_a_run_without_values_is_refused(run: Path) -> None:
    (run / "acceptance.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"acceptance\.safetensors is missing"):
        accepted(run)
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    del manifest["stages"]["verify"]["files"]["acceptance.safetensors"]
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert_refused(nbl("accept", run), 1, "acceptance.safetensors is missing, which verification leaves")
    assert not (run / "acceptance.json").exists()


def test_values_of_another_precision_are_refused(run: Path) -> None:
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    manifest["options"]["precision"] = "fp16" if manifest["options"]["precision"] != "fp16" else "int4"
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert_refused(nbl("accept", run), 1, "acceptance.safetensors is of", "verify again where it was made")
