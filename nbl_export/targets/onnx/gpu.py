"""ONNX Runtime GenAI on an NVIDIA GPU: directories for the CUDA provider, which onnxruntime-gpu runs.

The GenAI builder makes fp16 GroupQueryAttention, and MatMulNBits for int8 and int4.

Observations of onnxruntime-genai 0.18 with onnxruntime 1.31, on machines without a GPU:

- The builder makes graphs for the provider without a GPU, and ONNX Runtime's CPU provider computes them at fp16,
  int8 and int4. So any machine can verify a directory that another machine runs. There are no CPU kernels for bf16.
  At fp32 the builder's graph for CUDA is not valid ("Graph output (present.0.key) does not exist").
- TensorRT's own provider is not available: GenAI passes unknown names to ONNX Runtime, which answers "Unknown provider
  name 'tensorrt'", also for TensorRT and TensorrtExecutionProvider. TensorRT's parser would not take
  GroupQueryAttention either.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nbl_export.errors import UsageError
from nbl_export.records.capabilities import LINEAR_KINDS, Capabilities
from nbl_export.targets.base import Availability
from nbl_export.targets.gpu import LEAST_COMPUTE, Gpu, find_gpu, has_kernels, outdated, unpackaged
from nbl_export.targets.onnx import engine as ort
from nbl_export.targets.onnx.cuda import OLDER_DRIVER, check_cuda, load_cuda
from nbl_export.targets.onnx.genai import GenaiRunner
from nbl_export.targets.providers import PROVIDERS

__all__ = ["GpuEngine"]

_REFUSED = {
    "tensorrt": "ONNX Runtime GenAI has no TensorRT provider; use --engine trt for TensorRT itself",
    "nv-tensorrt-rtx": "the provider nv-tensorrt-rtx is gone; use --engine trt-rtx for TensorRT for RTX itself",
}


class GpuEngine(ort.OrtEngine):
    """The engine "ort" with a GPU provider: exports and verifies anywhere, runs on machines with GPU and packages.

    Raises:
        UsageError: there is no such provider.
    """

    def __init__(self, flag: str) -> None:
        if flag not in PROVIDERS:
            known = ", ".join(("cpu", *PROVIDERS))
            raise UsageError(_REFUSED.get(flag, f"unknown provider {flag!r}; --provider is one of {known}"))
        self.provider = PROVIDERS[flag]
        self.capabilities: Capabilities = dataclasses.replace(
            ort.CAPABILITIES,
            title=f"ONNX Runtime, {self.provider.title} provider",
            precisions=self.provider.precisions,
            sources={"genai": self.provider.precisions},
            cache_bytes=dict.fromkeys(self.provider.precisions, 2),
            cross=True,
            kinds=LINEAR_KINDS,
            provider=flag,
        )

    def probe_run(self) -> Availability:
        """Whether directories for this provider run here: its libraries load, and a stream is made. Never raises."""
        gpu = find_gpu()
        if isinstance(gpu, str):
            return Availability(False, self._missing_packages() or gpu)
        if reason := self._unfit(gpu) or self._missing_packages():
            return Availability(False, reason)
        try:
            check_cuda(gpu)
        except Exception as error:  # a broken installation may raise anything
            return Availability(False, " ".join(str(error).split())[:500])
        return Availability(True, f"{self.provider.title} provider on the {gpu.name} ({gpu.compute})")

    def _missing_packages(self) -> str:
        missing = [name for name in self.provider.packages if not ort.is_installed(name)]
        if not missing:
            return ""
        clash = [name for name in ("onnxruntime", "onnxruntime-genai") if ort.is_installed(name)]
        first = f"pip uninstall {' '.join(clash)}, then " if clash else ""
        verb = "is" if len(missing) == 1 else "are"
        return f"{', '.join(missing)} {verb} not installed: {first}pip install 'nbl-export[gpu]'"

    def _unfit(self, gpu: Gpu) -> str:
        if not has_kernels(gpu.compute):
            return (
                f"the {self.provider.title} provider does not run on the {gpu.name}: its compute capability is "
                f"{gpu.compute}, the provider is for {LEAST_COMPUTE} and later"
            )
        return outdated(gpu, self.provider.packages[0], self.provider.cuda, unpackaged(gpu) or OLDER_DRIVER)

    def default_threads(self) -> int:
        """One thread, because the host only feeds the GPU."""
        return 1

    def open_runner(self, path: Path, threads: int | None = None) -> GenaiRunner:
        """A text runner on the directory's provider."""
        load_cuda()
        return GenaiRunner(path, threads or 1)

    def open_checked(self, directory: Path, threads: int | None = None) -> GenaiRunner:
        """The same directory on the CPU provider, for verification."""
        return GenaiRunner(directory, threads, on_cpu=True)
