"""GPU execution providers of ONNX Runtime GenAI, as data; `targets.onnx.gpu` has the observations behind them."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PROVIDERS", "Provider"]


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        cuda: CUDA major version of the packages.
    """

    title: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    cuda: int


# By GenAI's name, which is the value of --provider.
PROVIDERS = {"cuda": Provider("CUDA", ("fp16", "int8", "int4"), ("onnxruntime-gpu", "onnxruntime-genai-cuda"), 13)}
