"""What goes to the hub, that nothing goes unasked, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_export.artifacts import file_sha256, write_json

from .command import Outcome, assert_refused, in_new_process, nbl, snapshot
from .fake_hub import FakeHub, fake_hub

REPO = "ann/tiny-nbl"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as found:
        yield found


@pytest.fixture
def carded(run: Path) -> Path:
    assert nbl("card", run).status == 0
    return run


def push(hub: FakeHub, run: Path, *arguments: object, **changed: str) -> Outcome:
    return in_new_process("push", run, REPO, *arguments, **{**hub.environment(run.parent / "home"), **changed})


def manifest(run: Path, **facts: Any) -> None:
    path = run / "nbl.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **facts})


def test_says_what_would_go_and_asks_nobody(hub: FakeHub, carded: Path) -> None:
    before = snapshot(carded)
    done = push(hub, carded)
    assert done.status == 0, done.err
    names = {p.name for p in (carded / "model").iterdir()}
    assert {"README.md", "model.onnx", "model.onnx.data", "genai_config.json", "nbl.json"} <= names
    assert all(name in done.out for name in names)
    assert f"{(carded / 'model/model.onnx').stat().st_size:,} B" in done.out
    assert "Nothing was sent" in done.out
    assert hub.requests == []
    assert snapshot(carded) == before


def test_json(hub: FakeHub, carded: Path) -> None:
    found = json.loads(push(hub, carded, "--json").out)
    sizes = {f["name"]: f["bytes"] for f in found["files"]}
    on_disk = {p.name: p.stat().st_size for p in (carded / "model").iterdir()}
    assert (found["repository"], found["sent"], found["url"]) == (REPO, False, None)
    assert found["total_bytes"] == sum(sizes.values())
    assert {k: v for k, v in sizes.items() if k != "nbl.json"} == {k: v for k, v in on_disk.items() if k != "nbl.json"}


def test_sends_what_was_recorded_and_nothing_else(hub: FakeHub, carded: Path) -> None:
    recorded = {p.name: p.read_bytes() for p in (carded / "model").iterdir()}
    (carded / "model" / "notes.txt").write_text("mine", encoding="utf-8")
    done = push(hub, carded, "--yes", "--private")
    assert done.status == 0, done.err
    assert f"{hub.url}/{REPO}" in done.out
    assert hub.files.keys() == recorded.keys()
    assert {k: v for k, v in hub.files.items() if k != "nbl.json"} == {
        k: v for k, v in recorded.items() if k != "nbl.json"
    }
    assert len(hub.large) == len({v for k, v in recorded.items() if k.endswith((".onnx", ".data"))})
    assert hub.repositories[REPO].get("visibility", hub.repositories[REPO].get("private")) in ("private", True)
    assert hub.messages == ["1 of 3 attention layers replaced by linear ones (nbl-export)"]
    assert {token for _, path, token in hub.requests if path.startswith(("/api/repos", "/api/models"))} == {
        "Bearer hf_secret"
    }


def test_places_of_this_machine_stay_here(hub: FakeHub, carded: Path) -> None:
    before = json.loads((carded / "nbl.json").read_text(encoding="utf-8"))
    place, text = before["places"]["model"], before["places"]["calibration"][0]
    assert place in (carded / "model" / "nbl.json").read_text(encoding="utf-8")
    assert push(hub, carded, "--yes").status == 0
    for name, content in hub.files.items():
        assert place.encode() not in content, name
        assert str(Path(text).parent).encode() not in content, name
    facts = json.loads(hub.files["nbl.json"])
    assert facts["model"]["name"] == facts["options"]["model"] == Path(place).name
    assert facts["options"]["calibration"] == [Path(text).name]
    assert facts["scores"] == before["scores"]


def test_again_and_to_a_repository_that_is_there(hub: FakeHub, carded: Path) -> None:
    assert push(hub, carded, "--yes").status == 0
    puts = sum(method == "PUT" for method, _, _ in hub.requests)
    assert push(hub, carded, "--yes").status == 0
    assert puts and sum(method == "PUT" for method, _, _ in hub.requests) == puts  # large files are there already
    assert len(hub.messages) == 2


@pytest.mark.parametrize(
    ("status", "said"), [(401, "hf auth login"), (403, "hf auth login"), (500, "the hub answers 500")]
)
def test_a_hub_that_refuses(hub: FakeHub, carded: Path, status: int, said: str) -> None:
    hub.refuse_with = status
    assert_refused(push(hub, carded, "--yes"), 1, f"could not publish to {REPO}", said)


def test_no_hub(hub: FakeHub, carded: Path) -> None:
    assert_refused(push(hub, carded, "--yes", HF_ENDPOINT="http://127.0.0.1:9"), 1, REPO, "check the network")
    assert_refused(push(hub, carded, "--yes", HF_HUB_OFFLINE="1"), 1, REPO, "HF_HUB_OFFLINE")
    assert hub.requests == []


def test_needs_a_card_of_this_report(run: Path) -> None:
    assert_refused(nbl("push", run, REPO), 1, "no model card", f"nbl-export card {run}")
    assert nbl("card", run).status == 0
    done = nbl("bench", run, "--repetitions", 2)
    assert done.status == 0, done.err
    assert_refused(nbl("push", run, REPO), 1, "older report", f"nbl-export card {run}")
    assert nbl("push", run, REPO, "--force").status == 0
    assert nbl("card", run).status == 0
    assert nbl("push", run, REPO).status == 0


def test_an_edited_card_goes_as_it_is(hub: FakeHub, carded: Path) -> None:
    card = carded / "model" / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "\nTested on my own texts.\n", encoding="utf-8")
    assert push(hub, carded, "--yes").status == 0
    assert hub.files["README.md"].endswith(b"Tested on my own texts.\n")


def test_only_verified_runs(hub: FakeHub, carded: Path) -> None:
    manifest(carded, status="failed")
    assert_refused(push(hub, carded, "--yes"), 1, carded, "failed verification", "--force")
    assert hub.requests == []
    assert push(hub, carded, "--yes", "--force").status == 0
    assert "model.onnx" in hub.files


def test_a_damaged_file_does_not_go(hub: FakeHub, carded: Path) -> None:
    with (carded / "model" / "model.onnx.data").open("r+b") as stream:
        stream.write(b"other")
    assert_refused(push(hub, carded, "--yes"), 1, "model.onnx.data is corrupted")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model/README.md", "model/tokenizer.json", "model"])
@pytest.mark.parametrize("words", [(), ("--yes",), ("--yes", "--force")])
def test_what_a_link_leads_to_is_not_published(hub: FakeHub, carded: Path, name: str, words: tuple[str, ...]) -> None:
    """The same bytes elsewhere: the recorded hash says nothing against them."""
    elsewhere = carded / "elsewhere"  # a link out of the run is refused before
    (carded / name).rename(elsewhere)
    (carded / name).symlink_to(elsewhere)
    assert_refused(push(hub, carded, *words), 1, "is a link", "not published")
    assert hub.requests == []


def test_names_of_files_elsewhere_are_no_names_of_a_run(hub: FakeHub, carded: Path) -> None:
    (carded.parent / "secret").write_text("secret", encoding="utf-8")
    stages = json.loads((carded / "nbl.json").read_text(encoding="utf-8"))["stages"]
    stages["rewrite"]["files"]["model/../../secret"] = file_sha256(carded.parent / "secret")
    manifest(carded, stages=stages)
    assert_refused(push(hub, carded, "--yes"), 1, "names a file outside the run")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["tiny", "a/b/c", "ann/ti ny", "ann/--", "../up/x", ""])
def test_names_that_are_none(run: Path, name: str) -> None:
    assert_refused(nbl("push", run, name), 2, "OWNER/NAME")
