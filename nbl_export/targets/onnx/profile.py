"""A deployed graph on plain ONNX Runtime with its profiler on, fed as ONNX Runtime GenAI feeds it.

    prompt ─► run ┐ past and present of a layer are one buffer (`past_present_share_buffer` of genai_config.json), so a
    token  ─► run ┘ step writes its own keys and values only; otherwise ONNX Runtime copies every cache in a step

ONNX Runtime writes a trace (chrome://tracing) of every node of every run; `run.profile` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, NblError
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE
from nbl_export.graph.session import import_onnxruntime, open_session

__all__ = ["ProfiledDecoder"]

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
