"""Sizes of the MLP of a decoder layer, or of its experts.

    dense     down(act(gate x) * up x)                   three products, or two without a gate
    experts   router x ─► `chosen` of `experts` MLPs     and an MLP that every token takes, if `shared`

Routing is taken as even: a token finds each expert equally often. A chunk of T tokens then reads
experts * (1 - (1 - chosen / experts)^T) of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbl_export.records.decoder import MOST_SIZE
from nbl_export.records.from_json import require

__all__ = ["MlpSpec"]


@dataclass(frozen=True)
class MlpSpec:
    """Sizes of the MLPs of a decoder's layers.

    Attributes:
        width: of the MLP, or of each routed expert.
        products: matrices of an MLP.
        experts: routed experts; 0 if the layer is dense.
        chosen: experts that a token takes.
        shared: width of the expert that every token takes, whose output has a gate.
    """

    width: int
    products: int = 3
    experts: int = 0
    chosen: int = 0
    shared: int = 0

    def __post_init__(self) -> None:
        sizes = (self.width, self.products, self.experts, self.chosen, self.shared)
        require(all(type(size) is int and size >= 0 for size in sizes), "sizes of an MLP are whole numbers")
        require(max(sizes) <= MOST_SIZE, f"sizes of an MLP are at most {MOST_SIZE:,}")
        require(self.width >= 1, "an MLP is at least 1 wide")
        require(self.experts == 0 or 1 <= self.chosen <= self.experts, "a token takes 1 to all of the experts")

    @property
    def active(self) -> int:
        """Width that a token takes."""
        return (self.chosen if self.experts else 1) * self.width + self.shared

    def multiply_adds(self, hidden: int, *, every: bool = False) -> int:
        """Of one token.

        Args:
            every: the implementation computes every expert for every token.
        """
        width = self.experts * self.width + self.shared if every and self.experts else self.active
        return hidden * (self._scores + self.products * width)

    def elements(self, hidden: int) -> int:
        """Elements of all matrices."""
        return hidden * (self._scores + self.products * (max(1, self.experts) * self.width + self.shared))

    def read(self, hidden: int, tokens: int, *, every: bool = False) -> float:
        """Elements of the matrices that a chunk of tokens reads."""
        if not self.experts or every:
            return self.elements(hidden)
        missed = (1 - self.chosen / self.experts) ** tokens
        return self.elements(hidden) - missed * self.experts * hidden * self.products * self.width

    @property
    def _scores(self) -> int:
        """Rows of the router, and of the gate of the shared expert."""
        return self.experts + (1 if self.shared else 0)
