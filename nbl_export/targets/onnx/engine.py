"""ONNX Runtime on the CPU as an engine: its capabilities, and a probe with a known answer."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import ModuleType

import numpy as np

from nbl_export.graph.names import all_logits_file
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.proposers import GENAI_PROPOSERS
from nbl_export.targets.base import (
    Availability,
    Capabilities,
    Draft,
    Room,
)
from nbl_export.targets.onnx import genai
from nbl_export.targets.onnx.decoder import OnnxDecoder
from nbl_export.targets.onnx.genai import GenaiRunner, load_package
from nbl_export.targets.onnx.lossless import LosslessRunner
from nbl_export.targets.onnx.opening import SILENT
from nbl_export.targets.onnx.settings import short

__all__ = ["CAPABILITIES", "ORT", "OrtEngine", "is_installed", "probe"]

CAPABILITIES = Capabilities(
    name="ort",
    title="ONNX Runtime",
    precisions=("fp32", "fp16", "int8", "int4", "gguf"),
    sources=("genai", "mobius"),
    extra="cpu",
    cache_bytes={"fp16": 2},
    profiled=True,
    proposers=GENAI_PROPOSERS,
)


class OrtEngine:
    """ONNX Runtime's CPU provider."""

    capabilities = CAPABILITIES
    compiler = None

    def probe(self) -> Availability:
        """See `probe`."""
        return probe()

    def probe_run(self) -> Availability:
        """See `probe`: what can be exported here can be run here."""
        return probe()

    def default_threads(self) -> int:
        """Number of physical cores this process may use, at least 1."""
        return genai.default_threads()

    def arithmetic(self, directory: Path) -> str:
        """Nothing: the graph's types say it."""
        return ""

    def open_runner(self, directory: Path, threads: int | None = None, room: Room | None = None) -> GenaiRunner:
        """A text runner on a deployable directory; `room` has no effect."""
        return GenaiRunner(directory, threads)

    def open_checked(self, directory: Path, threads: int | None = None) -> GenaiRunner:
        """The same runner, for verification."""
        return GenaiRunner(directory, threads)

    def open_lossless(self, directory: Path, threads: int | None = None, draft: Draft | None = None) -> LosslessRunner:
        """A runner with proposed tokens."""
        return LosslessRunner(directory, threads, draft.settings if draft and draft.settings else None)

    def open_graph(self, directory: Path, spec: DecoderSpec, file: str | None = None) -> OnnxDecoder:
        """The directory's graph on plain ONNX Runtime: the graph with all logits, unless `file` names another."""
        return OnnxDecoder(directory, spec.head_dim, file=file or all_logits_file(directory))


ORT = OrtEngine()


def probe() -> Availability:
    """Whether ONNX Runtime computes here, by a tiny product with a known result. Never raises."""
    try:
        clash = _clashing_packages()
        if clash:
            return Availability(False, f"{clash}; they overwrite each other's files: uninstall both, then install one")
        genai, onnxruntime = load_package("onnxruntime_genai"), load_package("onnxruntime")
        answer = _known_answer(onnxruntime)
        if answer != [17.0, 30.0]:
            return Availability(False, f"onnxruntime {onnxruntime.__version__} computes {answer}, not [17, 30]")
        return Availability(
            True, f"onnxruntime {onnxruntime.__version__}, onnxruntime-genai {genai.__version__}, CPU provider"
        )
    except Exception as error:  # a broken installation may raise anything
        return Availability(False, short(error))


def _clashing_packages() -> str:
    """Names two builds of one package that are both installed; "" if there are none."""
    for pair in (("onnxruntime", "onnxruntime-gpu"), ("onnxruntime-genai", "onnxruntime-genai-cuda")):
        if all(is_installed(name) for name in pair):
            return f"{pair[0]} and {pair[1]} are both installed"
    return ""


def is_installed(distribution: str) -> bool:
    """Whether a distribution of that name is installed, usable or not."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _known_answer(onnxruntime: ModuleType) -> list[float]:
    """Run [1, 2] @ [[1, 2], [3, 4]] + [10, 20] on the CPU provider; the correct answer is [17, 30]."""
    from onnx import TensorProto, helper

    weights = [
        helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0]),
        helper.make_tensor("b", TensorProto.FLOAT, [2], [10.0, 20.0]),
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "known_answer", [x], [y], weights)
    # opset 17 and IR 8: old enough for every ONNX Runtime the extra admits
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SILENT
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": np.array([[1.0, 2.0]], dtype=np.float32)})
    return [float(value) for value in answer[0]]
