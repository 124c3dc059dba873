"""Several texts: any prefix is the mix, and every part is on record."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbl_export.errors import UsageError
from nbl_export.methods.checkpoint.load import load_tokenizer
from nbl_export.text import corpus, windows
from nbl_export.text.corpus import Corpus
from nbl_export.text.mixture import absolute_sources, identify, mix, read_texts

from ..command import keys, nbl

pytestmark = pytest.mark.job


@pytest.mark.parametrize("values", [["a", "a"], [""]])
def test_bad_values_are_refused(values: list[str]) -> None:
    with pytest.raises(UsageError, match="--calibration"):
        identify(values)


def test_a_local_text_is_named_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a, b:2").touch()
    assert absolute_sources(["a, b:2", "org/name@train"]) == [f"{tmp_path}/a, b:2", "org/name@train"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine everything is
@given(st.lists(st.lists(st.integers(1, 5000), min_size=20, max_size=60), min_size=2, max_size=4))
def test_every_prefix_is_the_mix(drawn: list[list[int]]) -> None:
    """Shares are equal up to one document."""
    texts = [Corpus(str(k), "0", tuple(str(k) * size for size in sizes)) for k, sizes in enumerate(drawn)]
    used = [0] * len(texts)
    for document in mix(texts).documents:
        used[int(document[0])] += len(document)
        assert max(used) - min(used) <= 5000


def test_mix_ends_with_the_first_text_that_does(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    long = Corpus("long", "1", tuple("a b c d " * 50 for _ in range(100)))
    short = Corpus("short", "2", tuple("e f g h " * 50 for _ in range(10)))
    mixed = mix([long, short])
    assert sum(d.startswith("a") for d in mixed.documents) == pytest.approx(10, abs=1)
    assert (mixed.ended_by, mixed.name) == ("short", "long + short")
    windows.pack(mixed, load_tokenizer(checkpoint("llama")), 1_000_000, 64)
    assert "shorter than asked" in caplog.text and "since short ends there" in caplog.text


def test_long_documents_are_split_and_nothing_is_lost() -> None:
    document = "\n".join(f"line {k} of a long text" for k in range(2000))
    pieces = corpus.split_documents(["short", document])
    assert pieces[0] == "short" and len(pieces) > 10
    assert "\n".join(pieces[1:]) == document


def test_hash_says_the_texts_in_their_order(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"{name} " * 5000)
    hashes = {
        read_texts([str(tmp_path / v) for v in values]).sha256 for values in (["a", "b"], ["b", "a"], ["a"], ["b"])
    }
    assert len(hashes) == 4
    assert read_texts([str(tmp_path / "a")]).sha256 == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_two_texts_through_the_command(checkpoint: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """Both are on record with their hashes; the recorded command gives the same run from anywhere."""
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "Some other words. " * 900}).encode()))
    given = ("calibrate", "--model", checkpoint("llama"), "--calibration-tokens", 1024, *keys(context=64))
    both = ("--calibration", text, "--calibration", tmp_path / "b.jsonl.gz")
    done = nbl(*given, *both, "--output", tmp_path / "r")
    assert done.status == 0, done.err
    facts = json.loads((tmp_path / "r" / "nbl.json").read_text())
    assert facts["calibration"]["name"] == f"{text.name} + b.jsonl.gz"
    assert [part["name"] for part in facts["calibration"]["parts"]] == [text.name, "b.jsonl.gz"]
    assert facts["calibration"]["parts"][0]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert f"--calibration {text} --calibration {tmp_path}/b.jsonl.gz" in facts["command"]
    assert nbl("plan", tmp_path / "r", "--layers", "1").status == 0
    assert "text: done" in nbl(*given, *both[2:], "--output", tmp_path / "r").err
