"""Turns an IR and a plan into the NBL IR: the passes of `rewrite`, by the same names, on an OpenVINO model.

`bypass_attention` ─ `drop_states` ─ `compress` (maps alone) ─ save ─ `prune_tail`

A pass refuses what it does not understand, with layer and reason.

Weight compression of an IR: 16-bit floats by OpenVINO, int8 and int4 by nncf (int4 with an int8 head and embedding).

nncf compresses matrices that are floats. So a compressed IR that has got float maps is compressed again, and only the
maps change: they get the codes of their neighbours.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError, RefusalError
from nbl_export.files import scratch_in
from nbl_export.graph.ir.files import group_of, precision_of, read_ir, save_ir, share_constants, stored_matrix
from nbl_export.graph.ir.signals import kept_signal_stack
from nbl_export.graph.ir.tail import prune_tail
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE, IR_WEIGHTS
from nbl_export.methods import method_of
from nbl_export.methods.base import Mixer

__all__ = ["compress", "group_size", "keep_last_token_ir", "rewrite_ir"]

_GRAPHS = (IR_FILE, ALL_LOGITS_IR, IR_WEIGHTS)


def rewrite_ir(source: Path, out: Path, maps: Mapping[int, Mixer], tap: str = "residual") -> None:
    """Write the NBL version of an IR directory to `out`, which must not exist.

    Kept constants stay byte for byte, also those in codes. No maps copy the directory. A source with last-token
    logits has the graph with all logits beside it; so has the output.

    Raises:
        RefusalError: the IR is not understood, or lacks one of the layers.
    """
    last_only = (source / ALL_LOGITS_IR).is_file()
    out.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and (file.name not in _GRAPHS or not maps):
            shutil.copyfile(file, out / file.name)
    if not maps:
        return
    model = read_ir(source, ALL_LOGITS_IR if last_only else IR_FILE)
    precision = precision_of(model)
    group = group_of(model)
    method_of(maps).rewrite_ir(model, maps, tap)
    model = compress(model, precision, group=group, only_new=True)
    _refuse_float_maps(model, precision)
    save_ir(model, out, precision, group)
    if last_only:
        keep_last_token_ir(out)


def _refuse_float_maps(model: Any, precision: str) -> None:
    """Refuse a model in codes whose maps are floats: they would read more memory than the attention they replace."""
    if precision == "fp32":
        return
    for node in model.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "MatMul" and name.startswith("/nbl/") and stored_matrix(node) is None:
            raise RefusalError(None, f"the product {name} was left in float32 by the compression to {precision}")


def keep_last_token_ir(directory: Path) -> None:
    """Rename the graph to openvino_all_logits.xml, and write the pruned graph in its place. Both read one file."""
    model = read_ir(directory)
    precision = precision_of(model)
    group = group_of(model)
    prune_tail(model)
    with scratch_in(directory) as pruned:
        save_ir(model, pruned, precision, group)
        every = share_constants(directory / IR_FILE, directory / IR_WEIGHTS, (pruned / IR_FILE, pruned / IR_WEIGHTS))
        (pruned / ALL_LOGITS_IR).write_text(every, encoding="utf-8")
        for name in _GRAPHS:
            os.replace(pruned / name, directory / name)


_GROUPS = (128, 64, 32)  # tried in this order


def group_size(width: int, others: tuple[int, ...] = ()) -> int:
    """The largest group of int4 codes that divides the widths of all matrices.

    Raises:
        NblError: no group divides them.
    """
    fitting = [size for size in _GROUPS if all(w % size == 0 for w in (width, *others))]
    if not fitting:
        raise NblError(
            f"int4 codes come in groups of {', '.join(map(str, _GROUPS))}, and none divides the widths "
            f"{[width, *others]} of this model's matrices; use --precision int8"
        )
    return fitting[0]


def compress(model: Any, precision: str, *, group: int = 0, only_new: bool = False) -> Any:
    """Compress the float32 matrices of a model for a precision. Vectors stay float32: norms, biases, rotary tables.

    Args:
        group: size of the groups of int4 codes along the inputs of a product.
        only_new: the model is compressed already, apart from maps, which all get the precision's own codes.

    Raises:
        MissingPackageError: nncf is not installed.
    """
    if precision == "fp16":
        _halve(model)
    if precision not in ("int8", "int4"):
        return model
    try:
        with _quiet():
            import nncf
    except ImportError as error:
        raise MissingPackageError("nncf", "openvino", "compressing weights") from error
    modes = nncf.CompressWeightsMode
    with _quiet(), kept_signal_stack():
        if precision == "int8":
            return nncf.compress_weights(model, mode=modes.INT8_ASYM)
        leave = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE)
        found = nncf.compress_weights(
            model,
            mode=modes.INT4_SYM,
            ratio=1.0,
            group_size=group,
            all_layers=only_new or None,
            advanced_parameters=leave,
        )
        return nncf.compress_weights(found, mode=modes.INT8_ASYM)  # what no group divides


def _halve(model: Any) -> None:
    """Turn the matrices into 16-bit floats, in place.

    OpenVINO's own pass also takes rotary frequencies, whose rounding shows at long sequences. They are put back.
    """
    from openvino import opset13 as ops
    from openvino._offline_transformations import compress_model_transformation

    kept = {n.get_friendly_name(): n for n in model.get_ops() if _is_float(n, "f32") and not _is_matrix(n)}
    values = {name: (node.get_data().copy(), list(node.get_output_shape(0))) for name, node in kept.items()}
    compress_model_transformation(model)
    for node in model.get_ops():
        name = node.get_friendly_name().removesuffix("_compressed")
        if _is_float(node, "f16") and name in values:
            data, shape = values[name]
            wide = ops.constant(data.reshape(shape), name=name)
            for convert in [reader.get_node() for reader in node.output(0).get_target_inputs()]:
                for reader in convert.output(0).get_target_inputs():
                    reader.replace_source_output(wide.output(0))


def _is_float(node: Any, kind: str) -> bool:
    return node.get_type_name() == "Constant" and node.get_output_element_type(0).to_string() == kind


def _is_matrix(node: Any) -> bool:
    return sum(dim > 1 for dim in node.get_output_shape(0)) > 1


@contextlib.contextmanager
def _quiet() -> Any:
    """nncf logs at INFO and draws progress bars and tables."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
