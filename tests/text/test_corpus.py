"""Text in, packed windows out."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint.load import load_tokenizer
from nbl_export.text import corpus
from nbl_export.text import windows as text_windows
from nbl_export.text.corpus import Corpus, read_text
from nbl_export.text.windows import TWICE, pack, selection_texts


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_every_form_gives_the_same_documents(packed: str, tmp_path: Path) -> None:
    documents = ["One document.\r\n", "Another, with an é and a 漢.", "2020-01-01"]
    rows = [{"text": document, "id": 3} for document in documents]
    forms = {"a.jsonl": "\n\n".join(map(json.dumps, rows)), "a.json": json.dumps(rows), "a.txt": documents[0]}
    for name, content in forms.items():
        written = ("\ufeff" + content).encode()
        file = tmp_path / f"{name}{packed}"
        file.write_bytes(gzip.compress(written) if packed else written)
        found = read_text(str(file))
        assert found.documents == tuple(documents[:1] if name == "a.txt" else documents)
        assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"x" * 5000)[:-20], gzip.compress(b"abc")[:12]],
    ids=["no gzip", "cut in its data", "cut behind its header"],  # the bytes hold the time of day
)
def test_damaged_compressed_text_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(NblError, match=r"a\.jsonl\.gz is truncated or not a gzip file"):
        read_text(str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.txt", b"", "is empty"), ("a.txt", b" \n", "is empty"), ("a.txt", b"ab\0cd", "binary"),
     ("a.txt", b"\x7fELF\0", "is a binary file.*UTF-8"), ("a.txt", "é".encode("utf-16"), "binary"),
     ("a.json", b"[" * 100_000, "not JSON"), ("a.jsonl", b'{"text": null}', "line 1 has no text field"),
     ("a.txt", b"caf\xe9", r"not UTF-8 \(byte 3\).*iconv"), ("a.jsonl", b'{"text": "x"}\n{bad', "line 2 is not JSON"),
     ("a.jsonl", b'\n{"txt": "x"}', "line 2 has no text field"), ("a.json", b'{"text": "x"}', "must be a JSON list"),
     ("a.json", b"[1]", "entry 1 has no text field"), ("a.json", b"[", "not JSON"), ("a.json", b"[]", "holds no text")],
)  # fmt: skip
def test_bad_text_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NblError, match=message) as caught:
        read_text(str(tmp_path / name))
    assert name in str(caught.value)


def test_windows_are_full_and_held_back_text_is_disjoint(checkpoint: Callable[[str], Path], text: Path) -> None:
    tokenizer = load_tokenizer(checkpoint("llama"))
    source = read_text(str(text))
    used, held = pack(source, tokenizer, 640, 64, 128)
    assert used.shape == (10, 64) and held.shape == (2, 64)
    stream = tokenizer(source.documents[0])["input_ids"]
    assert used.flatten().tolist() == stream[: used.numel()]
    assert held.flatten().tolist() == stream[10 * 64 : 12 * 64]


def test_text_to_train_on_goes_on_behind_what_is_held_back(checkpoint: Callable[[str], Path], text: Path) -> None:
    tokenizer, read = load_tokenizer(checkpoint("llama")), read_text(str(text))
    windows, held = pack(read, tokenizer, 640, 64, 128)
    whole, _ = pack(read, tokenizer, 64 * 15, 64)
    every = text_windows.token_ids(read, tokenizer, 10**9)
    ids = text_windows.extend(windows, every, 64 * 13 + 5, 128)
    assert ids.tolist() == [*whole[:10].tolist(), *whole[12:15].tolist()]
    assert held.tolist() == whole[10:12].tolist()
    assert text_windows.extend(windows, every, 256, 128).tolist() == windows[:4].tolist()
    longest = text_windows.extend(windows, every, 10**9, 128)  # as far as the text goes
    assert 15 < len(longest) < len(read.documents[0]) // 64


@pytest.mark.parametrize(
    ("tokens", "windows"), [(4 * 64, (1, 3)), (32 * 64, (28, 4)), (200 * 64, (160, 40)), (230 * 64, (160, 64))]
)
def test_of_a_short_text_an_eighth_is_held_back_or_what_calibration_leaves(
    tokens: int, windows: tuple[int, int]
) -> None:
    def tokenizer(piece: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(piece)))}

    used, held = pack(Corpus("t", "0", ("x" * tokens,)), tokenizer, 160 * 64, 64, 64 * 64)
    assert (len(used), len(held)) == windows
    assert used.flatten().tolist() == list(range(used.numel())) and int(held[-1, -1]) < tokens


def test_short_text_says_how_much_is_needed(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(checkpoint("llama"))
    with pytest.raises(NblError, match=r"too short: .* 128 are needed for a context of 64"):
        pack(Corpus("tiny", "0", ("just a few words",)), tokenizer, 640, 64, 64)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (240 * 64, ""),
        (230 * 64, "it gives 4,480 of 5,120 held-back tokens"),
        (200 * 64, "it gives 2,560 of 5,120 held-back tokens"),
        (150 * 64, "it gives 8,448 of 10,240 tokens to calibrate on and 1,152 of 5,120 held-back tokens"),
    ],
)
def test_the_warning_names_what_is_short(tokens: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    def tokenizer(piece: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": list(range(len(piece)))}

    used, held = pack(Corpus("t", "0", ("x" * tokens,)), tokenizer, 160 * 64 - 30, 64, 80 * 64)
    assert caplog.messages == ([f"calibration text t is shorter than asked: {said}"] if said else [])
    if said:
        assert f"{held.numel():,} of 5,120" in said
        assert ("calibrate" in said) == (used.numel() < 160 * 64 - 30)


def test_default_text_mixes_its_files_from_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.utf8").write_text((f"{name} " * 60 + "\n") * 400)
    monkeypatch.setattr(corpus, "_package_files", lambda: [tmp_path / "a.utf8", tmp_path / "b.utf8"])
    firsts = [document[0] for document in corpus.installed_text().documents[:6]]
    assert firsts == ["a", "b"] * 3


def test_default_text_is_varied_and_leaves_the_judging_text_alone() -> None:
    """Prose, web, stories with dialogue, technical text and code; not the documentation that the price is taken on."""
    if not corpus._package_files():
        pytest.skip("the package exllamav3, which carries the default text, is not installed")
    found = corpus.installed_text()
    assert [part.name for part in found.parts] == ["c4", "wiki", "technical", "tiny", "code"]
    assert len({part.sha256 for part in found.parts}) == 5
    start = "\n".join(found.documents[:25])
    assert "<doc id=" in start and "said" in start and "move.w" in start
    early_stopping = corpus.stdlib_text()
    assert early_stopping.sha256 not in {part.sha256 for part in found.parts}
    lines = {line for line in early_stopping.documents[0].splitlines() if len(line) > 60}
    assert not lines & set("\n".join(found.documents).splitlines())


def test_a_very_long_document_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """At line ends where there are some; nothing is lost, and what is not needed is not tokenized."""
    monkeypatch.setattr(text_windows, "_PIECE_CHARS", 10)
    assert list(text_windows._pieces(["abc", "line one\nline two\nthree", "x" * 25])) == [
        "abc", "line one\n", "line two\n", "three", "x" * 10, "x" * 10, "x" * 5,
    ]  # fmt: skip
    asked: list[str] = []

    def tokenizer(piece: str, **_: object) -> dict[str, list[int]]:
        asked.append(piece)
        return {"input_ids": list(range(len(piece)))}

    text = corpus.Corpus("t", "0", ("y" * 100,))
    assert len(text_windows.token_ids(text, tokenizer, 15)) == 20
    assert asked == ["y" * 10] * 2


def test_layers_are_chosen_by_the_beginning_of_one_text_and_by_windows_from_all_over_the_other() -> None:
    """As many windows of both; the second text can be of several parts, which one beginning does not show."""
    own, second = (torch.arange(first, first + 12 * 512).view(12, 512) for first in (0, 1_000_000))
    found = selection_texts([("own", own), ("second", second)], 1024)
    assert [name for name, _ in found] == ["own", "second", TWICE]
    assert torch.equal(found[0][1], own[:4]) and torch.equal(found[1][1], second[[0, 3, 7, 11]])
    assert set(found[2][1].flatten().tolist()) == set(range(512))
