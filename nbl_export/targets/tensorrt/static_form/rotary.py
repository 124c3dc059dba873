"""Trims rotary tables to the rows that a cache of S slots can reach.

    before   Gather(cos [max_positions, head/2], positions)      after   Gather(cos [S, head/2], positions)

A model of 131072 positions carries 2 x 33 MB of tables; a cache of 2048 slots needs 0.5 MB of them. Refuses a
cache with more slots than the model has positions.
"""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import need, shape_of, size
from nbl_export.targets.tensorrt.static_form.positions import POSITIONS

__all__ = ["TrimRotaryTables"]


class TrimRotaryTables(ir.passes.InPlacePass):
    """Cut the cos and sin tables to the slots of the cache; run after `DerivedPositions`."""

    def __init__(self, cache_length: int) -> None:
        super().__init__()
        self._slots = cache_length

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        tables = []
        for node in model.graph:
            if node.op_type != "Gather":
                continue
            table, index = (need(v, f"inputs of {node.name}") for v in node.inputs)
            if index.name == POSITIONS:
                tables.append(table)
        changed = [self._trim(table) for table in dict.fromkeys(tables)]
        return ir.passes.PassResult(model, any(changed))

    def _trim(self, table: ir.Value) -> bool:
        full = table.const_value
        if full is None:
            raise RefusalError(None, f"the rotary table {table.name} is not an initializer")
        rows = size(table, 0)
        if rows < self._slots:
            raise RefusalError(
                None, f"the model has {rows} positions, fewer than the {self._slots} cache slots asked for"
            )
        if rows == self._slots or any(use.node.op_type != "Gather" for use in table.uses()):
            return False
        table.const_value = ir.tensor(full.numpy()[: self._slots].copy(), dtype=full.dtype, name=table.name)
        table.shape = ir.Shape([self._slots, *shape_of(table)[1:]])
        return True
