"""References of a model with one layer in memory at a time: the figures of the whole model in memory."""

from __future__ import annotations

import json
import string
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.errors import CorruptError, NblError
from nbl_export.mixers.base import Mixer
from nbl_export.model import one_layer
from nbl_export.model.checkpoint import load
from nbl_export.records.quantised import Blocks, StoredMatrix
from nbl_export.targets import onnx_files
from nbl_export.verify import torch_reference
from nbl_export.verify.kept import CODES, OWN
from nbl_export.verify.ladder import Probe, Reference
from nbl_export.verify.streamed_reference import StreamedReference

from ..command import TINY, nbl
from ..jobs import until
from ..tiny import EVERY, VOCAB, random_map
from ..verifying import verify_tiny

Checkpoint = Callable[[str], Path]
IDS = np.random.default_rng(0).integers(2, VOCAB, 150).tolist()
PROBE = Probe((tuple(IDS[:45]), tuple(IDS[-27:])), (tuple(IDS[20:44]), tuple(IDS[90:100])), 6, tuple(IDS))
SHORT = Probe(PROBE.rows, (), 6)
MAPS: dict[int, Mixer] = {0: random_map(0), 2: random_map(2)}


class Graph:
    """Proposes greedy text of a torch model; the token at `wrong` is another one."""

    def __init__(self, models: dict[tuple[str, str], Any], wrong: int | None = None) -> None:
        self.models, self.wrong, self.asked = models, wrong, 0

    def __call__(self, kind: str, subject: str, texts: Any, counts: Any) -> list[Sequence[int]]:
        self.asked += 1
        known = self.models[kind, subject]
        found: list[Sequence[int]] = []
        for text, count in zip(texts, counts, strict=True):
            ((said, place),) = [
                (s, len(text) - len(p)) for p, s in zip(PROBE.prompts, known, strict=True) if tuple(text[: len(p)]) == p
            ]
            proposed = list(said[place : place + count])
            if self.wrong is not None and self.wrong < count:
                proposed[self.wrong] = (proposed[self.wrong] + 1) % VOCAB
            found.append(proposed)
        return found


def silent(_done: int, _total: int) -> None:
    pass


