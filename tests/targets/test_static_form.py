"""Laws of the static form: number for number what torch computes, in any chunking, and every planted fault shows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import CorruptError, NblError, RefusalError
from nbl_export.graph.names import ALL_LOGITS_FILE, GRAPH_FILE
from nbl_export.graph.passes.caches import RenumberCaches
from nbl_export.graph.passes.tail import difference, keep_last_token
from nbl_export.graph.quantised import int4_blocks
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.rewrite import rewrite_model
from nbl_export.model.architectures import windows_of
from nbl_export.records.decoder import ITEMSIZE
from nbl_export.targets.tensorrt import export as static
from nbl_export.targets.tensorrt.static_form.check import CheckForm
from nbl_export.targets.tensorrt.static_form.numbers import INT4_BLOCK, BlockInt4, ScaledQueries

from ..contracts import contract_of
from ..static_tiny import (
    ARCHITECTURES,
    HEAD,
    LAYERS,
    SLOTS,
    SPEC,
    SUBSETS,
    TOLERANCE,
    VOCAB,
    WINDOW,
    maps_of,
    open_decoder,
    rows,
    single_row_error,
    torch_logits,
    worst,
)  # fmt: skip

pytestmark = pytest.mark.engine

FAULT = 100 * TOLERANCE["fp32"]  # what a planted fault must exceed; they give 0.3 and more

Form = Callable[[str], ir.Model]
Logits = Callable[[str], list[np.ndarray]]


@pytest.fixture(scope="session")
def logits(tiny: Callable[[str], Path]) -> Logits:
    """architecture -> torch's logits of both rows"""
    return functools.cache(lambda architecture: torch_logits(tiny(architecture)))


