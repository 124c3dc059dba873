"""Weight compression of an IR: 16-bit floats by OpenVINO, int8 and int4 by nncf (int4 with an int8 head and embedding).

nncf compresses matrices that are floats. So a compressed IR that has got float maps is compressed again, and only the
maps change: they get the codes of their neighbours.
"""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

from nbl_export.errors import MissingPackageError, NblError

__all__ = ["compress", "group_size"]

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
    with _quiet():
        if precision == "int8":
            return nncf.compress_weights(model, mode=modes.INT8_ASYM)
        leave = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE)
        found = nncf.compress_weights(
            model, mode=modes.INT4_SYM, ratio=1.0, group_size=group, all_layers=only_new or None,
            advanced_parameters=leave,
        )  # fmt: skip
        return nncf.compress_weights(found, mode=modes.INT8_ASYM)  # what no group divides, as a map of low rank


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