def same(found: Reference, expected: Reference) -> None:
    for one, other in zip((*found.logits, found.long), (*expected.logits, expected.long), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert found.greedy == expected.greedy
    np.testing.assert_allclose(found.margins, expected.margins, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", EVERY)
def test_logits_text_and_noise_are_those_of_the_whole_model(architecture: str, checkpoint: Checkpoint) -> None:
    directory, tap = checkpoint(architecture), "residual" if architecture in ("olmo2", "llama") else "normed"
    model = load.load_model(directory)
    expected = torch_reference.references(model, MAPS, tap, PROBE)
    graph = Graph({(OWN, subject): r.greedy for subject, r in expected.items()}, wrong=2)
    layers = StreamedReference(directory, MAPS, tap, None, graph)
    found = layers.references({OWN: PROBE}, {}, silent)[0][OWN]
    for subject, reference in expected.items():
        same(found[subject], reference)
        noisy = torch_reference.noise_with_maps(model, MAPS, tap, PROBE, subject, reference)
        ours = layers.noise(OWN, subject, PROBE, found[subject])
        for one, other in zip((*ours.noise, ours.long_noise), (*noisy.noise, noisy.long_noise), strict=True):
            assert one is not None and other is not None and one.shape == other.shape
            assert 0.8 < float(one.mean() / other.mean()) < 1.25  # of rounding errors
    assert graph.asked == 2 * 2  # one wrong proposal a text costs one pass


@pytest.mark.parametrize(
    ("source", "architecture", "precision"),
    [("genai", "llama", "int4"), ("genai", "gemma3", "fp32"),
     pytest.param("genai", "qwen2", "int8", marks=pytest.mark.fuzz),
     pytest.param("openvino", "llama", "int4", marks=pytest.mark.fuzz)],
)  # fmt: skip
def test_a_verification_finds_what_it_finds_in_memory(
    source: str, architecture: str, precision: str, checkpoint: Checkpoint, exported: Any, tmp_path: Path
) -> None:
    """Also with the matrices of quantised graphs, and twins without float32 matrices."""
    given, graph = (checkpoint(architecture), source, precision), exported(architecture, source, precision)
    whole = verify_tiny(*given, tmp_path / "whole", exported=graph)
    with mock.patch.object(onnx_files, "available_bytes", return_value=0):
        layers = verify_tiny(*given, tmp_path / "layers", exported=graph, layers=True)
    for one, other in zip(layers, whole, strict=True):
        assert (one.check, one.subject, one.metric) == (other.check, other.subject, other.metric)
        assert one.value == pytest.approx(other.value, rel=1e-3, abs=2e-5), one.metric
        assert one.passed, one
    for path in (tmp_path / "layers").glob("coded/*/*.onnx"):
        kinds = {n.op_type for n in ir.load(path).graph}
        assert "MatMulNBits" in kinds and path.parent.parent.parent.name == "layers"
    assert bool([*tmp_path.glob("layers/coded/*/*.onnx")]) == (source == "genai" and precision != "fp32")


def test_a_job_loads_no_whole_model(
    checkpoint: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.model.one_layer.shortage_of", lambda *_: "too large")
    given = ("--model", checkpoint("llama"), "--calibration", text, *TINY, "--layers", 1, "--output", tmp_path / "run")
    with until("verify"), mock.patch.object(load, "load_model", side_effect=AssertionError("the whole model")):
        done = nbl(*given)
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "run" / "verify.json").read_text(encoding="utf-8"))["passed"]


def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A list that gets each layer that is loaded, and how many others have weights then; the head is number -1."""
    before: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    found: list[tuple[int, int]] = []
    fill = one_layer.WeightReader.fill

    def watch(self: Any, module: torch.nn.Module, renamed: Callable[[str], str]) -> None:
        numbers = {int(n.split(".")[1]) for n in map(renamed, dict(module.named_parameters())) if "layers." in n}
        alive = [m for m in before if any(p.device.type != "meta" for p in m.parameters())]
        found.append((min(numbers, default=-1), len(alive)))
        before.add(module)
        fill(self, module, renamed)

    monkeypatch.setattr(one_layer.WeightReader, "fill", watch)
    return found


def of(name: str, weight: torch.Tensor) -> StoredMatrix:
    """A matrix in float, as codes of one step."""
    blocks = Blocks(weight.numpy(), np.ones((len(weight), 1), np.float32), weight.shape[1])
    return StoredMatrix(name, False, lambda: blocks)


def coded(model: Any, change: Callable[[dict[str, torch.Tensor]], None]) -> torch_reference.Codes:
    """Every matrix of the layers, a little off, after a change."""
    found = {n: 1.01 * w for n, w in model.state_dict().items() if "layers." in n and w.ndim == 2}
    change(found)
    return torch_reference.Codes({"original": [of(*pair) for pair in found.items()], "nbl": []})


def test_one_layer_is_in_memory_and_a_pass_reads_each_once(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four variants, two of them with matrices of a graph whose names and order say nothing of layers."""
    model = load.load_model(checkpoint("llama"))

    def backwards(found: dict[str, torch.Tensor]) -> None:
        for letter, name in zip(string.ascii_letters, sorted(found, reverse=True), strict=False):
            found[letter] = found.pop(name)

    codes = coded(model, backwards)
    seen = loaded(monkeypatch)
    layers = StreamedReference(checkpoint("llama"), MAPS, "residual", codes, Graph({}))
    found, fidelity = layers.references({OWN: SHORT, CODES: SHORT}, {}, silent)
    assert seen == [(0, 0), (1, 0), (2, 0), (-1, 0)]
    expected, steps = torch_reference.references_with_codes(model, MAPS, "residual", SHORT, codes)
    for subject, reference in expected.items():
        same(found[CODES][subject], reference)
        assert np.abs(reference.logits[0] - found[OWN][subject].logits[0]).max() > 1e-3
    assert {f.name: f.modules for f in fidelity} == {f.name: f.modules for f in steps}
    assert max(f.steps for f in fidelity) == pytest.approx(max(f.steps for f in steps))
    again = layers.references({OWN: SHORT, CODES: SHORT}, {OWN: found[OWN]["original"]}, silent)[0]
    assert len(seen) == 8 and again[OWN]["original"] is found[OWN]["original"]  # what is known is not computed


def other(found: dict[str, torch.Tensor]) -> None:
    found["odd"] = torch.randn(96, 96, generator=torch.Generator().manual_seed(5))


def half(found: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    found[name] = found[name][:64]


@pytest.mark.parametrize(
    ("fault", "said"), [(other, "odd of the graph, from row 0 on"), (half, r"only a part of model\.layers\.1\.mlp")]
)
def test_a_matrix_that_the_model_lacks_is_named(fault: Any, said: str, checkpoint: Checkpoint) -> None:
    codes = coded(load.load_model(checkpoint("llama")), fault)
    layers = StreamedReference(checkpoint("llama"), MAPS, "residual", codes, Graph({}))
    with pytest.raises(CorruptError, match=said):
        layers.references({OWN: SHORT, CODES: SHORT}, {}, silent)


def test_what_needs_the_whole_model_is_refused_if_it_cannot_be_in_memory(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_layer, "available_bytes", lambda: 1 << 10)
    with pytest.raises(NblError, match=r"needs the whole torch model in memory, and its weights take .* GiB"):
        load.load_model(checkpoint("llama"))
