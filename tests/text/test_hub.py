"""Text of hub datasets: the default mix, what takes its place, and which rows are text."""

from __future__ import annotations

import gzip
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.text import corpus, hub, mixture
from nbl_export.text.corpus import read_text
from nbl_export.text.mixture import HUB_MIX, read_texts

from ..fake_datasets import MIX_ROWS, FakeDatasets
from ..fake_hub import FakeHub, fake_hub

pytestmark = pytest.mark.process


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    return FakeDatasets(tmp_path / "library", monkeypatch)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that answers the probe."""
    with fake_hub() as found:
        for name, value in found.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The installed package with the default text, of two files."""
    for name in "ab":
        (tmp_path / f"{name}.utf8").write_text((f"{name} " * 60 + "\n") * 400)
    monkeypatch.setattr(corpus, "_package_files", lambda: [tmp_path / "a.utf8", tmp_path / "b.utf8"])


PACKAGE = "default text (offline): a, b"
DOCUMENTATION = "python pydoc_data/topics.py"


@pytest.mark.usefixtures("server")
def test_the_default_text_is_a_mix_of_three_datasets(library: FakeDatasets, caplog: pytest.LogCaptureFixture) -> None:
    text = read_texts(())
    assert text.name == "hub mix: allenai/c4/en, codeparrot/codeparrot-clean-valid, HuggingFaceH4/ultrachat_200k"
    assert [part.name for part in text.parts] == list(HUB_MIX)
    assert len({part.sha256 for part in text.parts}) == 3
    assert [document.split()[0] for document in text.documents[:3]] == ["web", "def", "user:"]
    shares = [sum(len(d) for d in text.documents[:40] if d.startswith(kind)) for kind in ("web", "def", "user:")]
    assert max(shares) - min(shares) < max(map(len, text.documents))
    assert text.documents[2].startswith("user: chat 0?\n\nassistant: some words")
    assert list(library.asked) == list(HUB_MIX)
    assert read_texts(()) == text
    assert not caplog.records


