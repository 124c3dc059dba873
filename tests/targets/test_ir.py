"""IRs: files that are missing or cut, states, and attention blocks found by the dataflow."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import CorruptError, RefusalError
from nbl_export.graph.ir.anatomy import Dataflow, states_of
from nbl_export.graph.ir.files import difference, precision_of, read_ir, save_ir, stored_matrix
from nbl_export.graph.ir.signals import kept_signal_stack

from ..damage import truncate
from ..tiny import HEAD_DIM, LAYERS

pytestmark = pytest.mark.engine


@pytest.fixture
def directory(exported: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported("llama", "openvino", "fp16"), tmp_path / "ir"))


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (Path.unlink, "openvino_model.bin", "openvino_model.bin is missing"),
        (Path.unlink, "openvino_model.xml", "openvino_model.xml is missing"),
        (lambda path: truncate(path, 3000), "openvino_model.bin", r"is cut: it has [\d,]+ bytes and the graph reads"),
        (lambda path: path.write_text("<net>" + 'offset="1" ' * 100_000), "openvino_model.xml", "OpenVINO cannot read"),
        (lambda path: path.write_text("<html>"), "openvino_model.xml", "openvino_model.xml is not an OpenVINO graph"),
        (lambda path: truncate(path, 3000), "openvino_model.xml", "OpenVINO cannot read .*openvino_model.xml"),
    ],
)
def test_a_damaged_directory_is_told(directory: Path, damage: Callable[[Path], object], name: str, said: str) -> None:
    damage(directory / name)
    with pytest.raises(CorruptError, match=said):
        read_ir(directory)


def test_states_and_precision(directory: Path) -> None:
    model = read_ir(directory)
    assert precision_of(model) == "fp16"
    found = states_of(model)
    assert list(found) == list(range(LAYERS))
    assert {(s.heads, s.head_size) for pair in found.values() for s in pair} == {(2, HEAD_DIM)}
    assert [part in state.variable for state, part in zip(found[1], (".key", ".value"), strict=True)] == [True] * 2


def without_states() -> Any:
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([1, 4], np.float32, name="input_ids")
    return openvino.Model([ops.relu(x)], [x], "stateless")


def with_half_a_layer() -> Any:
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([1, 2, 1, 4], np.float32, name="input_ids")
    read = ops.read_value(x, "past_key_values.0.key")
    results = [ops.result(ops.relu(read))]
    return openvino.Model(results, [ops.assign(read, "past_key_values.0.key")], [x], "half")


@pytest.mark.parametrize(
    ("make", "said"),
    [(without_states, "has no states; export it"), (with_half_a_layer, "one key state and one value state")],
)
def test_what_is_no_decoder_with_states_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(RefusalError, match=said):
        states_of(make())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3", "olmo2"])
def test_the_block_is_found_by_the_dataflow(exported: Callable[..., Path], architecture: str) -> None:
    flow = Dataflow(read_ir(exported(architecture, "openvino", "fp32")))
    for layer in range(LAYERS):
        block = flow.block(layer)
        assert f"layers.{layer}.self_attn.o_proj" in block.last[0].get_friendly_name()
        assert (block.normed is None) == (architecture == "olmo2")
        if layer == 0 and architecture == "llama":
            assert block.residual.get_node().get_type_name() in ("Gather", "Convert")
    with pytest.raises(RefusalError, match=r"states for layers \[0, 1, 2\] only"):
        flow.block(LAYERS)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_codes_are_the_values_that_a_product_multiplies_by(exported: Callable[..., Path], precision: str) -> None:
    """OpenVINO itself computes the values, from a model that ends at the matrix."""
    import openvino
    from openvino import opset13 as ops

    model = read_ir(exported("llama", "openvino", precision))
    node = next(n for n in model.get_ordered_ops() if "layers.1.mlp.down_proj" in n.get_friendly_name()
                and n.get_type_name() == "MatMul")  # fmt: skip
    stored = stored_matrix(node)
    x = ops.parameter([1, 1], np.float32)
    ends = ops.add(ops.convert(node.input_value(1), "f32"), x)
    model = openvino.Model([ends], [x], "matrix")
    with kept_signal_stack():
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([np.zeros((1, 1), np.float32)])[0]
    assert stored is not None and np.abs(stored.values - found).max() < 1e-6


def test_a_difference_is_told(directory: Path, tmp_path: Path) -> None:
    from openvino import opset13 as ops

    one, same = read_ir(directory), read_ir(directory)
    assert difference(one, same) == ""
    rotary = [1, 1, HEAD_DIM // 2]
    node = next(n for n in same.get_ops() if n.get_type_name() == "Constant" and list(n.get_output_shape(0)) == rotary)
    changed = ops.constant(node.get_data() + 1)
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(changed.output(0))
    assert "constant" in difference(one, same)
    (tmp_path / "saved").mkdir()
    save_ir(one, tmp_path / "saved", "fp16")
    assert difference(read_ir(directory), read_ir(tmp_path / "saved")) == ""
