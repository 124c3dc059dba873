"""ONNX Runtime on the CPU as an engine: its capabilities, and a probe with a known answer.

A deployed graph on plain ONNX Runtime with its profiler on, fed as ONNX Runtime GenAI feeds it.

    prompt ─► run ┐ past and present of a layer are one buffer (`past_present_share_buffer` of genai_config.json), so a
    token  ─► run ┘ step writes its own keys and values only; otherwise ONNX Runtime copies every cache in a step

ONNX Runtime writes a trace (chrome://tracing) of every node of every run; `run.profile` reads it.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, NblError, one_line
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE, all_logits_file
from nbl_export.graph.session import import_onnxruntime, open_session
from nbl_export.records.capabilities import Capabilities
from nbl_export.targets.base import Availability, DecoderFacts, ExportSettings, Target
from nbl_export.targets.export import mobius
from nbl_export.targets.export.finish import check_bounds, finish_directory
from nbl_export.targets.gpu import PROVIDERS
from nbl_export.targets.onnx import export_genai
from nbl_export.targets.onnx.facts import provider_of, read_facts
from nbl_export.targets.onnx.genai import GenaiRunner, load_package
from nbl_export.targets.runners import SequenceLimits

__all__ = ["CAPABILITIES", "ORT", "OrtEngine", "ProfiledDecoder", "is_installed", "probe"]

CAPABILITIES = Capabilities(
    name="ort",
    title="ONNX Runtime",
    precisions=("fp32", "fp16", "int8", "int4"),
    sources={"genai": export_genai.PRECISIONS, "mobius": mobius.PRECISIONS},
    extra="cpu",
    cache_bytes={"fp16": 2},
    mapped={"genai": export_genai.PRECISIONS},
    rounded=("int8", "int4"),
    profiled=True,
    every_expert=("mobius",),
    windows=True,
    hybrids=True,
    recurrences=True,
    providers=tuple(PROVIDERS),
    measures_limits=True,
)


class OrtEngine(Target):
    """ONNX Runtime's CPU provider."""

    capabilities = CAPABILITIES

    def probe(self) -> Availability:
        """See `probe`."""
        return probe()

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

    def open_runner(self, path: Path, threads: int | None = None, limits: SequenceLimits | None = None) -> GenaiRunner:
        """A text runner on a deployable directory; `limits` has no effect."""
        return GenaiRunner(path, threads)

    def open_profiled(self, directory: Path, threads: int, tokens: int, traces: Path) -> ProfiledDecoder:
        """On plain ONNX Runtime with its profiler."""
        return ProfiledDecoder(directory, threads, tokens, traces)

    def open_graph(
        self, directory: Path, head_dim: int, file: str | None = None, threads: int | None = None
    ) -> OnnxDecoder:
        """The directory's graph on plain ONNX Runtime's CPU provider."""
        return OnnxDecoder(directory, head_dim, threads, file=file or all_logits_file(directory))


ORT = OrtEngine()


def probe() -> Availability:
    """Whether ONNX Runtime computes here, by a tiny product with a known result. Never raises."""
    try:
        clash = _clashing_packages()
        if clash:
            return Availability(False, f"{clash}; they overwrite each other's files: uninstall both, then install one")
        genai, onnxruntime = load_package("onnxruntime_genai"), load_package("onnxruntime")
        answer = _known_answer()
        if answer != [17.0, 30.0]:
            return Availability(False, f"onnxruntime {onnxruntime.__version__} computes {answer}, not [17, 30]")
        return Availability(
            True, f"onnxruntime {onnxruntime.__version__}, onnxruntime-genai {genai.__version__}, CPU provider"
        )
    except Exception as error:  # a broken installation may raise anything
        return Availability(False, one_line(error))


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


def _known_answer() -> list[float]:
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
    session = open_session(model.SerializeToString())
    (answer,) = session.run(None, {"x": np.array([[1.0, 2.0]], dtype=np.float32)})
    return [float(value) for value in answer[0]]


_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_PAST, _PRESENT = "past_key_values.", "present."


class ProfiledDecoder:
    """One sequence on the directory's model.onnx; the trace holds every run.

    Args:
        directory: a deployable GenAI directory.
        threads: intra-op threads.
        room: tokens that the caches have room for, if past and present share a buffer.
        traces: an existing directory for the trace file.

    Raises:
        CorruptError: the graph or genai_config.json cannot be read.
        NblError: numpy does not have the element type of the caches.
    """

    def __init__(self, directory: Path, threads: int, limits: int, traces: Path) -> None:
        self._ort, self._directory = import_onnxruntime(), directory
        self._head_dim, self._shared = _read_config(directory / GENAI_CONFIG)
        self._session = open_session(directory / GRAPH_FILE, threads, traces=traces / directory.name)
        self._inputs = {a.name: a for a in self._session.get_inputs()}
        self._room, self._length = limits, 0
        self._caches: dict[str, Any] = {}
        self.begin()

    def begin(self) -> None:
        """Start with empty caches."""
        self._length = 0
        self._caches = {name: self._cache(a) for name, a in self._inputs.items() if name.startswith(_PAST)}

    def _cache(self, argument: Any) -> Any:
        if argument.type not in _DTYPES:
            raise NblError(f"{self._directory} cannot be profiled: its caches are {argument.type}; use fp32 or fp16")
        shape = (1, int(argument.shape[1]), self._room if self._shared else 0, self._head_dim)
        return self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _DTYPES[argument.type]))

    def run(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens as one chunk; returns the logits [V] of the last token."""
        binding = self._session.io_binding()
        end = self._length + len(ids)
        feeds = {
            "input_ids": np.asarray(ids, np.int64)[None],
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self._length, end, dtype=np.int64)[None],
        }
        for name, value in feeds.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, value)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
        for output in self._session.get_outputs():
            past = output.name.replace(_PRESENT, _PAST)
            if self._shared and past in self._caches:
                binding.bind_ortvalue_output(output.name, self._caches[past])
            else:
                binding.bind_output(output.name)
        self._session.run_with_iobinding(binding)
        self._length = end
        found = dict(zip((o.name for o in self._session.get_outputs()), binding.get_outputs(), strict=True))
        if not self._shared:
            self._caches = {name: found[name.replace(_PAST, _PRESENT)] for name in self._caches}
        return np.asarray(found["logits"].numpy()[0, -1], np.float32)

    def trace(self) -> list[dict[str, Any]]:
        """End profiling; returns the events of all runs."""
        events: list[dict[str, Any]] = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return events


def _read_config(path: Path) -> tuple[int, bool]:
    """Size of a head, and whether past and present are one buffer."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        shared = bool(config.get("search", {}).get("past_present_share_buffer", False))
        return int(config["model"]["decoder"]["head_size"]), shared
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); export the model again") from error