@pytest.fixture(scope="session")
def graph(form: Form, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(architecture, logits, precision) -> decoder.onnx"""

    @functools.cache
    def make(architecture: str, which: str = "all", precision: str = "fp32") -> Path:
        out = tmp_path_factory.mktemp(f"{architecture}-{which}-{precision}")
        model = form(architecture)
        static.finish(model, precision)
        static.save_graph(model, out)
        if which == "last":
            keep_last_token(out)
        return out / "decoder.onnx"

    return make


def saved(model: ir.Model, directory: Path) -> Path:
    static.save_graph(model, directory)
    return directory / "decoder.onnx"


# -- parity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["all", "last"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_row(architecture: str, which: str, graph: Callable[..., Path], logits: Logits) -> None:
    """One chunk, several, chunks that end within a part, 32 steps, and up to the last slot."""
    expected = logits(architecture)[0]
    for lengths, chunk in (
        ([25], SLOTS), ([7, 13, 5], 13), ([25], 7), ([30, *[1] * 32], 8), ([50, 20, *[1] * 26], 16),
    ):  # fmt: skip
        error = single_row_error(graph(architecture, which), expected, lengths, chunk)
        assert error < TOLERANCE["fp32"], (lengths, chunk)


@pytest.mark.parametrize("which", ["all", "last"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_two_rows_of_different_length_to_their_last_slots(
    architecture: str, which: str, graph: Callable[..., Path], logits: Logits
) -> None:
    """Rows take turns and rest, up to the last slot of the longer one."""
    decoder = open_decoder(graph(architecture, which), chunk=8)
    decoder.begin(2)
    at = [0, 0]
    for taken in [(19, 5), (1, 1), (0, 9), (3, 0), *[(1, 1)] * 12, (0, 40), (20, 0), *[(1, 1)] * 29]:
        ids, valid = np.zeros((2, max(taken)), int), np.zeros((2, max(taken)), int)
        for row, n in enumerate(taken):
            ids[row, :n], valid[row, :n] = rows()[row][at[row] : at[row] + n], 1
        got = decoder.step(ids, valid)
        for row, n in enumerate(taken):
            at[row] += n
            seen = got[row] if which == "last" else got[row, :n]
            expected = logits(architecture)[row][at[row] - len(seen) : at[row]]
            assert not n or worst(seen, expected) < TOLERANCE["fp32"], (taken, row)
    assert max(at) == SLOTS
    with pytest.raises(NblError, match="96 tokens are cached and 1 more do not fit into 96 slots"):
        decoder.step(np.ones((2, 1), int))


def test_half_precision_is_near(graph: Callable[..., Path], logits: Logits) -> None:
    expected = logits("mistral-window")[0]
    error = single_row_error(graph("mistral-window", "last", "fp16"), expected, [20, *[1] * 20], 16)
    assert 0 < error < TOLERANCE["fp16"]


def test_int4_is_torch_with_the_same_numbers(
    tiny: Callable[[str], Path], graph: Callable[..., Path], form: Form, tmp_path: Path
) -> None:
    """float32 around int4 blocks equals torch whose matrices went through the same codes."""
    import torch

    from nbl_export.methods.checkpoint.load import load_model

    model = load_model(tiny("mistral"))
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.copy_(torch.from_numpy(through_int4(module.weight.T.numpy()).T))
        expected = model(torch.tensor([rows()[0]]), use_cache=False).logits[0].numpy()
    wide = form("mistral")
    assert BlockInt4()(wide).modified
    path = saved(wide, tmp_path)
    assert single_row_error(path, expected, [20, *[1] * 20], 16) < TOLERANCE["fp32"]
    sizes = [p.with_name("decoder.onnx.data").stat().st_size for p in (path, graph("mistral"))]
    assert sizes[0] < sizes[1] / 2


def through_int4(weight: np.ndarray) -> np.ndarray:
    codes, scales = int4_blocks(np.ascontiguousarray(weight), INT4_BLOCK, np.dtype(np.float32))
    assert codes.dtype == ml_dtypes.int4
    blocks = codes.astype(np.float32).reshape(-1, INT4_BLOCK, weight.shape[1])
    assert blocks.min() == -8
    wide = (blocks * scales[:, None]).reshape(weight.shape)
    assert np.abs(wide - weight).max() <= np.abs(scales).max()
    return wide


# -- planted faults --------------------------------------------------------------------------------------


def nodes(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op_type]


def drop_mask(model: ir.Model) -> None:
    for node in nodes(model, "Attention"):
        node.replace_input_with(3, None)


def drop_window(model: ir.Model) -> None:
    for node in nodes(model, "Attention"):
        node.replace_input_with(3, nodes(model, "LessOrEqual")[0].outputs[0])


def widen_window(model: ir.Model) -> None:
    value = model.graph.initializers[f"window_{WINDOW}"]
    value.const_value = ir.tensor(np.array(WINDOW + 1, np.int64), name=value.name)


def mask_self(model: ir.Model) -> None:
    """A token no longer sees itself."""
    (causal,) = nodes(model, "LessOrEqual")
    less = ir.node("Less", causal.inputs, name="planted")
    less.outputs[0].name = "planted"
    model.graph.insert_before(causal, [less])
    causal.outputs[0].replace_all_uses_with(less.outputs[0])


def shift_scatter(model: ir.Model) -> None:
    one = model.graph.initializers["one"]
    write = next(v for v in model.graph.inputs if v.name == "write_indices")
    shifted = ir.node("Add", [write, one], name="planted")
    shifted.outputs[0].name = "planted"
    model.graph.insert_before(nodes(model, "TensorScatter")[0], [shifted])
    for node in nodes(model, "TensorScatter"):
        node.replace_input_with(2, shifted.outputs[0])


def swap_axis(model: ir.Model) -> None:
    nodes(model, "TensorScatter")[0].attributes["axis"] = ir.AttrInt64("axis", 1)


def swap_keys_and_values(model: ir.Model) -> None:
    node = nodes(model, "Attention")[1]
    key, value = node.inputs[1:3]
    node.replace_input_with(1, value)
    node.replace_input_with(2, key)


def query_not_scaled(model: ir.Model) -> None:
    for node in nodes(model, "Attention"):
        product = node.inputs[0].producer()  # type: ignore[union-attr]
        assert product is not None and product.op_type == "Mul"
        node.replace_input_with(0, product.inputs[0])


def scaled_twice(model: ir.Model) -> None:
    for node in nodes(model, "Attention"):
        node.attributes.pop("scale")


@pytest.mark.parametrize(
    "fault",
    [drop_mask, drop_window, widen_window, mask_self, shift_scatter, swap_axis, swap_keys_and_values, query_not_scaled,
     scaled_twice],
)  # fmt: skip
def test_a_planted_fault_shows(fault: Callable[[ir.Model], None], form: Form, logits: Logits, tmp_path: Path) -> None:
    model = form("mistral-window")
    fault(model)
    path = saved(model, tmp_path)
    try:
        error = single_row_error(path, logits("mistral-window")[0], [30, *[1] * 16], 16)
    except Exception:  # ONNX Runtime's own
        return  # an axis that does not fit stops the engine
    assert error > FAULT


# -- the form --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_graph_takes_and_gives(architecture: str, graph: Callable[..., Path]) -> None:
    model = ir.load(graph(architecture, "last", "fp16"))
    caches = [f"past_key_values.{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    contract = contract_of(model)
    assert [i.name for i in contract.inputs] == ["input_ids", "write_indices", "num_tokens", *caches]
    assert [i.name for i in contract.outputs] == ["logits", *(c.replace("past_key_values", "present") for c in caches)]
    shapes = {i.shape[1:] for i in contract.inputs if i.name in caches}
    assert shapes == {(2, SLOTS, HEAD)}
    assert {i.dtype for i in contract.inputs if i.name in caches} == {"float16"}
    assert contract.outputs[0].shape[1:] == (1, VOCAB)
    assert {node.domain for node in model.graph} == {""}
    assert {n.op_type for n in model.graph} >= {"RMSNormalization", "RotaryEmbedding", "Attention", "TensorScatter"}
    assert model.opset_imports[""] in (23, 24)
    assert {v.dtype for v in model.graph.initializers.values()} <= {ir.DataType.FLOAT16, ir.DataType.INT64}
    tables = [v for n, v in model.graph.initializers.items() if "rotary" in n]
    assert {v.shape[0] for v in tables if v.shape is not None} == {SLOTS}


def test_one_mask_a_window_shared_by_its_layers(form: Form) -> None:
    for architecture, ops in (("llama", 1), ("mistral-window", 2)):
        model = form(architecture)
        masks = {node.inputs[3] for node in nodes(model, "Attention")}
        comparisons = len(nodes(model, "LessOrEqual")) + len(nodes(model, "Greater"))
        assert (len(masks), comparisons) == (1, ops)


def test_windows_come_from_the_configuration() -> None:
    config = SimpleNamespace(num_hidden_layers=3, sliding_window=8, layer_types=None)
    assert windows_of(config) == (8, 8, 8)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows_of(config) == (8, None, 8)
    config.use_sliding_window = False
    assert windows_of(config) == (None, None, None)
    config.sliding_window = None
    assert windows_of(config) == (None, None, None)


def test_a_longer_sequence_than_the_model_knows_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(NblError, match=r"--max-seq-len 32769 .* 32768 positions"):
        static.build(tiny("llama"), tmp_path / "out", "fp16", max_seq_len=32_769)
    with pytest.raises(NblError, match="int8"):
        static.build(tiny("llama"), tmp_path / "out", "int8", max_seq_len=8)
    assert not (tmp_path / "out").exists()


def test_build_leaves_graph_data_and_configuration(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    static.build(tiny("llama"), tmp_path / "out", "bf16", max_seq_len=8)
    found = {p.name for p in (tmp_path / "out").iterdir()}
    assert found == {"decoder.onnx", "decoder.onnx.data", "config.json", "generation_config.json"}
    with pytest.raises(NblError, match="bf16"):
        open_decoder(tmp_path / "out" / "decoder.onnx")
    (tmp_path / "out" / "decoder.onnx").write_bytes(b"nothing")
    with pytest.raises(CorruptError, match=r"decoder\.onnx"):
        open_decoder(tmp_path / "out" / "decoder.onnx")


def contrib(model: ir.Model) -> None:
    nodes(model, "Sigmoid")[0].domain = "com.microsoft"


def causal(model: ir.Model) -> None:
    nodes(model, "Attention")[0].attributes["is_causal"] = ir.AttrInt64("is_causal", 1)


def foreign_present(model: ir.Model) -> None:
    model.graph.outputs[1].name, model.graph.outputs[2].name = "present.0.value", "present.0.key"


def unread(model: ir.Model) -> None:
    model.graph.inputs.append(ir.Value(name="spare", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64)))


def cap(model: ir.Model) -> None:
    nodes(model, "Attention")[0].attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def keys_scaled(model: ir.Model) -> None:
    for node in nodes(model, "Attention"):
        node.attributes["scale"] = ir.AttrFloat32("scale", 0.125)


@pytest.mark.parametrize(
    ("misform", "reason"),
    [
        (scaled_twice, "scales its keys"), (keys_scaled, "scales its keys"),
        (contrib, "not a standard operator"), (causal, "not an Attention of"), (drop_mask, "not an Attention of"),
        (foreign_present, "scattered in"), (unread, "no node reads its input spare"), (cap, "soft-caps"),
    ],
)  # fmt: skip
def test_the_law_refuses(misform: Callable[[ir.Model], None], reason: str, form: Form) -> None:
    model = form("llama")
    assert not CheckForm()(model).modified
    misform(model)
    with pytest.raises(Exception, match=reason) as caught:
        CheckForm()(model)
    assert any(isinstance(e, RefusalError) for e in (caught.value, caught.value.__cause__))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int4"])
def test_only_the_query_is_scaled(precision: str, form: Form) -> None:
    """No layer multiplies its cache."""
    model = form("llama")
    static.finish(model, precision)
    assert [factor_of(node) for node in nodes(model, "Attention")] == [pytest.approx(HEAD**-0.5, rel=2**-8)] * LAYERS
    caches = [v for v in [*model.graph.inputs, *model.graph.outputs] if "key" in str(v.name) or "value" in str(v.name)]
    assert len(caches) == 4 * LAYERS
    for cache in caches:
        assert {use.node.op_type for use in cache.uses()} <= {"TensorScatter", "Attention"}, cache.name


def factor_of(attention: ir.Node) -> float:
    """The constant that multiplies an attention's query; its own scale is 1."""
    assert attention.attributes.get_float("scale", 0.0) == 1.0
    product = attention.inputs[0].producer()  # type: ignore[union-attr]
    assert product is not None and product.op_type == "Mul"
    factor = product.inputs[1]
    assert factor is not None and factor.const_value is not None
    return float(factor.const_value.numpy())


@pytest.mark.parametrize(("stated", "factor"), [(None, 1 / 8), (0.4, 0.4), (1.0, None)])
def test_the_stated_scale_is_taken_and_one_needs_no_product(stated: float | None, factor: float | None) -> None:
    query, key, value = (
        ir.Value(name=n, shape=ir.Shape([1, 4, t, HEAD]), type=ir.TensorType(ir.DataType.FLOAT))
        for n, t in (("q", 1), ("k", 8), ("v", 8))
    )
    attributes = [] if stated is None else [ir.AttrFloat32("scale", stated)]
    node = ir.Node("", "Attention", [query, key, value], attributes, name="attention")
    graph = ir.Graph([query, key, value], node.outputs, nodes=[node], opset_imports={"": 24}, name="one")
    model = ir.Model(graph, ir_version=11)
    assert ScaledQueries()(model).modified is (factor is not None)
    assert factor is None or factor_of(node) == pytest.approx(factor)
    assert not ScaledQueries()(model).modified


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_scales_and_blocks_are_those_that_tensorrt_takes(precision: str, form: Form) -> None:
    """Its parser refuses a scale that is not positive, and its documentation names blocks of 64 and 128."""
    model = form("llama")
    static.finish(model, precision)
    BlockInt4()(model)
    assert CheckForm()(model) is not None
    node = nodes(model, "DequantizeLinear")[0]
    scale = node.inputs[1]
    assert scale is not None and scale.const_value is not None
    planted = scale.const_value.numpy().copy()
    planted[0, 0] *= -1
    scale.const_value = ir.tensor(planted, name=scale.name)
    with pytest.raises(Exception, match="a scale that is not positive"):
        CheckForm()(model)
    small = form("llama")
    BlockInt4(32)(small)
    with pytest.raises(Exception, match="blocks of 32"):
        CheckForm()(small)


# -- the float32 copy that a CPU verifies ------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4"])
def test_a_float32_copy_has_the_same_nodes_and_numbers(precision: str, form: Form, tmp_path: Path) -> None:
    """Of the graph with all logits and of the pruned one, which is written anew and lies beside it."""
    model = form("mistral-window")
    static.finish(model, precision)
    static.save_graph(model, tmp_path / "shipped")
    keep_last_token(tmp_path / "shipped")
    static.write_float32(tmp_path / "shipped", tmp_path / "copy")
    assert difference(tmp_path / "copy") == ""
    for shipped, copy in (("decoder.onnx", GRAPH_FILE), (ALL_LOGITS_FILE, ALL_LOGITS_FILE)):
        one, other = ir.load(tmp_path / "shipped" / shipped), ir.load(tmp_path / "copy" / copy)
        assert [(n.op_type, n.name) for n in one.graph] == [(n.op_type, n.name) for n in other.graph]
        for name, value in other.graph.initializers.items():
            assert value.const_value is not None and value.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
            stored = one.graph.initializers[name].const_value
            assert stored is not None
            np.testing.assert_array_equal(
                value.const_value.numpy().astype(np.float32), stored.numpy().astype(np.float32)
            )
    decoder = open_decoder(tmp_path / "copy" / GRAPH_FILE)
    decoder.begin(1)
    assert decoder.step(np.array([[5, 6, 7]])).shape == (1, 1, VOCAB)


# -- numbers beyond the range of fp16 ------------------------------------------------------------------------


def enlarge(model: ir.Model, value: float) -> str:
    """Give one weight a large value; returns its name."""
    weight = next(
        v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape or ()) == 2
    )
    assert weight.const_value is not None and weight.name is not None
    changed = weight.const_value.numpy().copy()
    changed[0, 0] = value
    weight.const_value = ir.tensor(changed, name=weight.name)
    return weight.name


