"""How a session makes its execution contexts."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEFAULT", "Strategy"]


@dataclass(frozen=True)
class Strategy:
    """How a session runs an engine.

    Attributes:
        graphs: whether the decode step runs as a CUDA graph.
        kernels: when TensorRT-RTX compiles kernels for a shape: EAGER (before the step), LAZY (in the background) or
            NONE (never; kernels for all shapes run). TensorRT has compiled them in the plan.
    """

    graphs: bool = True
    kernels: str = "EAGER"


DEFAULT = Strategy()
