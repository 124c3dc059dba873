"""A kind with a memory of one token, added by one file (`toy_memory`), through every part that asks a mixer.

moments ─ fit ─ maps file ─┬─ torch model
                           └─ ONNX: prefill, cached steps, a padded batch, one token behind the last reader, GenAI

An IR takes linear layers alone, so it refuses this kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export import mixers
from nbl_export.calibrate import collect
from nbl_export.errors import NblError, RefusalError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.mixers.base import OWN, Mixer, Port, Running, StateSpec
from nbl_export.mixers.none import Nothing
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.rewrite import rewrite, rewrite_model
from nbl_export.rewrite.builder import GraphBuilder
from nbl_export.rewrite.describe import graph_facts
from nbl_export.targets import exporter_of
from nbl_export.targets.onnx.facts import read_facts
from nbl_export.verify.exporter import row_logits
from tests.genai import said_in_a_batch
from tests.tiny import HEAD_DIM, HIDDEN, LAYERS, VOCAB, random_map
from tests.verifying import verify_tiny

from ..contracts import contract_of
from .toy_memory import MEMORY, Memory

SUBSETS = [s for n in (1, 2) for s in itertools.combinations(range(LAYERS), n)]
PAD = 1  # id of padding
CLOSE = 1e-4  # logits of float32 engines, of about 1


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind is registered for one test."""
    monkeypatch.setattr(mixers, "_KINDS", dict(mixers._KINDS))
    mixers.register(MEMORY)


def memory(layer: int) -> Memory:
    """Random matrices, as large as those of `random_map`."""
    rng = np.random.default_rng(layer)
    now, before = (rng.normal(0, 0.1, (HIDDEN, HIDDEN)).astype(np.float32) for _ in range(2))
    return Memory(now, before, rng.normal(0, 0.1, HIDDEN).astype(np.float32))


KINDS: dict[str, Callable[[int], Mixer]] = {"memory": memory, "none": lambda _layer: Nothing(HIDDEN)}
LENGTHS, STEPS = (12, 5), 6  # valid tokens of the rows of a padded batch, and single steps behind them


def ids() -> np.ndarray:
    found: np.ndarray = np.random.default_rng(3).integers(2, VOCAB, (2, max(LENGTHS) + STEPS))
    return found


def torch_logits(checkpoint: Path, chosen: dict[int, Mixer], tap: str = "residual") -> list[np.ndarray]:
    """Logits of each row without a cache and without padding."""
    model = linearize(load_model(checkpoint), chosen, tap)
    return [row_logits(model, row[: n + STEPS].tolist()) for row, n in zip(ids(), LENGTHS, strict=True)]


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
    right = torch_logits(checkpoint("llama"), chosen)
    decoder = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    assert worst_of_batch(decoder, right) < CLOSE
    assert decoder.contract.state_layers == (replaced if kind == "memory" else ())
    kept = LAYERS - len(replaced)
    assert decoder.contract.cache_bytes_per_token(HEAD_DIM) == kept * 2 * 2 * HEAD_DIM * 4
    assert decoder.cache_bytes == decoder.contract.cache_bytes_per_token(HEAD_DIM) * 2 * decoder.cache_length
    exporter_of(source).keep_last_token(tmp_path / "nbl")
    last = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    last.begin(2)
    found = last.step(*padded())
    assert found.shape[1] == 1
    assert max(np.abs(found[k, 0] - right[k][n - 1]).max() for k, n in enumerate(LENGTHS)) < CLOSE


