"""OpenVINO on the CPU as an engine: its capabilities, and a probe with a known answer."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

from nbl_export.errors import NblError
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.proposers import OPENVINO_PROPOSERS
from nbl_export.targets.base import (
    Availability,
    Capabilities,
    Draft,
    Room,
)
from nbl_export.targets.onnx.genai import default_threads
from nbl_export.targets.openvino.decoder import IrDecoder
from nbl_export.targets.openvino.lossless import OpenVinoLosslessRunner
from nbl_export.targets.openvino.runner import OpenVinoRunner
from nbl_export.targets.openvino.session import Session, load_openvino

__all__ = ["CAPABILITIES", "OPENVINO", "OpenVinoEngine"]

CAPABILITIES = Capabilities(
    name="openvino",
    title="OpenVINO",
    precisions=("fp16", "fp32", "int8", "int4"),
    sources=("openvino",),
    extra="openvino",
    cache_bytes={"fp16": 2, "int8": 1, "int4": 1},
    graphs="ir",
    proposers=OPENVINO_PROPOSERS,
)
_OLDEST = (2026, 0)  # of openvino: the API and the CPU plugin's caches are as `session` describes them


class OpenVinoEngine:
    """OpenVINO's CPU plugin."""

    capabilities = CAPABILITIES
    compiler = None

    def probe(self) -> Availability:
        """Whether OpenVINO computes here, by a tiny product with a known result; says what it computes in."""
        try:
            openvino = load_openvino()
            version = openvino.__version__.partition("-")[0]
            if tuple(map(int, version.split(".")[:2])) < _OLDEST:
                needed = ".".join(map(str, _OLDEST))
                return Availability(False, f"openvino {version} is too old; pip install 'openvino>={needed}'")
            core = openvino.Core()
            if "CPU" not in core.available_devices:
                return Availability(False, f"openvino {version} has no CPU plugin here; install it from PyPI")
            answer = _known_answer(openvino, core)
            if answer != [17.0, 30.0]:
                return Availability(False, f"openvino {version} computes {answer}, not [17, 30]")
            narrow = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            kind = "bfloat16" if narrow else "float32, because this processor has no bfloat16"
            return Availability(True, f"openvino {version}, CPU plugin, computes in {kind}")
        except NblError as error:
            return Availability(False, str(error))
        except Exception as error:  # a broken installation may raise anything
            return Availability(False, " ".join(str(error).split())[:300])

    def probe_run(self) -> Availability:
        """See `probe`: what can be exported here can be run here."""
        return self.probe()

    def default_threads(self) -> int:
        """Number of physical cores this process may use, at least 1."""
        return default_threads()

    def arithmetic(self, directory: Path) -> str:
        """The types that the plugin chooses for a directory; loads the model."""
        session = Session(directory)
        said = session.arithmetic.spoken()
        session.close()
        return said

    def open_runner(self, directory: Path, threads: int | None = None, room: Room | None = None) -> OpenVinoRunner:
        """A text runner on an IR directory; `room` has no effect."""
        return OpenVinoRunner(directory, threads or default_threads())

    def open_checked(self, directory: Path, threads: int | None = None) -> OpenVinoRunner:
        """The same runner in float32."""
        return OpenVinoRunner(directory, threads or default_threads(), exact=True)

    def open_lossless(
        self, directory: Path, threads: int | None = None, draft: Draft | None = None
    ) -> OpenVinoLosslessRunner:
        """A runner with proposed tokens, on OpenVINO GenAI."""
        return OpenVinoLosslessRunner(directory, threads or default_threads(), draft)

    def open_graph(self, directory: Path, spec: DecoderSpec, file: str | None = None) -> IrDecoder:
        """The graph with all logits, unless `file` names another, in the arithmetic that ships."""
        return IrDecoder(directory, file or _most_logits(directory))


OPENVINO = OpenVinoEngine()


def _most_logits(directory: Path) -> str:
    return ALL_LOGITS_IR if (directory / ALL_LOGITS_IR).is_file() else IR_FILE


def _known_answer(openvino: ModuleType, core: object) -> list[float]:
    """Run [1, 2] @ [[1, 2], [3, 4]] + [10, 20] on the CPU; the correct answer is [17, 30]."""
    from openvino import opset13 as ops

    x = ops.parameter([1, 2], np.float32)
    product = ops.matmul(x, ops.constant(np.array([[1, 2], [3, 4]], np.float32)), False, False)
    y = ops.add(product, ops.constant(np.array([[10, 20]], np.float32)))
    compiled = core.compile_model(openvino.Model([y], [x], "known_answer"), "CPU")  # type: ignore[attr-defined]
    return [float(value) for value in compiled([np.array([[1.0, 2.0]], np.float32)])[0][0]]