@pytest.mark.parametrize("value", [70_000.0, -1e20])
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_weight_that_fp16_cannot_hold_is_refused(precision: str, value: float, form: Form, tmp_path: Path) -> None:
    model = form("mistral")
    name = enlarge(model, value)
    static.finish(model, precision)
    with pytest.raises(NblError, match=rf"{name} has a value of .* float16 cannot hold; use --precision bf16"):
        static.save_graph(model, tmp_path)


@pytest.mark.parametrize(("precision", "value"), [("fp16", 65_504.0), ("bf16", 1e20), ("fp16", np.inf)])
def test_a_weight_that_is_held_or_was_infinite_before_is_kept(
    precision: str, value: float, form: Form, tmp_path: Path
) -> None:
    model = form("mistral")
    name = enlarge(model, value)
    static.finish(model, precision)
    static.save_graph(model, tmp_path)
    kept = ir.load(tmp_path / "decoder.onnx").graph.initializers[name].const_value
    assert kept is not None
    assert float(kept.numpy()[0, 0]) == pytest.approx(value, rel=2**-8)


# -- with the rewrite ------------------------------------------------------------------------------------


def rewritten(model: ir.Model, replaced: tuple[int, ...]) -> dict[int, Linear]:
    maps = maps_of(replaced)
    rewrite_model(model, maps)
    RenumberCaches()(model)
    CheckForm()(model)
    return maps


