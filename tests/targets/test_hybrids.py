"""Hybrids: attention beside layers that hold states, from the GenAI builder's graph to ONNX Runtime GenAI."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import find_reader, reading_layers
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE, all_logits_file
from nbl_export.mixers.linear import Linear
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.records.plan import Plan
from nbl_export.rewrite import rewrite, rewrite_model
from nbl_export.rewrite.tail import keep_last_token
from nbl_export.targets.openvino.engine import OPENVINO
from nbl_export.targets.openvino.ir.files import read_ir
from nbl_export.targets.openvino.session import IrDecoder
from nbl_export.verify.ladder import DECODE_STEPS, run_rows

from ..tiny import HEAD_DIM, HYBRID_ATTENTION, HYBRIDS, VOCAB

Checkpoint = Callable[[str], Path]
Exported = Callable[..., Path]
Maps = Callable[..., dict[int, Linear]]
TOLERANCE = 2e-4  # of logits, float32
FIVE = range(5)
OTHERS = tuple(i for i in FIVE if i not in HYBRID_ATTENTION)
SETS = [chosen for count in range(3) for chosen in itertools.combinations(HYBRID_ATTENTION, count)]
FIRST = [pytest.param(name, marks=() if name == "lfm2_moe" else pytest.mark.fuzz) for name in HYBRIDS]
LENGTHS = (29, 11)


def rows() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, n + DECODE_STEPS).tolist() for n in LENGTHS]


def torch_logits(checkpoint: Path, maps: dict[int, Linear]) -> list[np.ndarray]:
    model = linearize(load_model(checkpoint), maps)
    with torch.inference_mode():
        return [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows()]


def head_dim(checkpoint: Path) -> int:
    config = json.loads((checkpoint / "config.json").read_text())
    return int(config.get("head_dim") or HEAD_DIM)


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Both prompts as one batch, and where they are."""
    ids, valid = np.zeros((2, max(LENGTHS)), np.int64), np.zeros((2, max(LENGTHS)), np.int64)
    for k, (row, length) in enumerate(zip(rows(), LENGTHS, strict=True)):
        place = slice(0, length) if side == "right" else slice(max(LENGTHS) - length, None)
        ids[k, place], valid[k, place] = row[:length], 1
    return ids, valid


