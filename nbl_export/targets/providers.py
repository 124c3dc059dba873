"""GPU execution providers of ONNX Runtime GenAI, as data; `targets.onnx.gpu` has the observations behind them."""

from __future__ import annotations

from dataclasses import dataclass

from nbl_export.targets.gpu import has_kernels

__all__ = ["PROVIDERS", "Provider"]


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime GenAI.

    Attributes:
        genai: its name in genai_config.json.
        computes: compute capabilities that have kernels; empty means `least_compute` and later. CUDA 13 has none below
            7.5. The TensorRT for RTX provider needs 8.0 (TensorRT-RTX-EP-ABI, "Runtime prerequisites").
        cuda: CUDA major version of the packages.
        registered: name and package of a provider that is a separate library.
        builder_options: options that the GenAI builder gets for the provider, by precision.
    """

    flag: str
    genai: str
    title: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...]
    least_compute: str = "7.5"
    computes: tuple[str, ...] = ()
    cuda: int = 13
    registered: tuple[str, str] | None = None
    dense_caches: bool = False
    builder_options: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def extra(self) -> str:
        """The optional extra that installs the provider."""
        return "gpu" if self.registered is None else self.flag

    def options_for(self, precision: str) -> tuple[str, ...]:
        """Extra options of the GenAI builder, as key=value."""
        return dict(self.builder_options).get(precision, ())

    def runs_on(self, compute: str) -> bool:
        """Whether the provider has kernels for a compute capability."""
        return has_kernels(compute, self.computes, self.least_compute)


_PACKAGES = ("onnxruntime-gpu", "onnxruntime-genai-cuda")
_RTX_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"
PROVIDERS = {
    "cuda": Provider("cuda", "cuda", "CUDA", ("fp16", "int8", "int4"), _PACKAGES),
    "nv-tensorrt-rtx": Provider(
        "nv-tensorrt-rtx",
        "NvTensorRtRtx",
        "TensorRT for RTX",
        ("fp16", "int4"),
        (*_PACKAGES, _RTX_PACKAGE),
        computes=("8.0", "8.6", "8.9", "12.0", "12.1"),
        registered=("NvTensorRTRTXExecutionProvider", _RTX_PACKAGE),
        dense_caches=True,
        builder_options=(("int4", ("int4_op_types_to_quantize=MatMul", "shared_embeddings=0")),),
    ),
}