def test_dense_ids_number_caches_alone(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    chosen: dict[int, Mixer] = {1: memory(1)}
    rewrite(exported("llama", "mobius"), tmp_path / "nbl", chosen, dense=True)
    decoder = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    assert (decoder.contract.cache_layers, decoder.contract.state_layers) == ((0, 1), (1,))
    assert worst_of_batch(decoder, torch_logits(checkpoint("llama"), chosen)) < CLOSE


def test_padding_on_the_left_is_no_row_before(exported: Any, tmp_path: Path) -> None:
    """The layer's own output; GroupQueryAttention takes padding on the right alone."""
    rewrite(exported("llama"), tmp_path / "nbl", {0: memory(0)})
    model = ir.load(tmp_path / "nbl" / "model.onnx")
    shown = next(node for node in model.graph if node.name == "/nbl/layers.0/Add").outputs[0]
    model.graph.outputs.append(shown)
    ir.save(model, tmp_path / "nbl" / "shown.onnx")
    decoder = OnnxDecoder(tmp_path / "nbl", HEAD_DIM, file="shown.onnx")
    mask = np.array([[0, 0, 0, 1, 1, 1]])
    run, seen = decoder.session.run, list[np.ndarray]()

    def noted(outputs: list[str], feeds: Any) -> Any:
        found = run(outputs, feeds)
        seen.append(found[outputs.index(str(shown.name))])
        return found

    decoder.session = SimpleNamespace(run=noted)
    for first in (0, 3):
        decoder.begin(1)
        decoder.step(ids()[:1, first:6], mask[:, first:])
    assert np.abs(seen[0][0, 3:] - seen[1][0]).max() < 1e-6


def test_tap_normed(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    chosen: dict[int, Mixer] = {1: memory(1)}
    rewrite(exported("llama"), tmp_path / "nbl", chosen, "normed")
    right = torch_logits(checkpoint("llama"), chosen, "normed")
    assert worst_of_batch(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), right) < CLOSE


@pytest.fixture(scope="module")
def fitted(checkpoint: Any) -> dict[int, Mixer]:
    """Layers of the tiny Llama, calibrated on a random text and fitted."""
    text = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (32, 64)))
    moments = collect.collect(load_model(checkpoint("llama")), text, lambda *_: None, kind=MEMORY)["residual"]
    return {layer: MEMORY.fit(moments[layer], layer) for layer in range(LAYERS)}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_verification_passes(checkpoint: Any, fitted: dict[int, Mixer], tmp_path: Path, precision: str) -> None:
    """The whole ladder, with greedy text of GenAI against torch."""
    results = verify_tiny(checkpoint("llama"), "genai", precision, tmp_path, (0, 2), mixer_of=fitted.__getitem__)
    assert [r for r in results if not r.passed] == []
    assert {"structure", "original", "nbl", "text", "last_token"} <= {r.check for r in results}


def test_verification_of_layers_that_add_nothing(checkpoint: Any, tmp_path: Path) -> None:
    results = verify_tiny(checkpoint("llama"), "genai", "fp32", tmp_path, (0, 2), mixer_of=KINDS["none"])
    assert [r for r in results if not r.passed] == []


def test_verification_of_a_map_below_a_memory(checkpoint: Any, tmp_path: Path) -> None:
    kinds = (random_map, memory)
    results = verify_tiny(
        checkpoint("llama"), "genai", "fp32", tmp_path, (0, 1), mixer_of=lambda layer: kinds[layer](layer)
    )
    assert [r for r in results if not r.passed] == []


