"""What an ONNX file may make ONNX Runtime open: weights in files of its own folder, and no compiled code.

tensor.external_data location    a file of the folder, also inside subgraphs, functions and attributes; no address of
                                 memory, which ONNX Runtime keeps as a file name between asterisks
EPContext                        refused: a provider's compiled program, in the node or in a file that the node names
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from nbl_export.errors import CorruptError, MissingPackageError, NblError
from nbl_export.trust.contained import check_inside

__all__ = ["check_graph", "parsed", "read_proto"]

_MOST_BYTES = 2 << 30  # protobuf's own limit
_COMPILED = "EPContext"  # of com.microsoft; no graph of this tool or its decoder sources has one


def read_proto(path: Path) -> Any:
    """A graph as onnx reads it, without its data, and checked by `check_graph`.

    Raises:
        CorruptError: the file is missing or no ONNX model, or `check_graph` raises this error.
        NblError: a node brings compiled code.
    """
    if not path.is_file():
        raise CorruptError(f"{path} is missing; export the model again")
    check_inside(path, path.parent)
    proto = parsed(path)
    check_graph(proto, path)
    return proto


def parsed(path: Path) -> Any:
    """A graph as onnx reads it, without its data.

    Raises:
        CorruptError: the file is no ONNX model, or is larger than protobuf reads.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingPackageError("onnx", "cpu", "checking a graph") from error
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES >> 30} GiB")
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exception types
        said = " ".join(str(error).split())[:200]
        raise CorruptError(f"{path} is not an ONNX model that can be read ({said}); export the model again") from error


def check_graph(proto: Any, path: Path) -> None:
    """Check the external data and the nodes of a graph that lies at `path`.

    Raises:
        CorruptError: a tensor's data is missing, or lies outside the folder.
        NblError: a node brings compiled code.
    """
    places = set()
    for item in _walk(proto):
        if getattr(item, "op_type", None) == _COMPILED:
            raise NblError(
                f"{path} has a node {_COMPILED}, which is compiled code of an execution provider and not run; "
                "use the graph that it was compiled from"
            )
        places |= {entry.value for entry in getattr(item, "external_data", ()) if entry.key == "location"}
    for place in sorted(places):
        _check_place(path, place)


def _check_place(path: Path, place: str) -> None:
    file = path.parent / place
    if place.startswith("*"):  # onnxruntime, core/framework/tensorprotoutils.h: */_ORT_MEM_ADDR_/* and others
        raise CorruptError(f"{path} keeps weights at an address of memory ({place!r}); it is not read")
    if not place or PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts or "\\" in place:
        raise CorruptError(f"{path} keeps weights in {place!r}, outside its directory; it is not read")
    check_inside(file, path.parent)
    if not file.is_file():
        raise CorruptError(f"{file}, which holds weights of {path.name}, is missing; restore it")


def _walk(proto: Any) -> Iterator[Any]:
    """All nodes and tensors of a model, also in subgraphs, functions and training graphs."""
    graphs = [proto.graph, *(g for info in proto.training_info for g in (info.initialization, info.algorithm))]
    nodes = [node for function in proto.functions for node in function.node]
    attributes = [attribute for function in proto.functions for attribute in function.attribute_proto]
    while graphs or nodes or attributes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            yield from _dense(graph.sparse_initializer)
            nodes.extend(graph.node)
        elif nodes:
            node = nodes.pop()
            yield node
            attributes.extend(node.attribute)
        else:
            attribute = attributes.pop()
            yield from (attribute.t, *attribute.tensors)
            yield from _dense((attribute.sparse_tensor, *attribute.sparse_tensors))
            graphs.extend((*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs))


def _dense(tensors: Any) -> Iterator[Any]:
    for sparse in tensors:
        yield from (sparse.values, sparse.indices)
