"""The settings of docs/drafts.md: GenAI decodes the original with n-grams, and its tokens are the original's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.targets.onnx.genai import GenaiRunner

from ..command import assert_refused, nbl
from ..tiny import VOCAB

pytestmark = pytest.mark.job

PAGE = Path(__file__).parents[2] / "docs" / "drafts.md"


@pytest.fixture(scope="module")
def folder(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page makes of a run. Never write to it."""
    out = Path(shutil.copytree(finished / "original", tmp_path_factory.mktemp("ngram") / "ngram"))
    (out / "all_logits.onnx").replace(out / "model.onnx")
    (added,) = re.findall(r"^```json\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    settings = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    for name, values in json.loads(added).items():
        settings.setdefault(name, {}).update(values)
    (out / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return out


def answers(folder: Path, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Greedy answers by GenAI's own loop, with the options of the folder alone, and the counts of the last answer."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    found = []
    counts = {}
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


def test_the_folder_is_a_model_like_any_other(folder: Path, finished: Path) -> None:
    """But its speed is not that of single steps."""
    said = nbl("generate", folder, "The language", "--max-new-tokens", 6)
    assert said.out == nbl("generate", finished, "The language", "--max-new-tokens", 6, "--original").out
    assert_refused(nbl("bench", folder), 1, "single steps say nothing")
