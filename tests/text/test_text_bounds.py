"""Texts far larger than they look, or than anybody can use: bounded memory, and the text or one sentence."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.evaluation.measure import windows
from nbl_export.methods.checkpoint.load import load_tokenizer
from nbl_export.text import corpus
from nbl_export.text.corpus import Corpus, read_text
from nbl_export.text.windows import pack

from ..fake_datasets import FakeDatasets

pytestmark = pytest.mark.process

MIB = 1 << 20
# Bytes and their text, of one byte a character; and what the interpreter needs.
BOUND = 2 * corpus.READ_BYTES + 24 * MIB


def bomb(path: Path, pattern: bytes, mebibytes: int = 1024) -> Path:
    """A gzip file of so many MiB of a pattern: members of 64 MiB each."""
    member = gzip.compress(pattern * (64 * MIB // len(pattern)), 1)
    path.write_bytes(member * (mebibytes // 64))
    assert path.stat().st_size < 8 * MIB
    return path


def peak(action: Callable[[], Any]) -> tuple[Any, int]:
    """What a call gives or refuses with, and the most bytes that Python held meanwhile."""
    tracemalloc.start()
    try:
        found = action()
    except NblError as error:
        found = error
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, most


def test_a_gibibyte_of_text_in_a_small_archive(tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.txt.gz", b"a word ")
    found, most = peak(lambda: read_text(str(path)))
    assert most < BOUND
    assert len(found.documents[0]) == corpus.READ_BYTES
    assert found.truncated
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "pattern", "reason"),
    [
        ("a.txt.gz", b"\0", "is a binary file"),
        ("a.txt.gz", b" ", "is empty"),
        ("a.jsonl.gz", b"\n", "is empty"),
        ("a.jsonl.gz", b"a", "line 1 is longer than 8 Mi characters"),
        ("a.jsonl.gz", b"[", "line 1 is longer than 8 Mi characters"),
        ("a.json.gz", b"[", "a list of more than 32 Mi characters"),
    ],
)
def test_a_gibibyte_of_nothing(name: str, pattern: bytes, reason: str, tmp_path: Path) -> None:
    path = bomb(tmp_path / name, pattern)
    found, most = peak(lambda: read_text(str(path)))
    assert isinstance(found, NblError) and reason in str(found)
    assert most < BOUND


def test_a_file_of_gibibytes_that_is_not_packed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "one"}\n{"text": "')
        stream.truncate(3 << 30)  # a hole: no disk
    found, most = peak(lambda: corpus.read_text(str(path)))
    assert isinstance(found, NblError) and "line" not in str(found) and "binary" in str(found)
    assert most < BOUND


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if so little of a text were read."""
    monkeypatch.setattr(corpus, "READ_BYTES", 1000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_what_is_read_is_the_beginning(packed: str, tmp_path: Path) -> None:
    """Also if a character or a line lies across the end of what is read."""
    lines = [json.dumps({"text": f"é漢 {i}"}, ensure_ascii=False) for i in range(200)]
    write = gzip.compress if packed else bytes
    (tmp_path / f"a.jsonl{packed}").write_bytes(write("\n".join(lines).encode()))
    found = read_text(str(tmp_path / f"a.jsonl{packed}"))
    assert found.truncated and 20 < len(found.documents) < 100
    assert found.documents == tuple(f"é漢 {i}" for i in range(len(found.documents)))
    (tmp_path / f"a.txt{packed}").write_bytes(write(("x" + "漢" * 500).encode()))
    assert read_text(str(tmp_path / f"a.txt{packed}")).documents == ("x" + "漢" * 333,)
    (tmp_path / f"b.txt{packed}").write_bytes(write(b"x" * 1000))
    whole = read_text(str(tmp_path / f"b.txt{packed}"))
    assert (len(whole.documents[0]), whole.truncated) == (1000, False)
    (tmp_path / f"c.txt{packed}").write_bytes(write(b"x" * 200 + b"\xff" + b"x" * 90))
    with pytest.raises(NblError, match=r"not UTF-8 \(byte 200\)"):
        read_text(str(tmp_path / f"c.txt{packed}"))
    (tmp_path / f"d.txt{packed}").write_bytes(write("é".encode()[:1]))
    with pytest.raises(NblError, match=r"not UTF-8 \(byte 0\)"):
        read_text(str(tmp_path / f"d.txt{packed}"))


@pytest.mark.usefixtures("small")
def test_a_truncated_text_is_not_taken_for_a_short_one(
    checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("some words " * 400)
    text, tokenizer = read_text(str(tmp_path / "a.txt")), load_tokenizer(checkpoint("llama"))
    pack(text, tokenizer, 10_000, 32)
    assert "only the first" in caplog.text
    with pytest.raises(NblError, match="give --limit"):
        windows(text, tokenizer, 32, None)
    assert len(windows(text, tokenizer, 32, 2)) == 2


def test_hub_rows_end_at_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus, "READ_BYTES", 100)
    library = FakeDatasets(tmp_path / "library", monkeypatch)
    library.serve({"org/name@train": [*({"text": f"{number} " * 20} for number in range(3)), "break"]})
    text = read_text("org/name")
    assert (sum(map(len, text.documents)), text.truncated) == (100, True)
    assert text.sha256 == hashlib.sha256("\0".join(text.documents).encode()).hexdigest()


def test_a_mix_is_truncated_where_the_text_that_ends_it_is() -> None:
    from nbl_export.text.mixture import mix

    long = Corpus("a", "0", ("a" * 10,) * 150, truncated=True)
    assert mix([long, Corpus("b", "1", ("b" * 1000,) * 9)]).truncated
    assert not mix([long, Corpus("b", "1", ("b" * 1000,))]).truncated  # the other ends it