@pytest.mark.parametrize(
    ("architecture", "source"),
    [pytest.param(name, "genai", marks=() if name == "lfm2_moe" else pytest.mark.fuzz) for name in HYBRIDS]
    + [pytest.param(name, "mobius", marks=pytest.mark.fuzz) for name in ("qwen3_5", "qwen3_5_moe", "qwen3_next")],
)
def test_every_set_of_attention_layers_agrees_with_torch(
    architecture: str, source: str, checkpoint: Checkpoint, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """Alone and in a padded batch, prefill and cached steps; and what ships, which computes the last token alone."""
    for replaced in SETS:
        maps, out = random_maps(*replaced), tmp_path / f"nbl{replaced}"
        rewrite(exported(architecture, source), out, Plan(5, replaced, others=OTHERS), maps)
        head = head_dim(checkpoint(architecture))
        decoder, expected = OnnxDecoder(out, head), torch_logits(checkpoint(architecture), maps)
        for found in (run_rows(decoder, rows()), [run_rows(decoder, [row])[0] for row in rows()]):
            away = max(float(np.abs(g - e).max()) for g, e in zip(found, expected, strict=True))
            assert away < TOLERANCE, replaced
        assert decoder.contract.cache_layers == tuple(i for i in HYBRID_ATTENTION if i not in replaced)
        assert decoder.contract.state_layers == OTHERS
        keep_last_token(out)
        last = OnnxDecoder(out, head)
        last.begin(2)
        first = last.step(*padded("right"))
        steps = [last.step(np.array([[row[n + k]] for row, n in zip(rows(), LENGTHS, strict=True)])) for k in range(2)]
        for k, (logits, n) in enumerate(zip(expected, LENGTHS, strict=True)):
            got = np.concatenate([first[k], *(step[k] for step in steps)])
            assert got.shape == (3, VOCAB) and np.abs(got - logits[n - 1 : n + 2]).max() < TOLERANCE, replaced


@pytest.mark.parametrize("architecture", ["lfm2", pytest.param("lfm2_moe", marks=pytest.mark.fuzz)])
def test_an_ir_holds_convolutions_as_states(
    architecture: str, checkpoint: Checkpoint, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """Every set of attention layers, in a padded batch: prefill and cached steps of both graphs."""
    for replaced in SETS:
        maps, out = random_maps(*replaced), tmp_path / f"nbl{replaced}"
        OPENVINO.linearize(exported(architecture, "openvino", "fp32"), out, Plan(5, replaced, others=OTHERS), maps)
        expected = torch_logits(checkpoint(architecture), maps)
        OPENVINO.keep_last_token(out)
        every, last = (IrDecoder(out, file, exact=True) for file in (ALL_LOGITS_IR, IR_FILE))
        away = max(float(np.abs(g - e).max()) for g, e in zip(run_rows(every, rows()), expected, strict=True))
        assert away < TOLERANCE, replaced
        assert every.contract.cache_layers == tuple(i for i in HYBRID_ATTENTION if i not in replaced)
        assert last.contract.state_layers == OTHERS and last.contract.logits == "last"
        last.begin(2)
        first = last.step(*padded("right"))
        then = last.step(np.array([[row[n]] for row, n in zip(rows(), LENGTHS, strict=True)]))
        for k, (logits, n) in enumerate(zip(expected, LENGTHS, strict=True)):
            assert np.abs(np.concatenate([first[k], then[k]]) - logits[n - 1 : n + 1]).max() < TOLERANCE, replaced


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_taps_of_convolutions_stay_as_they_are(precision: str, exported: Exported) -> None:
    model = read_ir(exported("lfm2", "openvino", precision))
    taps = [node.input_value(1).get_node() for node in model.get_ops() if node.get_type_name() == "GroupConvolution"]
    assert [node.get_output_element_type(0).to_string() for node in taps] == ["f32"] * len(OTHERS)
    assert all(node.get_type_name() == "Constant" for node in taps)


def test_the_tail_stops_at_a_layer_that_mixes_tokens(exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    """Layer 3 has a convolution: with the last attention gone, its last product is the first of the last token."""
    rewrite(exported("lfm2"), tmp_path / "nbl", Plan(5, (4,), others=OTHERS), random_maps(4))
    keep_last_token(tmp_path / "nbl")
    graph = ir.load(tmp_path / "nbl" / "model.onnx").graph
    assert reading_layers(graph) == (0, 1, 2, 3)
    gathered = next(node for node in graph if node.name == "/nbl/tail/attention")
    assert [user.name for user in gathered.outputs[0].consumers()] == ["/model/layers.3/conv/out_proj/MatMul"]
    assert find_reader(graph, 3).join.name == "/model/layers.3/ffn_layernorm/SkipLayerNorm"
    whole = ir.load(tmp_path / "nbl" / all_logits_file(tmp_path / "nbl")).graph
    assert not any("/nbl/tail" in str(node.name) for node in whole)


def test_padding_leaves_states_as_they_are(exported: Exported) -> None:
    """A text of one token, shorter than the state, padded on either side. No attention reads padding below layer 0."""
    decoder = OnnxDecoder(exported("lfm2"), HEAD_DIM)

    def state(ids: list[int], valid: list[int]) -> np.ndarray:
        decoder.begin(1)
        decoder.step(np.array([ids]), np.array([valid]))
        found: np.ndarray = decoder.mark()[0]["past_key_values.0.conv_state"]
        return found

    alone = state([7], [1])
    assert np.abs(alone).max() > 100 * TOLERANCE
    for ids, valid in (([7, 9, 9], [1, 0, 0]), ([9, 9, 7], [0, 0, 1])):
        assert np.abs(state(ids, valid) - alone).max() < TOLERANCE, valid


def test_a_layer_without_attention_is_not_replaced(exported: Exported, random_maps: Maps) -> None:
    model = ir.load(exported("lfm2") / "model.onnx")
    with pytest.raises(RefusalError, match="has no attention"):
        rewrite_model(model, Plan(5, (0,)), random_maps(0))


@pytest.mark.parametrize("architecture", FIRST)
def test_genai_runs_both_graphs(
    architecture: str, checkpoint: Checkpoint, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """Greedy tokens as torch's; after going back to the start, the same tokens again."""
    from nbl_export.targets.onnx.genai import GenaiRunner

    for replaced in ((), (1, 4)):
        maps = random_maps(*replaced)
        rewrite(exported(architecture), tmp_path / f"nbl{replaced}", Plan(5, replaced, others=OTHERS), maps)
        with GenaiRunner(tmp_path / f"nbl{replaced}", threads=1) as runner:
            runner.begin(64)
            said = [_continued(runner, rows()[1][:9], 6) for _ in range(2)]
        model = linearize(load_model(checkpoint(architecture)), maps)
        ids = torch.tensor([rows()[1][:9]])
        for _ in range(6):
            with torch.inference_mode():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert said == [ids[0, 9:].tolist()] * 2, replaced


def _continued(runner: Any, ids: list[int], count: int) -> list[int]:
    runner.rewind(0)
    found: list[int] = []
    for _ in range(count):
        runner.append(ids if not found else found[-1:])
        found.append(runner.pick())
    return found


def test_settings_name_no_layers(exported: Exported) -> None:
    """GenAI counts the layers of its own type of hybrid, and a replaced layer would break the count."""
    settings = json.loads((exported("lfm2") / "genai_config.json").read_text())["model"]
    assert settings["type"] == "llama"
    assert not {"layer_types", "conv_cache_size"} & settings["decoder"].keys()
    assert "past_conv_names" not in settings["decoder"]["inputs"]
