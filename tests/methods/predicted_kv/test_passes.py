"""Only some rows of a long step continue above an exit layer: the graph against the original, its caches edited
between calls."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import cache_layers, find_block
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.files import read_graph
from nbl_export.graph.passes.tail import difference, keep_last_token
from nbl_export.methods.base import Mixer, changed
from nbl_export.methods.checkpoint.load import read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.predicted_kv.reference import PredictedKVDecoder, onnx_reference
from nbl_export.methods.rewrite import rewrite
from nbl_export.model.architectures import exits_refused
from nbl_export.targets.onnx_files import check_untouched
from nbl_export.verify.ladder import greedy
from tests.exits import apart, predicted_maps
from tests.tiny import HEAD_DIM, KV_HEADS, LAYERS, VOCAB, cases, made_by, record_of

# Largest logit difference allowed, over the largest logit.
TOLERANCE = {"fp32": 1e-4, "fp16": 0.05}
KEYS = KV_HEADS * HEAD_DIM
TOKENS = np.random.default_rng(2).integers(2, VOCAB, (2, 120))

# By their records.
GRAPHS = [
    (name, source) for source in ("genai", "mobius") for name in made_by(source)
    if source not in exits_refused(record_of(name).name, has_window=False)
]  # fmt: skip
Exported = Callable[..., Path]


def maps_of_exit(exit_layer: int, recent_tokens: int, *, keys: int = KEYS) -> dict[int, PredictedKV]:
    return predicted_maps(exit_layer, recent_tokens, keys)


def reference(
    source: Path, maps: Mapping[int, PredictedKV], *, size: int = HEAD_DIM, fp32_activations: bool = False,
    stored: Mapping[int, dict[str, np.ndarray]] | None = None,
) -> PredictedKVDecoder:  # fmt: skip
    """The original, whose caches are edited between its calls; `test_reference.py` holds it to torch."""
    held: Any = {layer: changed(mixer, (stored or {}).get(layer, {})) for layer, mixer in maps.items()}
    return onnx_reference(source, size, held, fp32_activations=fp32_activations)


def compare(decoder: OnnxDecoder, wanted: PredictedKVDecoder, sizes: Sequence[int]) -> float:
    """The largest difference of logits in steps of these sizes (`tests.exits.apart`)."""
    for one in (decoder, wanted):
        one.begin(1)
    found, start = [], 0
    for end in itertools.accumulate(sizes):
        ours, theirs = (one.step(TOKENS[:1, start:end])[0] for one in (decoder, wanted))
        found.append(apart(ours, theirs[-len(ours) :]))  # all of them, or the last
        start = end
    return max(found)


def steps(recent_tokens: int) -> list[list[int]]:
    """Prompts around W + 1 tokens, later chunks of several sizes, and single tokens."""
    return [
        [recent_tokens + 1, 1, recent_tokens + 2, 1, recent_tokens],
        [3 * recent_tokens + 5, 1, 2 * recent_tokens + 3, 1, 1],
        [1, recent_tokens + 4, recent_tokens + 2, recent_tokens + 1],
    ]


@pytest.mark.parametrize(("exit_layer", "recent_tokens"), list(itertools.product(range(LAYERS), (1, 3, 8))))
def test_every_exit_layer(exit_layer: int, recent_tokens: int, exported: Exported, tmp_path: Path) -> None:
    """Chunks of any size, behind a cache of any length, and single steps; with all logits and the last ones."""
    maps = maps_of_exit(exit_layer, recent_tokens)
    source, out = exported("llama"), tmp_path / "nbl"
    rewrite(source, out, maps)
    every, wanted = OnnxDecoder(out, HEAD_DIM), reference(source, maps)
    keep_last_token(out)
    last = OnnxDecoder(out, HEAD_DIM)
    assert last.contract.logits == "last" and last.contract.cache_layers == tuple(range(LAYERS))
    assert difference(out) == "" and check_untouched(out, source)[0].passed
    for sizes in steps(recent_tokens):
        for decoder in (every, last):
            assert compare(decoder, wanted, sizes) < TOLERANCE["fp32"], sizes


def test_half_precision(given_graph: Callable[[str], Path], tmp_path: Path) -> None:
    maps, source = maps_of_exit(1, 3), given_graph("genai-fp16")
    rewrite(source, tmp_path / "nbl", maps)
    wanted = reference(source, maps)
    for sizes in steps(3):
        assert compare(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), wanted, sizes) < TOLERANCE["fp16"], sizes


@pytest.mark.parametrize(("architecture", "source"), cases([("llama-bias", "genai"), ("phi4-mini", "genai"), *GRAPHS]))
def test_other_graphs(
    architecture: str, source: str, checkpoint: Callable[[str], Path], exported: Exported, tmp_path: Path
) -> None:
    """Another exporter; biases; norms of keys; windows; sinks; rotary embedding of half a head, or none."""
    spec = read_spec(resolve(str(checkpoint(architecture))))
    size = spec.head_dim
    maps = maps_of_exit(1, 3, keys=spec.num_kv_heads * size)
    rewrite(exported(architecture, source), tmp_path / "nbl", maps)
    wanted = reference(exported(architecture, source), maps, size=size)
    assert compare(OnnxDecoder(tmp_path / "nbl", size), wanted, [12, 1, 9, 1]) < TOLERANCE["fp32"]


def test_attributes_of_attention(exported: Exported, tmp_path: Path) -> None:
    """A soft cap of scores, a scale of its own, and the scale that is not stated."""
    for number, (scale, cap) in enumerate([(0.4, 0.0), (0.4, 1.5), (0.0, 0.0)]):
        source, maps = shutil.copytree(exported("llama"), tmp_path / str(number)), maps_of_exit(1, 3)
        model = ir.load(source / "model.onnx")
        for node in model.graph:
            if node.op_type == "GroupQueryAttention":
                node.attributes["scale"] = ir.AttrFloat32("scale", scale)
                node.attributes["softcap"] = ir.AttrFloat32("softcap", cap)
        ir.save(model, source / "model.onnx")
        rewrite(source, tmp_path / f"nbl{number}", maps)
        found = compare(OnnxDecoder(tmp_path / f"nbl{number}", HEAD_DIM), reference(source, maps), [12, 9])
        assert found < TOLERANCE["fp32"]


def test_a_bias_in_a_skip_norm(exported: Exported, tmp_path: Path) -> None:
    """As optimisers fuse it: the stream at the exit layer is a sum of three."""
    source, maps = shutil.copytree(exported("llama-bias"), tmp_path / "source"), maps_of_exit(1, 3)
    model = ir.load(source / "model.onnx")
    for node in [node for node in model.graph if node.op_type == "SkipSimplifiedLayerNormalization"]:
        add = node.inputs[1].producer()  # type: ignore[union-attr]
        if add is not None and add.op_type == "Add" and add.inputs[1] in model.graph.initializers.values():
            node.resize_inputs(4)
            node.replace_input_with(1, add.inputs[0])
            node.replace_input_with(3, add.inputs[1])
    ir.save(model, source / "model.onnx")
    rewrite(source, tmp_path / "nbl", maps)
    assert compare(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), reference(source, maps), [12, 9]) < TOLERANCE["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_short_step_is_the_original(precision: str, exported: Exported, tmp_path: Path) -> None:
    """Bit for bit, also in a padded batch whose shortest sequence is short."""
    source = exported("llama", "genai", precision)
    rewrite(source, tmp_path / "nbl", maps_of_exit(1, 8))
    ours, theirs = OnnxDecoder(tmp_path / "nbl", HEAD_DIM), OnnxDecoder(source, HEAD_DIM)
    valid = np.ones((2, 20), np.int64)
    valid[1, 9:] = 0
    for batch, first, mask in ((1, 9, None), (2, 20, valid)):
        for decoder in (ours, theirs):
            decoder.begin(batch)
        for start, end, given in ((0, first, mask), (20, 21, None), (21, 22, None)):
            ids = TOKENS[:batch, start:end]
            assert np.array_equal(ours.step(ids, given), theirs.step(ids, given))


@pytest.mark.parametrize("lengths", [(20, 11), (20, 5), (6, 6)], ids=str)
def test_a_padded_batch(lengths: tuple[int, int], exported: Exported, tmp_path: Path) -> None:
    """Each sequence is as it is alone, in the prompt and behind it."""
    maps = maps_of_exit(1, 3)
    rewrite(exported("llama"), tmp_path / "nbl", maps)
    every, alone = OnnxDecoder(tmp_path / "nbl", HEAD_DIM), reference(exported("llama"), maps)
    keep_last_token(tmp_path / "nbl")
    valid = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    for decoder in (every, OnnxDecoder(tmp_path / "nbl", HEAD_DIM)):
        decoder.begin(2)
        given = [(TOKENS[:, : max(lengths)], valid), (TOKENS[:, 50:51], None), (TOKENS[:, 51:52], None)]
        found = [decoder.step(ids, mask) for ids, mask in given]
        for row, length in enumerate(lengths):
            alone.begin(1)
            for step, ids in zip(found, (TOKENS[row, :length], TOKENS[row, 50:51], TOKENS[row, 51:52]), strict=True):
                last = step[row][~np.isnan(step[row]).any(1)][-1:]
                assert apart(last, alone.step(ids[None])[0, -1:]) < TOLERANCE["fp32"]


def test_genai_says_what_the_onnx_decoder_says(exported: Exported, tmp_path: Path) -> None:
    """In its shared caches: a prompt of several times W, a second turn, and a way back."""
    from nbl_export.targets.onnx.genai import GenaiRunner

    rewrite(exported("llama"), tmp_path / "nbl", maps_of_exit(1, 5))
    every = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    keep_last_token(tmp_path / "nbl")
    prompt, turn = TOKENS[0, :40].tolist(), TOKENS[0, 40:60]
    with GenaiRunner(tmp_path / "nbl", threads=1) as runner:
        assert tuple(runner.greedy(prompt, 24)) == greedy(every, prompt, 24)[0]
        runner.begin(100)
        for _ in range(2):
            every.begin(1)
            for ids in (TOKENS[0, :40], turn, TOKENS[0, 60:61]):
                runner.append(ids.tolist())
                assert np.abs(runner.last_logits() - every.step(ids[None])[0, -1]).max() < TOLERANCE["fp32"]
            runner.rewind(0)


def test_a_prompt_is_cut_short_by_reading_its_recent_tokens_again(exported: Exported, tmp_path: Path) -> None:
    """As docs/predicted-kv.md says of caches that are rewound into a prompt."""
    from nbl_export.targets.onnx.genai import GenaiRunner

    rewrite(exported("llama"), tmp_path / "nbl", maps_of_exit(1, 5))
    keep_last_token(tmp_path / "nbl")
    prompt, later = TOKENS[0, :40].tolist(), TOKENS[0, 60:66].tolist()
    found = {}
    with GenaiRunner(tmp_path / "nbl", threads=1) as runner:
        runner.begin(100)
        for name, rewound in (("fresh", 0), ("at once", 30), ("recent again", 25)):
            if rewound:
                runner.append(prompt)
                runner.rewind(rewound)
            if rewound < 30:
                runner.append(prompt[rewound:30])
            runner.append(later)
            found[name] = runner.last_logits()
            runner.rewind(0)
    assert np.abs(found["recent again"] - found["fresh"]).max() < TOLERANCE["fp32"]
    assert np.abs(found["at once"] - found["fresh"]).max() > 10 * TOLERANCE["fp32"]


def refusal(source: Path, out: Path, maps: Mapping[int, Mixer]) -> str:
    with pytest.raises(RefusalError) as refused:
        rewrite(source, out, maps)
    return f"{refused.value.layer}: {refused.value.reason}"


def test_refused(exported: Exported, given_graph: Callable[[str], Path], tmp_path: Path) -> None:
    """Layers that differ, others above the exit layer, and attention that is not like this."""
    llama, whole = exported("llama"), maps_of_exit(1, 3)
    cases = [
        (llama, {1: whole[1]}, "2: it has attention without predicted KV"),
        (llama, {2: whole[2]}, "1: it has attention without predicted KV"),
        (
            llama,
            {1: whole[1], 2: replace(predicted_maps(1, 3, KEYS)[2], epsilon=0.5)},
            "2: its predicted KV have another norm",
        ),
        (llama, whole | {0: whole[1]}, "0: it predicts KV below the exit layer"),
        (llama, whole | {2: maps_of_exit(1, 3, keys=KEYS // 2)[2]}, f"2: its map predicts keys {KEYS // 2} wide"),
        (exported("llama", "mobius"), maps_of_exit(1, 3, keys=2 * KEYS), f"1: its map predicts keys {2 * KEYS} wide"),
        (exported("qwen3"), maps_of_exit(1, 3, keys=HEAD_DIM), f"1: its map predicts keys {HEAD_DIM} wide"),
        (exported("hunyuan"), whole, "1: its keys come by RotaryEmbedding"),
        (exported("gpt_oss", "mobius"), whole, "1: its attention is no GroupQueryAttention"),
        (given_graph("mobius-fp16"), whole, "1: its attention is no GroupQueryAttention"),
    ]
    for number, (source, maps, reason) in enumerate(cases):
        assert refusal(source, tmp_path / str(number), maps).startswith(reason)


def test_the_graph_is_understood(exported: Exported, tmp_path: Path) -> None:
    """Layers, joins and caches of an exit layer graph are found; a step runs few nodes more, and a matrix is stored
    once."""
    rewrite(exported("llama"), tmp_path / "nbl", maps_of_exit(1, 3))
    graph = read_graph(tmp_path / "nbl" / "model.onnx").graph
    assert cache_layers(graph) == (0, 1, 2)
    assert len(graph) == len(read_graph(exported("llama") / "model.onnx").graph) + 12
    assert [find_block(graph, layer).branch.producer().op_type for layer in range(LAYERS)] == ["MatMul"] * LAYERS  # type: ignore[union-attr]
    assert all(len(value.uses()) == 1 for name, value in graph.initializers.items() if name.endswith("MatMul.weight")
               and "lm_head" not in name)  # fmt: skip


def test_a_cache_with_room_is_written_in_place(exported: Exported, tmp_path: Path) -> None:
    """Where few rows continue, a cache is read up to the step, measured and scattered into, and never copied whole."""
    rewrite(exported("llama"), tmp_path / "nbl", maps_of_exit(1, 3))
    graph = read_graph(tmp_path / "nbl" / "model.onnx").graph
    for layer in (1, 2):
        key = f"past_key_values.{layer}.key"
        choice = next(value.producer() for value in graph.outputs if value.name == f"present.{layer}.key")
        assert choice is not None
        few = choice.attributes["then_branch"].as_graph()
        inner = [a.as_graph() for node in few for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
        read = [node for node in (*few, *(node for branch in inner for node in branch)) if key in _names(node)]
        assert [node.op_type for node in read] == ["Slice", "Shape", "ScatterND"]


def _names(node: ir.Node) -> list[str | None]:
    return [value.name for value in node.inputs if value is not None]
