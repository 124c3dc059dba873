"""A graph in memory holds no file open, however many tensors of it are read; names in it take no memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.graph.external_graph import replaced_layers
from nbl_export.graph.files import load_graph, read_graph


def _opened() -> int:
    return len(os.listdir("/proc/self/fd"))


def _external(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    values = model.graph.initializers.items()
    return {name: v.const_value for name, v in values if isinstance(v.const_value, ir.ExternalTensor)}


@pytest.mark.parametrize("read", [read_graph, load_graph])
def test_tensors_that_were_read_hold_no_file_open(
    read: Callable[[Path], ir.Model], exported: Callable[..., Path], tmp_path: Path
) -> None:
    """A model of 32 layers in int4 has more tensors than the 1,024 files that a system may allow."""
    path = exported("llama", precision="int4") / "model.onnx"
    tensors, expected = _external(read(path)), _external(ir.load(path))
    assert len(tensors) > 20 and tensors.keys() == expected.keys()
    before = _opened()
    for tensor in tensors.values():
        assert tensor.tobytes() and tensor.numpy().shape == np.asarray(tensor).shape == tuple(tensor.shape)
    assert _opened() == before
    assert all((tensor.numpy() == expected[name].numpy()).all() for name, tensor in tensors.items())


def test_a_tensor_whose_file_was_overwritten_is_not_read(exported: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(exported("llama"), tmp_path / "copy")
    path = tmp_path / "copy" / "model.onnx"
    model = read_graph(path)
    tensor = next(iter(_external(model).values()))
    ir.save(model, path, external_data=f"{path.name}.data")
    with pytest.raises(ValueError, match="invalidated"):
        tensor.numpy()


def test_a_number_in_a_name_takes_no_memory() -> None:
    names = ("nbl.layers.2.weight", "nbl.layers.0-9999999.table", f"nbl.layers.{'9' * 5000}.weight", "other")
    values = [ir.Value(name=name, const_value=ir.tensor([1.0], name=name)) for name in names]
    assert replaced_layers(ir.Graph([], [], nodes=[], initializers=values)) == [2]
