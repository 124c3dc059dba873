"""The harness' view of a decoder: the same answers as the harness' own class gives for the torch model."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.methods.linear.maps import Linear
from nbl_export.verify.ladder import TOLERANCES

from ..evaluation_tiny import request

pytestmark = pytest.mark.engine

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")

LIMIT = 2 * TOLERANCES["fp32"].limit  # a log softmax moves by at most twice what its logits move by
PAIRS = (
    ("The import statement", " is"),
    ("The import statement", " binds the names in the namespace"),
    ("", "with no context at all"),
    ("A trailing space ", "moves over"),
    ("<s>Begins with the prefix", " already"),
)
TEXTS = ("A short text.", "The with statement is used to wrap the execution of a block. " * 30)


@pytest.fixture(scope="module")
def ours(genai_dirs: dict[str, Path]) -> Any:
    from nbl_export.evaluation.lm import OnnxLM

    return OnnxLM(path=str(genai_dirs["nbl"]), max_length=128)


@pytest.fixture(scope="module")
def torch_model(checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]]) -> Any:
    from lm_eval.models.huggingface import HFLM

    from nbl_export.methods.applied import linearize
    from nbl_export.methods.checkpoint.load import load_model, load_tokenizer

    directory = checkpoint("llama")
    model, tokenizer = linearize(load_model(directory), random_maps(1)), load_tokenizer(directory)
    return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4, max_length=128, device="cpu")


def test_loglikelihoods(ours: Any, torch_model: Any) -> None:
    requests = [request(*pair) for pair in PAIRS]
    found, theirs = ours.loglikelihood(requests), torch_model.loglikelihood(requests)
    for (_, continuation), (a, greedy), (b, expected) in zip(PAIRS, found, theirs, strict=True):
        assert abs(a - b) <= LIMIT * len(ours.tok_encode(continuation)), continuation
        assert greedy == expected


def test_rolling_loglikelihoods_also_of_texts_longer_than_the_model_reads(ours: Any, torch_model: Any) -> None:
    requests = [request(text) for text in TEXTS]
    tokens = [len(ours.tok_encode(text)) for text in TEXTS]
    assert tokens[1] > 3 * 128
    found, theirs = ours.loglikelihood_rolling(requests), torch_model.loglikelihood_rolling(requests)
    assert all(abs(a - b) <= LIMIT * n for a, b, n in zip(found, theirs, tokens, strict=True)), (found, theirs)


def test_generated_text(ours: Any, torch_model: Any) -> None:
    whole = {"until": [], "max_gen_toks": 12, "do_sample": False}
    requests = [request(text, whole) for text in ("The import statement", "An expression", "If the name is bound")]
    found = ours.generate_until(requests)
    assert found == torch_model.generate_until(requests)
    stop = found[0][3:5]
    cut = ours.generate_until([request("The import statement", {**whole, "until": [stop]})])
    assert cut == [found[0].partition(stop)[0]]
    with pytest.raises(NblError, match="decodes greedily"):
        ours.generate_until([request("A", {"do_sample": True, "temperature": 1.0, "until": []})])


def test_other_directories_are_refused(finished: Path, tmp_path: Path) -> None:
    from nbl_export.evaluation.lm import OnnxLM

    for path in (finished, tmp_path):
        with pytest.raises(NblError, match="is not a model directory; give the model or the original of a run"):
            OnnxLM(path=str(path))


def test_installed_packages_are_where_a_newer_harness_looks() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["nbl-onnx"].partition(":")
    from lm_eval.api.registry import get_model

    assert get_model("nbl-onnx") is getattr(importlib.import_module(module), name)
