"""Random small configurations of every architecture: sizes, kinds of layers, experts, and which layers are replaced.

    pytest -m fuzz tests/targets/test_random_configurations.py

Each goes through one source of graphs. The rewritten graph must agree with torch: padded batch, prefill, cached steps.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.ir.session import IrDecoder
from nbl_export.graph.names import IR_FILE
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model, read_spec
from nbl_export.methods.checkpoint.shape import read_shape
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.linear.maps import Linear
from nbl_export.targets import exporter_of
from nbl_export.targets.base import ExportSettings
from nbl_export.verify.ladder import run_rows

from ..tiny import _SPECIAL, EVERY, HEAD_DIM, HIDDEN, VOCAB, record_of, save_checkpoint

pytestmark = pytest.mark.engine

NEAR = 1e-5  # of the largest logit; wrong wiring is beyond 1e-2
SOURCES = ("genai", "mobius", "openvino")
LISTS = ("smollm3", "phi3-long")  # with one number a layer or a frequency: their sizes stay


@st.composite
def sizes(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    """Changes of a tiny configuration. The size of a head stays, since rotary settings depend on it."""
    special = _SPECIAL[architecture][1]
    apart = "num_attention_heads" not in special  # the hidden size is another than that of all heads
    head = special.get("head_dim", HEAD_DIM) or HIDDEN // special["num_attention_heads"]
    groups, layers = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    heads = groups * draw(st.integers(1, 3))
    found: dict[str, Any] = {
        "num_key_value_heads": groups,
        "num_attention_heads": heads,
        "hidden_size": heads * (draw(st.sampled_from((24, 40))) if apart else head),
        "intermediate_size": draw(st.sampled_from((32, 96, 160))),
        "num_hidden_layers": layers,
    }
    if "shared_intermediate_size" in special:
        found["shared_intermediate_size"] = draw(st.sampled_from((32, 96, 160)))
    if special.get("sliding_window"):
        found["sliding_window"] = draw(st.integers(1, 40))
    if kinds := sorted(set(special.get("layer_types", ()))):
        types = draw(st.lists(st.sampled_from(kinds), min_size=layers, max_size=layers))
        types[draw(st.integers(0, layers - 1))] = "full_attention"
        found["layer_types"] = types
    return found | draw(experts(special))


@st.composite
def experts(draw: st.DrawFn, special: dict[str, Any]) -> dict[str, Any]:
    key = next((name for name in ("num_experts", "num_local_experts") if special.get(name)), None)
    if key is None:
        return {}
    found: dict[str, Any] = {key: draw(st.integers(2, 9))}
    of_phi = "lm_head_bias" in special  # its router gives a token two experts
    found["num_experts_per_tok"] = 2 if of_phi else draw(st.integers(1, found[key]))
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if name in special:
            found[name] = draw(st.sampled_from((32, 64, 96)))
    return found


def source_of(architecture: str, data: st.DataObject) -> str:
    left_out = record_of(architecture).not_from
    return data.draw(st.sampled_from([name for name in SOURCES if name not in left_out]))


def a_map(hidden: int, layer: int) -> Linear:
    rng = np.random.default_rng(layer)
    weight = (rng.standard_normal((hidden, hidden)) / 8).astype(np.float32)
    return Linear(weight, rng.standard_normal(hidden).astype(np.float32))


@pytest.mark.fuzz
@pytest.mark.parametrize("architecture", [name for name in EVERY if name not in LISTS])
@settings(
    max_examples=4, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck), database=None
)
@given(data=st.data())
def test_a_rewritten_graph_agrees_with_torch(architecture: str, data: st.DataObject) -> None:
    changes, source = data.draw(sizes(architecture)), source_of(architecture, data)
    rows = [np.random.default_rng(n).integers(2, VOCAB, n).tolist() for n in data.draw(_LENGTHS)]
    with tempfile.TemporaryDirectory() as scratch:
        directory = save_checkpoint(architecture, Path(scratch) / "model", **changes)
        spec, target = read_spec(resolve(str(directory))), exporter_of(source)
        most = spec.num_layers - 1  # a decoder keeps an attention layer
        layers = data.draw(st.sets(st.sampled_from(range(spec.num_layers)), min_size=1, max_size=most))
        maps = {i: a_map(spec.hidden_size, i) for i in sorted(layers)}
        note(f"{source}, layers {sorted(maps)}")
        model = load_model(directory)
        matrices = [p for n, p in model.get_decoder().layers.named_parameters() if p.ndim > 1 and "bias" not in n]
        assert read_shape(directory).parameters_of_layers == sum(p.numel() for p in matrices)
        original, out = Path(scratch) / "original", Path(scratch) / "nbl"
        target.export(directory, original, ExportSettings(source, "fp32", 96))
        target.linearize(original, out, maps)
        decoder: Any = OnnxDecoder(out, spec.head_dim) if source != "openvino" else IrDecoder(out, IR_FILE, exact=True)
        assert decoder.contract.cache_layers == tuple(i for i in range(spec.num_layers) if i not in maps)
        model = linearize(model, maps)
        with torch.inference_mode():
            expected = [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows]
        for found, logits in zip(run_rows(decoder, rows), expected, strict=True):
            assert np.abs(found - logits).max() < NEAR * np.abs(logits).max()


_LENGTHS = st.tuples(st.integers(18, 60), st.integers(18, 60))
