"""Experts of an architecture as data: configuration keys, and names of their weights in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["GRANITE", "MIXTRAL", "QWEN", "Experts"]


@dataclass(frozen=True)
class Experts:
    """Configuration keys of the sizes of a layer's experts, and names of their weights in a checkpoint.

    Attributes:
        width: of a routed expert.
        shared: width of the expert that every token takes.
        stored: end of a weight's name -> ends of the names of its parts in a checkpoint, one behind the other. A part
            of a name with {} has one matrix for each expert.
    """

    width: str = "intermediate_size"
    shared: str | None = None
    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


QWEN = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
}
MIXTRAL = {
    "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
    "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
    "mlp.router.weight": ("block_sparse_moe.gate.weight",),
}
GRANITE = {
    "block_sparse_moe.experts.gate_up_proj": ("block_sparse_moe.input_linear.weight",),
    "block_sparse_moe.experts.down_proj": ("block_sparse_moe.output_linear.weight",),
    "block_sparse_moe.router.weight": ("block_sparse_moe.router.layer.weight",),
}
