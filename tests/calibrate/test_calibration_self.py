"""Calibration on what the model itself says: seeded, from its own distribution, without a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.files import file_sha256
from nbl_export.model.checkpoint.load import load_model
from nbl_export.text import corpus, sampling

from ..command import assert_refused, nbl, stage_lines

Checkpoint = Callable[[str], Path]
GIVEN_GRAPH = ("--calibration", "self", "--calibration-tokens", 1024, "--context", 64)


@pytest.fixture(autouse=True)
def many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of generate where a real model has several; the steps are what takes time."""
    monkeypatch.setattr(sampling, "_SEQUENCES", 128)


def nothing(_done: int, _total: int) -> None:
    pass


def test_the_same_seed_says_the_same(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    state = torch.get_rng_state()
    first, again, other = (sampling.sample_windows(model, 5, 48, seed, nothing) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    assert first.shape == (5, 48) and first.dtype == torch.long
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert int(first[0, 0]) == model.config.bos_token_id


def test_tokens_come_from_the_models_own_distribution(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second tokens of many sequences against the model's probabilities after its first token."""
    model = load_model(checkpoint("llama"))
    with torch.inference_mode():
        exact = model(torch.tensor([[model.config.bos_token_id]])).logits[0, -1].double().softmax(0)
    monkeypatch.setattr(sampling, "_SEQUENCES", 4000)
    ids = sampling.sample_windows(model, 4000, 2, 0, nothing)
    assert (ids[:, 0] == model.config.bos_token_id).all()
    seen = torch.bincount(ids[:, 1], minlength=len(exact)).double() / len(ids)
    expected_by_chance = (2 * exact * (1 - exact) / (torch.pi * len(ids))).sqrt().sum() / 2
    assert (seen - exact).abs().sum() / 2 < 1.3 * expected_by_chance


@pytest.mark.parametrize(
    ("row", "kept"), [([0, 5, 1, 7], [0, 5, 1]), ([1, 5, 6], [1, 5, 6]), ([0, 1, 1, 1], [0, 1]), ([0, 5, 6], [0, 5, 6])]
)
def test_sequences_end_with_the_end_of_text(row: list[int], kept: list[int]) -> None:
    assert sampling._until_end(row, [1]) == kept


def test_no_calibration_text_is_read(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hub_texts", "installed_text", "read_text"):
        monkeypatch.setattr(corpus, name, lambda *_a, **_k: pytest.fail("a text was read"))
    given = ("calibrate", "--model", checkpoint("llama"), *GIVEN_GRAPH)
    for name in ("one", "two"):
        done = nbl(*given, "--output", tmp_path / name)
        assert done.status == 0, done.err
    hashes = {file_sha256(tmp_path / name / "moments.safetensors") for name in ("one", "two")}
    facts: Any = json.loads((tmp_path / "one" / "nbl.json").read_text())
    assert facts["calibration"]["name"] == "sampled from the model itself (seed 0, temperature 1)"
    assert facts["calibration"]["tokens"] == 1024
    assert "--calibration self" in facts["command"]
    assert (
        len({json.dumps(json.loads((tmp_path / n / "nbl.json").read_text())["calibration"]) for n in ("one", "two")})
        == 1
    )
    assert len(hashes) == 1
    assert stage_lines(nbl("plan", tmp_path / "one", "--layers", 1)) == {"calibrate": "reused", "plan": "done"}
    assert "calibrate: reused" in nbl(*given, "--output", tmp_path / "one").err
    assert "calibrate: done" in nbl(*given, "--seed", 1, "--output", tmp_path / "one").err


def test_sampled_once_for_all_stages(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file is sampled again, to the same tokens."""
    calls: list[int] = []
    sample = sampling.sample_windows

    def count(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return sample(*arguments)

    monkeypatch.setattr(sampling, "sample_windows", count)
    given = ("calibrate", "--model", checkpoint("llama"), *GIVEN_GRAPH, "--output", tmp_path / "run")
    assert nbl(*given).status == 0
    before = file_sha256(tmp_path / "run" / "moments.safetensors")
    (tmp_path / "run" / "moments.safetensors").unlink()
    assert nbl(*given).status == 0
    assert len(calls) == 1
    (tmp_path / "run" / "moments.safetensors").unlink()
    (tmp_path / "run" / "text.safetensors").unlink()
    assert nbl(*given).status == 0
    assert len(calls) == 2
    assert file_sha256(tmp_path / "run" / "moments.safetensors") == before


def test_contradictions_are_refused(checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    given = ("calibrate", "--model", checkpoint("llama"), *GIVEN_GRAPH, "--output", tmp_path / "run")
    assert_refused(nbl(*given, "--calibration", text), 1, "--calibration self reads no text")
    assert not (tmp_path / "run").exists()
