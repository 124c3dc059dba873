"""Finds, checks and writes a decoder graph that another tool has made.

    DIR/model.onnx (or onnx/model.onnx, or the only *.onnx; genai_config.json may name it)
    DIR/model.onnx.data, or whatever its tensors name, inside DIR

Weights stay in their files until they are copied, one tensor at a time. So the whole model is never in memory. Nor is
a file open between two reads: an array that is mapped keeps its file open, and a system may allow 1,024.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from nbl_export.errors import CorruptError, NblError, RefusalError
from nbl_export.files import read_json
from nbl_export.graph.fp32_activations import graphs_of
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE
from nbl_export.graph.trust import check_graph, parsed
from nbl_export.trust.contained import check_inside

__all__ = ["check_structure", "data_files", "find_graph", "load_graph", "read_graph", "save_graph", "skeleton"]


_INLINE_BYTES = 1 << 30  # below this, weights inside a graph file stay there; protobuf's limit is 2 GiB


def find_graph(path: Path) -> Path:
    """The graph that a path means: the path itself, or the graph in a directory.

    Raises:
        NblError: there is no graph, or more than one candidate.
        CorruptError: the graph is a link out of the directory.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise NblError(f"{path} does not exist; name an ONNX file or a directory that holds one")
    named = _named_by_genai(path / GENAI_CONFIG)
    if named is not None and (path / named).is_file():
        return check_inside(path / named, path)
    found = [file for place in (path, path / "onnx") for file in sorted(place.glob("*.onnx"))]
    first = [file for file in found if file.name == GRAPH_FILE]
    if len(first) == 1 or len(found) == 1:
        return check_inside((first or found)[0], path)
    if not found:
        raise NblError(f"{path} holds no *.onnx; name an ONNX file or a directory that holds one")
    names = ", ".join(str(file.relative_to(path)) for file in found[:6])
    raise NblError(f"{path} holds several graphs ({names}); name the one that is meant")


def _named_by_genai(path: Path) -> str | None:
    try:
        named = read_json(path)["model"]["decoder"]["filename"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return named if isinstance(named, str) and PurePosixPath(named).name == named else None


def load_graph(path: Path) -> ir.Model:
    """Read a graph; its external tensors stay in their files, which are checked.

    Raises:
        CorruptError: the file is no valid ONNX model, or its data is missing, cut short, or outside its directory.
    """
    proto = parsed(path)
    if not proto.graph.node:
        raise CorruptError(f"{path} is not an ONNX model: it has no nodes")
    check_graph(proto, path)
    problem = check_structure(skeleton(proto))
    if problem:
        raise CorruptError(f"{path} is not a valid ONNX model ({problem[:300]}); export it again")
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir's own types
        raise CorruptError(f"{path} is not an ONNX model that can be read ({error})") from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    for tensor in _external(model):
        _check_data(path, tensor)
    return _closed(model)


def read_graph(path: Path) -> ir.Model:
    """Read a graph that was checked or made here; its external tensors stay in their files."""
    return _closed(ir.load(path))


class _Closed(ir.ExternalTensor):
    """An external tensor that maps its file again for each read, so that the file closes with the array."""

    def numpy(self) -> np.ndarray:
        return self._mapped().numpy()

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return self._mapped().__array__(dtype)

    def tobytes(self) -> bytes:
        return self._mapped().tobytes()

    def _mapped(self) -> ir.ExternalTensor:
        mapped = _as(ir.ExternalTensor, self)
        if not self.valid():  # its file was overwritten, and a read is an error
            mapped.invalidate()
        return mapped


def _as(kind: type[ir.ExternalTensor], tensor: ir.ExternalTensor) -> ir.ExternalTensor:
    return kind(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=str(tensor.name),
        doc_string=tensor.doc_string,
        metadata_props=tensor.metadata_props,
        base_dir=tensor.base_dir,
    )


def _closed(model: ir.Model) -> ir.Model:
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _as(_Closed, value.const_value)
    return model


def data_files(path: Path, model: ir.Model) -> set[Path]:
    """Files that hold a graph's external tensors."""
    return {path.parent / str(tensor.location) for tensor in _external(model)}


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    values = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    return [tensor for tensor in values if isinstance(tensor, ir.ExternalTensor)]


def _check_data(path: Path, tensor: ir.ExternalTensor) -> None:
    """Check a file whose place `check_graph` has checked."""
    location = str(tensor.location)
    file = path.parent / location
    if file.is_symlink():
        raise CorruptError(f"{file} is a link; copy the model with its links followed (cp -rL) and use the copy")
    if file.stat().st_nlink > 1:  # onnx_ir refuses hard links, which may lead to any file
        raise CorruptError(f"{file} has a second name (a hard link) and is not read; use a copy (cp -r) of the model")
    try:
        end = (tensor.offset or 0) + max(tensor.length or 0, tensor.nbytes)
    except TypeError as error:  # a string type, or no type
        raise CorruptError(f"{path} keeps {tensor.name} in {location}, in a type that is no number") from error
    if min(tensor.offset or 0, *tensor.shape.numpy(), 0) < 0 or end > file.stat().st_size:
        raise CorruptError(f"{file} ends before the weights of {path.name} do ({tensor.name}); restore it")


def save_graph(model: ir.Model, out: Path) -> None:
    """Write a graph; weights that were external or exceed `_INLINE_BYTES` go to a data file, others into the graph."""
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    inline = sum(tensor.nbytes for tensor in tensors if tensor.dtype != ir.DataType.STRING)  # strings have no size
    beside = bool(_external(model)) or inline > _INLINE_BYTES
    try:
        ir.save(model, out, external_data=f"{out.name}.data" if beside else None)
    except (ValueError, RuntimeError) as error:  # onnx_ir raises RuntimeError
        raise RefusalError(None, f"it cannot be written ({str(error)[:300]})") from error


def check_structure(bare: Any) -> str:
    """Run the ONNX checker: order of nodes, types of attributes, lengths of tensors.

    Args:
        bare: a `skeleton`.

    Returns:
        The first problem; "" if there is none.
    """
    try:
        onnx.checker.check_model(bare)
    except Exception as error:  # checker and protobuf raise several types
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    return ""


def skeleton(proto: Any) -> Any:
    """Copy of a graph without its external data (declared as inputs), in a form that the checker accepts.

    The GenAI builder emits SimplifiedLayerNormalization in the default domain, where ONNX Runtime registers it. The
    ONNX checker does not know it there. The copy has it in the contrib domain, which the checker does not check.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    inside = []
    for tensor in bare.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            bare.graph.input.append(info)
        else:
            inside.append(tensor)
    del bare.graph.initializer[:]
    bare.graph.initializer.extend(inside)
    for node in (node for graph in graphs_of(bare.graph) for node in graph.node):
        if node.op_type == "SimplifiedLayerNormalization" and not node.domain:
            node.domain = "com.microsoft"
    return bare
