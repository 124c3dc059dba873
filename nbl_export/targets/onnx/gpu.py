"""ONNX Runtime GenAI on an NVIDIA GPU: directories for the CUDA provider or the TensorRT-RTX provider.

    flag              GenAI's name    graph by the GenAI builder                        runs with
    cuda              cuda            fp16 GroupQueryAttention, MatMulNBits             onnxruntime-gpu
    nv-tensorrt-rtx   NvTensorRtRtx   norms from standard operators, int4 as blocks     + the provider's own package
                                      of DequantizeLinear, caches counted 0..K-1

Observations of onnxruntime-genai 0.18 with onnxruntime 1.31, on machines without a GPU:

- The builder makes graphs for both providers without a GPU, and ONNX Runtime's CPU provider computes them at fp16,
  int8 and int4. So any machine can verify a directory that another machine runs. There are no CPU kernels for bf16.
  At fp32 the builder's graph for CUDA is not valid ("Graph output (present.0.key) does not exist").
- For NvTensorRtRtx the builder's int4 fails at the shared embedding ("Gather only supports QOperator format"), unless
  only MatMul is quantised and the embedding is not shared.
- TensorRT's own provider is not available: GenAI passes unknown names to ONNX Runtime, which answers "Unknown provider
  name 'tensorrt'", also for TensorRT and TensorrtExecutionProvider. TensorRT's parser would not take
  GroupQueryAttention either.
- GenAI's code for NvTensorRtRtx profiles counts caches 0..num_hidden_layers-1, hence the dense ids.
- The NvTensorRtRtx provider is a separate library (onnxruntime-ep-nv-tensorrt-rtx, with TensorRT-RTX inside). It is
  registered under NvTensorRTRTXExecutionProvider before a model is opened. It does not load without libcuda.

Read in sources, not run:

- GenAI passes every visible GPU to NvTensorRtRtx (src/models/session_options.cpp), and each sets the option device_id,
  so the last one wins (onnxruntime, core/session/utils.cc). GenAI's own memory is on GPU 0 (src/cuda/interface.cpp).
  So one GPU only may be visible. GenAI's filter knows models of GPUs, which does not tell two of one model apart.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, UsageError
from nbl_export.records.capabilities import LINEAR_KINDS, Capabilities
from nbl_export.targets.base import Availability
from nbl_export.targets.gpu import Gpu, find_gpu, outdated, unpackaged
from nbl_export.targets.onnx import engine as ort
from nbl_export.targets.onnx.cuda import OLDER_DRIVER, check_cuda, load_cuda
from nbl_export.targets.onnx.genai import CPU, GenaiRunner
from nbl_export.targets.providers import PROVIDERS, Provider
from nbl_export.targets.runners import SequenceLimits

__all__ = ["GpuEngine"]

_REFUSED = {
    "tensorrt": "ONNX Runtime GenAI has no TensorRT provider (it knows cuda and NvTensorRtRtx); use --provider "
    "nv-tensorrt-rtx, or --engine trt for TensorRT itself"
}


_ROOM = SequenceLimits(4096)


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
            dense_caches=self.provider.dense_caches,
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
            _register(self.provider)
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
        extra = f"nbl-export[{self.provider.extra}]"
        return f"{', '.join(missing)} {verb} not installed: {first}pip install '{extra}'"

    def _unfit(self, gpu: Gpu) -> str:
        if not self.provider.runs_on(gpu.compute):
            known = ", ".join(self.provider.computes) or f"{self.provider.least_compute} and later"
            other = "; use --provider cuda" if self.provider.computes else ""
            return (
                f"the {self.provider.title} provider does not run on the {gpu.name}: its compute capability is "
                f"{gpu.compute}, the provider is for {known}{other}"
            )
        if old := outdated(gpu, self.provider.packages[0], self.provider.cuda, unpackaged(gpu) or OLDER_DRIVER):
            return old
        if gpu.count > 1 and self.provider.registered:
            return (
                f"{gpu.count} GPUs are visible, and GenAI would pass all of them to the {self.provider.title} "
                "provider: set CUDA_VISIBLE_DEVICES=0 to choose one"
            )
        return ""

    def default_threads(self) -> int:
        """One thread, because the host only feeds the GPU."""
        return 1

    def open_runner(self, path: Path, threads: int | None = None, limits: SequenceLimits | None = None) -> GenaiRunner:
        """A text runner on the directory's provider.

        Args:
            limits: the provider for TensorRT-RTX is sized for it, and for 4096 tokens if it is None; the runner opens
                the model again if it is asked for more.
        """
        load_cuda()
        if not self.provider.registered:
            return GenaiRunner(path, threads or 1, provider=(self.provider.genai, {}))
        _register(self.provider)
        choice = (self.provider.genai, {"nv_runtime_cache_path": str(_kernel_cache())})
        return GenaiRunner(path, threads or 1, choice, limits or _ROOM)

    def open_checked(self, directory: Path, threads: int | None = None) -> GenaiRunner:
        """The same directory on the CPU provider, for verification."""
        return GenaiRunner(directory, threads, provider=CPU)


_registered: set[str] = set()


def _register(provider: Provider) -> None:
    """Load a provider that is a separate library, once in a process."""
    if provider.registered is None or provider.flag in _registered:
        return
    name, package = provider.registered
    library: Any = importlib.import_module(package.replace("-", "_"))
    genai: Any = importlib.import_module("onnxruntime_genai")
    try:
        genai.register_execution_provider_library(name, library.get_library_path())
    except Exception as error:
        raise NblError(f"the {provider.title} provider does not load: {' '.join(str(error).split())[-300:]}") from error
    _registered.add(provider.flag)


def _kernel_cache() -> Path:
    """Folder of the user's cache for kernels that TensorRT-RTX compiles for this GPU; created if needed."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "nbl-export" / "nv-tensorrt-rtx"
    path.mkdir(parents=True, exist_ok=True)
    return path
