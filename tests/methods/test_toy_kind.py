"""A kind that is added by one file (`toy_thin`), and layers that add nothing, through every part that asks a mixer.

moments ─ fit ─ maps file ─┬─ torch model
                           └─ ONNX: prefill, cached steps, a padded batch, one token behind the last reader, GenAI
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export import methods as mixers
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.emitter import LayerMaker
from nbl_export.methods.applied import linearize
from nbl_export.methods.base import OWN, Mixer, Port
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear import collect
from nbl_export.methods.linear.none import Nothing
from nbl_export.targets import exporter_of
from nbl_export.targets.onnx.engine import CAPABILITIES, OrtEngine
from nbl_export.verify.exporter import row_logits
from tests.command import assert_refused, configured, nbl
from tests.methods.toy_thin import RANK, THIN, Thin
from tests.tiny import HEAD_DIM, HIDDEN, LAYERS, VOCAB
from tests.verifying import verify_tiny

pytestmark = pytest.mark.job

SUBSETS = [s for n in (1, 2) for s in itertools.combinations(range(LAYERS), n)]
CLOSE = 1e-4  # logits of float32 engines, of about 1


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind is registered for one test."""
    monkeypatch.setattr(mixers, "_KINDS", dict(mixers._KINDS))
    mixers.register(THIN)


def thin(layer: int) -> Thin:
    """Random matrices, whose product is about as large as those of `random_map`."""
    rng = np.random.default_rng(layer)
    down, up, bias = (
        rng.normal(0, 0.25, shape).astype(np.float32) for shape in ((RANK, HIDDEN), (HIDDEN, RANK), HIDDEN)
    )
    return Thin(down, up, bias)


KINDS: dict[str, Callable[[int], Mixer]] = {"thin": thin, "none": lambda _layer: Nothing(HIDDEN)}
LENGTHS, STEPS = (12, 5), 6  # valid tokens of the rows of a padded batch, and single steps behind them


def ids() -> np.ndarray:
    found: np.ndarray = np.random.default_rng(3).integers(2, VOCAB, (2, max(LENGTHS) + STEPS))
    return found


def padded() -> tuple[np.ndarray, np.ndarray]:
    """The first chunk of the batch, padded on the right, and its mask."""
    valid = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    return ids()[:, : max(LENGTHS)] * valid, valid


def worst_of_batch(decoder: Any, right: list[np.ndarray]) -> float:
    """Largest difference in a prefill of the padded batch and the steps behind it."""
    decoder.begin(2)
    found = decoder.step(*padded())
    away = [np.abs(found[k, :n] - right[k][:n]).max() for k, n in enumerate(LENGTHS)]
    for step in range(STEPS):
        found = decoder.step(np.array([[ids()[k, n + step]] for k, n in enumerate(LENGTHS)]))
        away += [np.abs(found[k, 0] - right[k][n + step]).max() for k, n in enumerate(LENGTHS)]
    return float(max(away))


CASES = [*(("genai", s) for s in SUBSETS), ("mobius", (1,)), ("mobius", (0, 2))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("source", "replaced"), CASES, ids=str)
def test_graph_computes_what_torch_computes(
    checkpoint: Any, exported: Any, tmp_path: Path, source: str, kind: str, replaced: tuple[int, ...]
) -> None:
    """Every subset of layers: a padded batch, cached steps, and the graph that computes one token at its end."""
    chosen = {i: KINDS[kind](i) for i in replaced}
    exporter_of(source).linearize(exported("llama", source), tmp_path / "nbl", chosen)
    model = linearize(load_model(checkpoint("llama")), chosen)
    right = [row_logits(model, row[: n + STEPS].tolist()) for row, n in zip(ids(), LENGTHS, strict=True)]
    decoder = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    assert worst_of_batch(decoder, right) < CLOSE
    kept = LAYERS - len(replaced)
    assert decoder.contract.cache_bytes_per_token(HEAD_DIM) == kept * 2 * 2 * HEAD_DIM * 4
    assert decoder.cache_bytes == decoder.contract.cache_bytes_per_token(HEAD_DIM) * 2 * decoder.cache_length
    exporter_of(source).keep_last_token(tmp_path / "nbl")
    last = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    last.begin(2)
    found = last.step(*padded())
    assert found.shape[1] == 1
    assert max(np.abs(found[k, 0] - right[k][n - 1]).max() for k, n in enumerate(LENGTHS)) < CLOSE


@pytest.fixture(scope="module")
def fitted(checkpoint: Any) -> dict[int, Mixer]:
    """Layers of the tiny Llama, calibrated on a random text and fitted."""
    text = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (32, 64)))
    moments = collect.collect(load_model(checkpoint("llama")), text, lambda *_: None)["residual"]
    return {layer: THIN.fit(moments[layer], layer) for layer in range(LAYERS)}


def test_a_whole_job_by_its_name(checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key `kind` takes it from the moments to the report, once an engine names it."""
    words = ("--model", checkpoint("llama"), "--calibration", text, "--calibration-tokens", "1024")
    words = (*words, *configured(kind="thin"), "--output", tmp_path / "run")
    assert_refused(nbl(*words), 2, "key kind thin is not for engine ort; it takes linear")
    held = dataclasses.replace(CAPABILITIES, kinds=CAPABILITIES.kinds | {"thin"})
    monkeypatch.setattr(OrtEngine, "capabilities", held)
    done = nbl(*words)
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "run" / "nbl.json").read_text(encoding="utf-8"))["kinds"] == ["thin"]
    assert "Graph verified" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_verification_passes(checkpoint: Any, fitted: dict[int, Mixer], tmp_path: Path) -> None:
    """The whole ladder, with greedy text of GenAI against torch."""
    results = verify_tiny(checkpoint("llama"), "genai", "int4", tmp_path, (0, 2), mixer_of=fitted.__getitem__)
    assert [r for r in results if not r.passed] == []
    assert {"structure", "original", "nbl", "text", "last_token"} <= {r.check for r in results}


def test_verification_sees_a_wrong_emission(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the graph adds no bias."""
    right = Thin.emit

    def wrong(self: Thin, build: Any, streams: Any) -> Any:
        if not isinstance(build, LayerMaker):
            return right(self, build, streams)
        return {Port.OUTPUT: build.matmul(build.matmul(streams[OWN], self.down, "down"), self.up, "up")}

    monkeypatch.setattr(Thin, "emit", wrong)
    results = verify_tiny(checkpoint("llama"), "genai", "fp32", tmp_path, (1,), mixer_of=thin)
    assert {"structure", "nbl"} <= {r.check for r in results if not r.passed}