def test_verification_sees_a_wrong_memory(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the graph reads the row of the token itself, as if it were the row before."""
    right = Memory.emit

    def wrong(self: Memory, build: Any, streams: Any) -> Any:
        if not isinstance(build, GraphBuilder):
            return right(self, build, streams)
        x = streams[OWN]
        rows = build.concat([build.state(self.holds, "state"), x], "rows")
        build.keep(self.holds, rows, "state")
        before = build.matmul(build.slice(rows, 1, None, "shifted"), self.before, "before")
        total = build.add(build.matmul(x, self.now, "now"), before, "sum")
        return {Port.OUTPUT: build.add(total, self.bias, "bias")}

    monkeypatch.setattr(Memory, "emit", wrong)
    results = verify_tiny(checkpoint("llama"), "genai", "fp32", tmp_path, (1,), mixer_of=memory)
    assert {r.check for r in results if not r.passed} == {"nbl", "text"}


def test_genai_says_what_the_onnx_decoder_says(exported: Any, tmp_path: Path) -> None:
    """Greedy tokens through ONNX Runtime GenAI, with a stateless layer beside one with a memory."""
    from nbl_export.targets.onnx.genai import GenaiRunner
    from nbl_export.verify.ladder import greedy

    chosen: dict[int, Mixer] = {0: memory(0), 1: random_map(1)}
    rewrite(exported("llama"), tmp_path / "nbl", chosen)
    prompt = ids()[0].tolist()
    right = greedy(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), prompt, 24)[0]
    with GenaiRunner(tmp_path / "nbl", threads=1) as runner:
        assert tuple(runner.greedy(prompt, 24)) == right
        runner.begin(64)
        runner.append(prompt)
        runner.rewind(0)
        runner.append(prompt)
        assert runner.pick() == right[0]
        with pytest.raises(NblError, match="cannot go back to its first 4 tokens"):
            runner.rewind(4)


def test_genai_goes_back_to_where_it_was_told_to(exported: Any, tmp_path: Path) -> None:
    """As a benchmark goes back to the end of a filled cache, again and again."""
    from nbl_export.targets.onnx.genai import GenaiRunner

    rewrite(exported("llama"), tmp_path / "nbl", {0: memory(0)})
    text = ids()[0].tolist()
    with GenaiRunner(tmp_path / "nbl", threads=1) as runner:
        runner.begin(64)
        runner.append(text)
        right = runner.last_logits()
        runner.rewind(0)
        runner.append(text[:10])
        for _ in range(3):
            runner.rewind(10)
            runner.append(text[10:])
            assert np.abs(runner.last_logits() - right).max() < CLOSE


def test_genai_runs_prompts_of_two_lengths(exported: Any, tmp_path: Path) -> None:
    """A batch, padded on the right as GenAI pads it, says what each prompt says alone."""
    from nbl_export.verify.ladder import greedy

    rewrite(exported("llama"), tmp_path / "nbl", {0: memory(0), 2: memory(2)})
    prompts = [ids()[k, :n].tolist() for k, n in enumerate(LENGTHS)]
    right = [greedy(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), prompt, STEPS)[0] for prompt in prompts]
    assert said_in_a_batch(tmp_path / "nbl", prompts, STEPS, PAD) == [list(tokens) for tokens in right]


def test_mixers_in_numpy_between_parts_of_the_original(checkpoint: Any, exported: Any) -> None:
    chosen: dict[int, Mixer] = {0: memory(0), 2: memory(2)}
    mapped = exporter_of("genai").open_mixed(exported("llama"), HEAD_DIM, Running(chosen), "residual", exact=True)
    assert worst_of_batch(mapped, torch_logits(checkpoint("llama"), chosen)) < CLOSE


def test_states_of_two_sizes_are_refused(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = memory(2)
    monkeypatch.setattr(
        Memory, "holds", property(lambda self: StateSpec(2 if np.array_equal(self.now, longer.now) else 1, HIDDEN))
    )
    model = ir.load(exported("llama") / "model.onnx")
    with pytest.raises(RefusalError, match="states of several sizes"):
        rewrite_model(model, {1: memory(1), 2: longer})


def test_a_graph_without_a_mask_is_refused(exported: Any) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    next(v for v in model.graph.inputs if v.name == "attention_mask").name = "mask"
    with pytest.raises(RefusalError, match="no attention_mask"):
        rewrite_model(model, {1: memory(1)})


def test_states_have_the_names_that_genai_knows(exported: Any, tmp_path: Path) -> None:
    rewrite(exported("llama"), tmp_path / "nbl", {2: memory(2)})
    model = ir.load(tmp_path / "nbl" / "model.onnx")
    contract = contract_of(model)
    states = {i.name: i.shape[1:] for i in contract.inputs if i.name.endswith("_state")}
    assert states == {"past_key_values.2.conv_state": (HIDDEN, 1), "past_key_values.2.recurrent_state": (1, 1, 1)}
    assert {"present.2.conv_state", "present.2.recurrent_state"} <= {o.name for o in contract.outputs}
    assert contract.cache_layers == (0, 1)
    per_token = 2 * 2 * 2 * HEAD_DIM * 4
    assert read_facts(tmp_path / "nbl").cache_bytes_per_token == per_token
    facts = graph_facts(model)
    assert (facts["decoder"]["num_layers"], facts["replaced_layers"]) == (LAYERS, [2])
    assert facts["inputs"] == ["input_ids", "attention_mask"] and facts["tail"] is None
