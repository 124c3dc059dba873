"""Numbers beyond the range of fp16 are named, with the precision that holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import NblError
from nbl_export.targets.tensorrt import export as static
from nbl_export.targets.tensorrt.static.host import StaticRunner


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
def test_a_weight_that_fp16_cannot_hold_is_refused(
    precision: str, value: float, form: Callable[[str], ir.Model], tmp_path: Path
) -> None:
    model = form("mistral")
    name = enlarge(model, value)
    static.finish(model, precision)
    with pytest.raises(NblError, match=rf"{name} has a value of .* float16 cannot hold; use --precision bf16"):
        static.save_graph(model, tmp_path)


@pytest.mark.parametrize(("precision", "value"), [("fp16", 65_504.0), ("bf16", 1e20), ("fp16", np.inf)])
def test_a_weight_that_is_held_or_was_infinite_before_is_kept(
    precision: str, value: float, form: Callable[[str], ir.Model], tmp_path: Path
) -> None:
    model = form("mistral")
    name = enlarge(model, value)
    static.finish(model, precision)
    static.save_graph(model, tmp_path)
    kept = ir.load(tmp_path / "decoder.onnx").graph.initializers[name].const_value
    assert kept is not None
    assert float(kept.numpy()[0, 0]) == pytest.approx(value, rel=2**-8)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_text(wrong: float) -> None:
    logits = np.array([[[0.5, wrong, 2.0]]], np.float32)
    session: Any = SimpleNamespace(
        cache_length=8, chunk=4, widths=(4,), contract=SimpleNamespace(inputs=()), begin=lambda _batch: None,
        run=lambda *_: logits,
    )  # fmt: skip
    runner = StaticRunner(session, Path("engine"))
    with pytest.raises(NblError, match=r"engine gives logits that are not finite: .* --precision bf16"):
        runner.greedy([3], 2)
    logits[..., 1] = 1.0
    assert runner.greedy([3], 2) == [2, 2]
