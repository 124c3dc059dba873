"""ONNX Runtime GenAI on an NVIDIA GPU: the same directories, made for the CUDA or the TensorRT-RTX provider.

    flag              GenAI's name    graph by the GenAI builder                        runs with
    cuda              cuda            fp16 GroupQueryAttention, MatMulNBits             onnxruntime-gpu
    nv-tensorrt-rtx   NvTensorRtRtx   norms from standard operators, int4 as blocks     + the provider's own package
                                      of DequantizeLinear, caches counted 0..K-1

What was found out about onnxruntime-genai 0.18 with onnxruntime 1.31, on machines without a GPU:

- The builder makes graphs for both providers without a GPU, and ONNX Runtime's CPU provider computes them at fp16,
  int8 and int4. So a directory is proven on any machine, and then run on another. There are no CPU kernels for bf16;
  at fp32 the builder's graph for CUDA is not valid ("Graph output (present.0.key) does not exist").
- For NvTensorRtRtx the builder's int4 stops at the shared embedding ("Gather only supports QOperator format"), unless
  only MatMul is quantised and the embedding is not shared.
- TensorRT's own provider cannot be asked for: GenAI hands names that it does not know to ONNX Runtime, which answers
  "Unknown provider name 'tensorrt'"; so it does for TensorRT and TensorrtExecutionProvider. GroupQueryAttention
  would not be taken by TensorRT's parser either.
- GenAI's code for NvTensorRtRtx profiles counts caches 0..num_hidden_layers-1, hence the dense ids.
- That provider is a library of its own (onnxruntime-ep-nv-tensorrt-rtx, with TensorRT-RTX inside), which is registered
  under NvTensorRTRTXExecutionProvider before a model is opened; it does not load without libcuda.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from nbl_export.engines import ort
from nbl_export.engines.base import Availability, Capabilities
from nbl_export.engines.gpu import Gpu, find_gpu
from nbl_export.engines.onnx_decoder import OnnxDecoder
from nbl_export.engines.providers import PROVIDERS, Provider
from nbl_export.errors import NblError, UsageError
from nbl_export.records import DecoderSpec

__all__ = ["GpuEngine", "provider_of"]


_REFUSED = {
    "tensorrt": "ONNX Runtime GenAI has no TensorRT provider (it knows cuda and NvTensorRtRtx); use --provider "
    "nv-tensorrt-rtx, or --engine trt for TensorRT itself"
}


class GpuEngine:
    """The engine "ort" with a provider: exports and proves anywhere, runs where GPU and packages are.

    Raises:
        UsageError: there is no such provider.
    """

    def __init__(self, flag: str) -> None:
        if flag not in PROVIDERS:
            known = ", ".join(("cpu", *PROVIDERS))
            raise UsageError(_REFUSED.get(flag, f"unknown provider {flag!r}; --provider is one of {known}"))
        self.provider = PROVIDERS[flag]
        self.CAPABILITIES: Capabilities = dataclasses.replace(
            ort.CAPABILITIES,
            title=f"ONNX Runtime, {self.provider.title} provider",
            precisions=self.provider.precisions,
            sources=("genai",),
            extra=self.provider.extra,
            half_caches=self.provider.precisions,
            cross=True,
            dense_caches=self.provider.dense_caches,
            provider=flag,
        )

    def probe(self) -> Availability:
        """Exporting and proving take the CPU provider, which is in every build of ONNX Runtime."""
        return ort.probe()

    def probe_run(self) -> Availability:
        """Answer whether directories for this provider run here. Never raises."""
        gpu = find_gpu()
        reason = self._missing_packages() or (gpu if isinstance(gpu, str) else self._unfit(gpu))
        if reason:
            return Availability(False, reason)
        try:
            _register(self.provider)
        except Exception as error:  # whatever a broken installation raises is the answer
            return Availability(False, " ".join(str(error).split())[:300])
        assert isinstance(gpu, Gpu)
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
        if self.provider.runs_on(gpu.compute):
            return ""
        known = ", ".join(self.provider.computes) or f"{self.provider.least_compute} and later"
        other = "; use --provider cuda" if self.provider.computes else ""
        return (
            f"the {self.provider.title} provider does not run on the {gpu.name}: its compute capability is "
            f"{gpu.compute}, the provider is for {known}{other}"
        )

    def default_threads(self) -> int:
        """The host only feeds the GPU."""
        return 1

    def open_runner(self, directory: Path, threads: int | None = None) -> ort.GenaiRunner:
        """A text runner on the provider of the directory."""
        _register(self.provider)
        options = {"nv_runtime_cache_path": str(_kernel_cache())} if self.provider.registered else {}
        return ort.GenaiRunner(directory, threads or 1, provider=(self.provider.genai, options))

    def open_checked(self, directory: Path, threads: int | None = None) -> ort.GenaiRunner:
        """The same directory on the CPU provider, for verification."""
        return ort.GenaiRunner(directory, threads, provider=ort.CPU)

    def open_graph(self, directory: Path, spec: DecoderSpec, file: str | None = None) -> OnnxDecoder:
        """The directory's graph on the CPU provider of plain ONNX Runtime, for verification."""
        return ort.open_graph(directory, spec, file)


def provider_of(directory: Path) -> str:
    """The flag of the provider that a GenAI directory asks for; "cpu" where it asks for none that we know."""
    try:
        settings = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))
        named = settings["model"]["decoder"]["session_options"]["provider_options"]
        asked = {name for entry in named for name in entry}
    except (OSError, ValueError, KeyError, TypeError):
        return "cpu"  # opening it says what is wrong
    return next((flag for flag, provider in PROVIDERS.items() if provider.genai in asked), "cpu")


_registered: set[str] = set()


def _register(provider: Provider) -> None:
    """Load a provider that is a library of its own; once in a process."""
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
    """Where TensorRT-RTX keeps kernels that it compiled for this GPU: the user's cache, made if need be."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = root / "nbl-export" / "nv-tensorrt-rtx"
    path.mkdir(parents=True, exist_ok=True)
    return path
