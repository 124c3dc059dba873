"""OpenVINO on the CPU as an engine: its capabilities, and a probe with a known answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, NblError
from nbl_export.graph.ir.anatomy import context_length, states_of
from nbl_export.graph.ir.files import precision_of, read_ir
from nbl_export.graph.ir.session import IrDecoder, Session, load_openvino
from nbl_export.graph.ir.signals import kept_signal_stack
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE
from nbl_export.methods import method_of
from nbl_export.methods.base import Maps
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import GraphContract
from nbl_export.records.results import CheckResult
from nbl_export.targets.base import Availability, DecoderFacts, Engine, ExportSettings, default_threads
from nbl_export.targets.checks import ExpectedGraph, StoredWeights
from nbl_export.targets.export.finish import check_bounds
from nbl_export.targets.openvino import check
from nbl_export.targets.openvino.runner import OpenVinoRunner
from nbl_export.targets.runners import StepDecoder

__all__ = ["CAPABILITIES", "OPENVINO", "OpenVinoEngine"]

PRECISIONS = ("int8", "fp16", "fp32", "int4")
_ROUNDED = ("int8", "int4")  # nncf takes one matrix after the other
CAPABILITIES = Capabilities(
    name="openvino",
    title="OpenVINO",
    precisions=PRECISIONS,
    sources={"openvino": PRECISIONS},
    kinds=None,
    cache_bytes={"fp16": 2, "int8": 1, "int4": 1},
    narrow=True,
    every_expert=("openvino",),
    mapped={"openvino": _ROUNDED},
    rounded=_ROUNDED,
    refused_rotary=("longrope",),  # `trace`
)
_OLDEST = (2026, 0)  # of openvino: the API and the CPU plugin's caches are as `session` describes them


class OpenVinoEngine(Engine):
    """OpenVINO's CPU plugin."""

    capabilities = CAPABILITIES

    def probe(self, *, run: bool = False) -> Availability:
        """Whether OpenVINO computes here, by a tiny product with a known result; says what it computes in."""
        try:
            openvino = load_openvino()
            version = openvino.__version__.partition("-")[0]
            if tuple(map(int, version.split(".")[:2])) < _OLDEST:
                needed = ".".join(map(str, _OLDEST))
                return Availability(False, f"openvino {version} is too old; pip install 'openvino>={needed}'")
            core = openvino.Core()
            with kept_signal_stack():
                if "CPU" not in core.available_devices:
                    return Availability(False, f"openvino {version} has no CPU plugin here; install it from PyPI")
                answer = _known_answer(openvino, core)
                narrow = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            if answer != [17.0, 30.0]:
                return Availability(False, f"openvino {version} computes {answer}, not [17, 30]")
            kind = "bfloat16" if narrow else "float32, because this processor has no bfloat16"
            return Availability(True, f"openvino {version}, CPU plugin, computes in {kind}")
        except NblError as error:
            return Availability(False, str(error))
        except Exception as error:  # a broken installation may raise anything
            return Availability(False, " ".join(str(error).split())[:300])

    def owns(self, path: Path) -> bool:
        """Whether the directory holds an IR."""
        return (path / IR_FILE).is_file()

    def facts(self, path: Path) -> DecoderFacts:
        """Sizes from the IR and config.json."""
        model = read_ir(path)
        states = [state for pair in states_of(model).values() for state in pair]
        vocab = model.output("logits").get_partial_shape()[-1]
        if vocab.is_dynamic:
            raise CorruptError(f"the logits of {path} have no fixed size; export it again")
        itemsize = self.capabilities.cache_itemsize(precision_of(model))
        cache = itemsize * sum(state.heads * state.head_size for state in states)
        return DecoderFacts(vocab.get_length(), context_length(path), states[0].head_size, cache)

    def export(self, checkpoint: Path, out: Path, settings: ExportSettings) -> None:
        """With OpenVINO's own front end."""
        from nbl_export.targets.openvino.export import build

        check_bounds(checkpoint)
        build(checkpoint, out, settings.precision, settings.precision in _ROUNDED)

    def linearize(self, original: Path, out: Path, maps: Mapping[int, Any], tap: str = "residual") -> None:
        """Rewrite the IR."""
        from nbl_export.targets.openvino.rewrite import rewrite_ir

        rewrite_ir(original, out, maps, tap)

    def keep_last_token(self, directory: Path) -> None:
        """Prune the IR's tail."""
        from nbl_export.targets.openvino.rewrite import keep_last_token_ir

        keep_last_token_ir(directory)

    def check(
        self, directory: Path, contract: GraphContract, wanted: ExpectedGraph, original: Path | None
    ) -> list[CheckResult]:
        """States, maps, a pair of IRs as one, and constants of the IR."""
        return check.check(directory, contract, wanted, original, self.capabilities.cache_itemsize(wanted.precision))

    def read_maps(self, directory: Path) -> StoredWeights:
        """Of the IR."""
        return check.read_maps(directory)

    def arithmetic(self, path: Path) -> str:
        """The types that the plugin chooses for a directory; loads the model."""
        session = Session(path)
        said = session.arithmetic
        session.close()
        return said

    def open_graph(
        self,
        directory: Path,
        head_dim: int,
        file: str | None = None,
        threads: int | None = None,
        *,
        exact: bool = False,
    ) -> IrDecoder:
        """The graph in the arithmetic that ships, or in float32."""
        return IrDecoder(directory, file or _most_logits(directory), exact=exact, threads=threads)

    def open_reference(self, directory: Path, head_dim: int, mixers: Maps, tap: str, *, exact: bool) -> StepDecoder:
        """By the method, on the IR."""
        file = _most_logits(directory)
        decoder: StepDecoder = method_of(mixers).ir_reference(directory, file, mixers, tap, exact=exact)
        return decoder

    def pruned_file(self, directory: Path) -> str | None:
        """The IR that ships, if the IR with all logits stays beside it."""
        return IR_FILE if (directory / ALL_LOGITS_IR).is_file() else None

    def open_runner(self, path: Path, threads: int | None = None) -> OpenVinoRunner:
        """A text runner on an IR directory."""
        return OpenVinoRunner(path, threads or default_threads())


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
