"""`convert --to ngram`: the original decoder with GenAI's n-gram decoding, whose tokens are the original's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import NblError
from nbl_export.publish import convert
from nbl_export.targets.onnx.genai import GenaiRunner
from nbl_export.targets.onnx.ngram import write_ngram

from ..command import assert_refused, nbl
from ..tiny import VOCAB

pytestmark = pytest.mark.job


@pytest.fixture(scope="module")
def folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `convert` writes. Never write to it."""
    out = tmp_path_factory.mktemp("ngram") / "ngram"
    done = nbl("convert", finished, "--to", "ngram", "--output", out)
    assert (done.status, done.out) == (0, f"{out}\n"), done.err
    return out


def answers(folder: Path, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Greedy answers by GenAI's own loop, with the options of the folder alone, and the counts of the last answer."""
    import onnxruntime_genai as og

    model, found, counts = og.Model(str(folder)), [], {}
    for ids in prompts:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + new_tokens, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.asarray(ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        found.append([int(i) for i in generator.get_sequence(0)[len(ids) :]])
        counts = generator.get_speculative_stats()
    return found, counts


def test_the_tokens_are_the_originals(folder: Path, finished: Path) -> None:
    draw = np.random.default_rng(0)
    passage = draw.integers(2, VOCAB, 12).tolist()
    prompts = [[int(draw.integers(2, VOCAB))], passage, passage * 4]
    found, counts = answers(folder, prompts, 40)
    with GenaiRunner(finished / "original", 1) as plain:
        for ids, answer in zip(prompts, found, strict=True):
            assert 0 < len(answer) <= 40
            assert answer == plain.greedy(ids, 40)[: len(answer)]
    assert counts["draft_tokens_evaluated"] > 0


def test_the_graph_is_the_one_that_was_verified(folder: Path, finished: Path) -> None:
    original = finished / "original"
    assert (folder / "model.onnx").read_bytes() == (original / "all_logits.onnx").read_bytes()
    left_out = {"all_logits.onnx", "nbl.json"}
    assert {p.name for p in folder.iterdir()} == {p.name for p in original.iterdir()} - left_out
    settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    assert settings["speculative"]["ngram_size"] == 3


def test_the_folder_is_a_model_like_any_other(folder: Path, finished: Path) -> None:
    """But its speed is not that of single steps."""
    said = nbl("generate", folder, "The language", "--max-new-tokens", 6)
    assert said.out == nbl("generate", finished, "The language", "--max-new-tokens", 6, "--original").out
    assert_refused(nbl("bench", folder), 1, "single steps say nothing")


def test_another_engine_has_no_ngrams(tmp_path: Path) -> None:
    with pytest.raises(NblError, match="use a run of --engine ort"):
        write_ngram(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_of_an_nbl_checkpoint_has_no_original(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "CHECKPOINT_FIT", "independent")
    done = nbl("convert", finished, "--to", "ngram", "--output", tmp_path / "ngram")
    assert_refused(done, 1, "has no original to decode with")
    assert not (tmp_path / "ngram").exists()
