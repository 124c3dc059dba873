"""ONNX Runtime on the CPU as an engine: its capabilities, and a probe with a known answer."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np

from nbl_export.errors import one_line
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import GENAI_CONFIG, all_logits_file
from nbl_export.graph.session import open_session
from nbl_export.options.options import keeps_blocks
from nbl_export.records.capabilities import Capabilities
from nbl_export.targets.base import Availability, DecoderFacts, Engine, ExportSettings
from nbl_export.targets.export import mobius
from nbl_export.targets.export.finish import check_bounds, finish_directory
from nbl_export.targets.onnx import export_genai
from nbl_export.targets.onnx.facts import CUDA, provider_of, read_facts
from nbl_export.targets.onnx.genai import GenaiRunner, load_package

__all__ = ["CAPABILITIES", "ORT", "OrtEngine", "is_installed"]

CAPABILITIES = Capabilities(
    name="ort",
    title="ONNX Runtime",
    precisions=("int8", "fp32", "fp16", "int4"),
    sources={"genai": export_genai.PRECISIONS, "mobius": mobius.PRECISIONS},
    cache_bytes={"fp16": 2},
    mapped={"genai": export_genai.PRECISIONS},
    rounded=("int8", "int4"),
    every_expert=("mobius",),
    kinds=None,
    providers=(CUDA,),
    faster_on_cpu="openvino",
    balanced=("int8",),
)


class OrtEngine(Engine):
    """ONNX Runtime's CPU provider."""

    capabilities = CAPABILITIES

    def probe(self, *, run: bool = False) -> Availability:
        """Whether ONNX Runtime computes here, by a tiny product with a known result. Never raises."""
        try:
            clash = _clashing_packages()
            if clash:
                return Availability(
                    False, f"{clash}; they overwrite each other's files: uninstall both, then install one"
                )
            genai = load_package("onnxruntime_genai")
            onnxruntime = load_package("onnxruntime")
            answer = _known_answer()
            if answer != [17.0, 30.0]:
                return Availability(False, f"onnxruntime {onnxruntime.__version__} computes {answer}, not [17, 30]")
            return Availability(
                True, f"onnxruntime {onnxruntime.__version__}, onnxruntime-genai {genai.__version__}, CPU provider"
            )
        except Exception as error:  # a broken installation may raise anything
            return Availability(False, one_line(error))

    def owns(self, path: Path) -> bool:
        """Whether the directory is GenAI's, for this provider."""
        return (path / GENAI_CONFIG).is_file() and provider_of(path) == self.capabilities.provider

    def facts(self, path: Path) -> DecoderFacts:
        """Sizes from genai_config.json and the graph."""
        return read_facts(path)

    def export(self, checkpoint: Path, out: Path, settings: ExportSettings) -> None:
        """With the GenAI builder, or with mobius."""
        check_bounds(checkpoint)
        if settings.source == "mobius":
            mobius.build(checkpoint, out, settings.precision)
        else:
            export_genai.build(checkpoint, out, settings, self.capabilities.provider)
        finish_directory(checkpoint, out)
        if settings.precision in self.capabilities.balanced and not keeps_blocks(settings.builder_options):
            from nbl_export.targets.onnx.int8_rows import round_rows  # loads onnx_ir, which a run here does not need

            round_rows(out, settings.rows_BT)

    def open_runner(self, path: Path, threads: int | None = None) -> GenaiRunner:
        """A text runner on a deployable directory."""
        return GenaiRunner(path, threads)

    def open_graph(
        self,
        directory: Path,
        head_dim: int,
        file: str | None = None,
        threads: int | None = None,
        *,
        exact: bool = False,
    ) -> OnnxDecoder:
        """The directory's graph on plain ONNX Runtime's CPU provider."""
        return OnnxDecoder(
            directory, head_dim, threads, file=file or all_logits_file(directory), fp32_activations=exact
        )


ORT = OrtEngine()


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


# Opset 17 and IR 8: old enough for every ONNX Runtime that the extra admits.
_KNOWN = """<ir_version: 8, opset_import: ["": 17]>
known_answer (float[1, 2] x) => (float[1, 2] y) <float[2, 2] w = {1, 2, 3, 4}, float[2] b = {10, 20}> {
  xw = MatMul(x, w)
  y = Add(xw, b)
}"""


def _known_answer() -> list[float]:
    """Run [1, 2] @ [[1, 2], [3, 4]] + [10, 20] on the CPU provider; the correct answer is [17, 30]."""
    from onnx import parser

    session = open_session(parser.parse_model(_KNOWN).SerializeToString())
    (answer,) = session.run(None, {"x": np.array([[1.0, 2.0]], dtype=np.float32)})
    return [float(value) for value in answer[0]]