@pytest.mark.parametrize("replaced", SUBSETS, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_every_subset_keeps_parity(
    architecture: str, replaced: tuple[int, ...], form: Form, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    model = form(architecture)
    maps = rewritten(model, replaced)
    kept = tuple(i for i in range(LAYERS) if i not in replaced)
    decoder = open_decoder(saved(model, tmp_path), chunk=16)
    assert decoder.contract.cache_layers == tuple(range(len(kept)))
    expected = torch_logits(tiny(architecture), maps)
    decoder.begin(2)
    ids, valid = np.array([r[:30] for r in rows()]), np.ones((2, 30), int)
    valid[1, 11:] = 0
    got = decoder.step(ids, valid)
    assert max(worst(got[0], expected[0][:30]), worst(got[1, :11], expected[1][:11])) < TOLERANCE["fp32"]
    for k in range(8):
        got = decoder.step(np.array([[rows()[0][30 + k]], [rows()[1][11 + k]]]))[:, 0]
        assert worst(got, np.stack([expected[0][30 + k], expected[1][11 + k]])) < TOLERANCE["fp32"]
    predicted = SPEC.cache_bytes_per_token(len(kept), ITEMSIZE["float32"])
    assert decoder.contract.cache_bytes_per_token(HEAD) == predicted
    assert decoder.cache_bytes == predicted * 2 * SLOTS


def test_a_numbered_graph_stays(form: Form) -> None:
    model = form("llama")
    rewritten(model, (0,))
    assert not RenumberCaches()(model).modified


def test_renumbering_refuses_what_it_cannot_close(form: Form) -> None:
    model = form("llama")
    rewrite_model(model, maps_of([0]))
    nodes(model, "Sigmoid")[0].outputs[0].name = "past_key_values.0.key"
    with pytest.raises(Exception, match=r"past_key_values\.0\.key is needed for a cache and taken"):
        RenumberCaches()(model)
    half = form("llama")
    half.graph.outputs.pop()
    with pytest.raises(Exception, match="one key and one value cache"):
        RenumberCaches()(half)


def test_int4_reaches_the_end_of_its_codes() -> None:
    """Each block has its largest value at 7 or its smallest at -8."""
    weight = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    codes, scales = int4_blocks(weight, 32, np.dtype(np.float16))
    assert (codes.shape, scales.shape, scales.dtype) == ((64, 3), (2, 3), np.float16)
    blocks = codes.astype(int).reshape(2, 32, 3)
    assert np.all((blocks.max(1) == 7) | (blocks.min(1) == -8)) and blocks.min() == -8 and blocks.max() == 7
    assert np.all(scales > 0)
    assert np.all(int4_blocks(np.zeros((32, 1), np.float32), 32, np.dtype(np.float16))[1] == 1)