def test_the_library_itself_reads_the_mix(server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed lines of JSON by a configuration, and Parquet with chats, as the hub has them.

    The working directory has a folder of each name, which the library would prefer.
    """
    pytest.importorskip("datasets")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    monkeypatch.setattr(mixture, "_HUB_MIX_SECONDS", 300.0)  # a busy machine takes long to load the library
    web, code, chat = (MIX_ROWS[source] for source in HUB_MIX)
    lines = [gzip.compress("\n".join(map(json.dumps, rows)).encode()) for rows in (web, code)]
    parquet.write_table(pa.Table.from_pylist(chat), tmp_path / "chat")
    card = "---\nconfigs:\n- config_name: {}\n  data_files:\n  - split: {}\n    path: {}\n---\n".format
    server.datasets = {
        "allenai/c4": {"README.md": card("en", "train", "en/c4.*.json.gz").encode(), "en/c4.0.json.gz": lines[0]},
        "codeparrot/codeparrot-clean-valid": {"file-000.json.gz": lines[1]},
        "HuggingFaceH4/ultrachat_200k": {
            "README.md": card("default", "train_sft", "data/train_sft-*").encode(),
            "data/train_sft-0.parquet": (tmp_path / "chat").read_bytes(),
        },
    }
    for source in HUB_MIX:
        (decoy := tmp_path / "clone" / source.partition("@")[0]).mkdir(parents=True)
        (decoy / "train.jsonl").write_text('{"text": "of a stranger"}\n' * 9, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setenv("HF_HOME", "cache")
    text = read_texts(())
    assert (tmp_path / "clone" / "cache").is_dir()
    assert text.name.startswith("hub mix: "), text.name
    assert {
        web[0]["text"],
        code[0]["content"],
        f"user: chat 0?\n\nassistant: {chat[0]['messages'][1]['content']}",
    } == set(text.documents[:3])
    with pytest.raises(NblError, match=r"allenai/c4/en@test cannot be read \(.*Bad split.*needs a split test"):
        read_text("allenai/c4/en@test")


@pytest.mark.usefixtures("server", "library")
def test_a_dataset_of_the_mix_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "_HUB_MIX_CHARS", 2000)
    text = read_texts(())
    assert text.truncated and 3000 < sum(map(len, text.documents)) <= 6000


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([MIX_ROWS[HUB_MIX[1]][0], "break"], "ConnectionError: the network is gone"),
        ([{"code": "x", "license": "mit"}], "its columns are code, license"),
        ([{"content": "x"}, {"content": 5}], "row 2 of the column content holds no text (int)"),
        ([{"messages": [{"role": "user"}]}], "row 1 of the column messages holds no text (list)"),
        ([{"messages": "text"}], "row 1 of the column messages holds no text (str)"),
        ([{"content": " "}], "it holds no text"),
        (["die"], "the reading process ended with status 9"),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_a_dataset_that_fails_is_named_with_what_takes_its_place(
    installed: bool, rows: list[Any], reason: str, library: FakeDatasets,
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if installed:
        request.getfixturevalue("package")
    else:
        monkeypatch.setattr(corpus, "_package_files", list)
    library.serve({**MIX_ROWS, HUB_MIX[1]: rows})
    assert read_texts(()).name == (PACKAGE if installed else DOCUMENTATION)
    (said,) = caplog.messages
    assert f"hub dataset {HUB_MIX[1]} cannot be read ({reason})" in said
    assert ("using the default text (offline) instead" if installed else "using Python's own documentation") in said


@pytest.mark.usefixtures("server", "package")
def test_a_stream_that_waits_is_stopped(
    library: FakeDatasets, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mixture, "_HUB_MIX_SECONDS", 2.0)
    library.serve({**MIX_ROWS, HUB_MIX[0]: ["hang"]})
    started = time.monotonic()
    assert read_texts(()).name == PACKAGE
    assert time.monotonic() - started < 20
    assert f"hub dataset {HUB_MIX[0]} cannot be read (not read within 2 s)" in caplog.text


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_an_offline_switch_skips_the_probe(
    switch: str, server: FakeHub, library: FakeDatasets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(switch, "yes")
    assert read_texts(()).name == PACKAGE
    assert (server.requests, list(library.asked)) == ([], [])
    assert switch in hub.unavailable()
    monkeypatch.setenv(switch, "0")
    assert hub.unavailable() == ""
    assert server.requests


@pytest.mark.usefixtures("package")
def test_without_the_library_the_hub_is_not_asked(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read_texts(()).name == PACKAGE
    assert server.requests == []
    with pytest.raises(NblError, match="pip install datasets"):
        read_text("org/name")


@pytest.mark.usefixtures("package", "library")
def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A server that accepts and says nothing, or a look-up of its name that takes for ever."""
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "127.0.0.1,hub.invalid")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        assert read_texts(()).name == PACKAGE
        assert time.monotonic() - started < 20
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: time.sleep(60))
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    started = time.monotonic()
    assert hub.unavailable() == "the hub http://hub.invalid does not answer"
    assert time.monotonic() - started < 20
    assert not caplog.records


@pytest.mark.parametrize(("status", "answers"), [(401, True), (404, True), (500, False), (503, False)])
def test_what_counts_as_an_answer(
    status: int, answers: bool, server: FakeHub, library: FakeDatasets, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Python's documentation is read with a warning that says why."""
    server.refuse_with = status
    assert hub.unavailable() == ("" if answers else f"the hub {server.url} does not answer")
    if not answers:
        monkeypatch.setattr(corpus, "_package_files", list)
        assert read_texts(()).name == DOCUMENTATION
        (said,) = caplog.messages
        assert f"the hub {server.url} does not answer and the default text (offline) is not installed" in said
        assert "pip install --no-deps" in said


def test_columns_of_a_named_dataset(library: FakeDatasets) -> None:
    """The first of text, content and messages; a dataset without them is refused in one sentence."""
    library.serve({"org/name@train": [{"content": "no", "text": "yes"}], "org/chat@a": MIX_ROWS[HUB_MIX[2]],
                   "org/name/b@c": [{"id": 1, "body": "x"}]})  # fmt: skip
    assert read_text("org/name").documents == ("yes",)
    assert read_text("org/chat@a").documents[1].startswith("user: chat 1?\n\nassistant: ")
    with pytest.raises(NblError) as caught:
        read_text("org/name/b@c")
    assert str(caught.value) == (
        "hub dataset org/name/b@c cannot be read (its columns are id, body); "
        "it needs a split c and a column text, content or messages"
    )
    with pytest.raises(NblError, match=r"org/none cannot be read \(KeyError"):
        read_text("org/none")


def test_a_module_of_the_working_directory_is_not_run(
    library: FakeDatasets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("json", "sys", "datasets", "nbl_export"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path)
    library.serve({"org/name@train": [{"text": "yes"}]})
    assert read_text("org/name").documents == ("yes",)
