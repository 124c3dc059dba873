"""Runs a directory with ONNX Runtime GenAI.

    directory (model.onnx, model.onnx.data, genai_config.json, tokenizer; all_logits.onnx is not read)
        └─ GenaiRunner ── begin ─ append ─ append ─ rewind ─ append ...        for bench
                      └── encode ─ stream | greedy                            for generate and verify

The code relies on these observations of onnxruntime_genai 0.18 on the CPU provider, and, for a GPU, on its sources:

- `append_tokens` runs the decoder synchronously; afterwards the logits of the last token are there.
  `generate_next_token` runs the decoder only if no unread logits are left. Right after an append it takes tens of
  microseconds and merely picks a token. So the token loop here is append and argmax.
- `rewind_to` works with `past_present_share_buffer`, down to length 0, also with sparse cache ids. Appending the same
  chunks again gives bit-equal logits; other chunk sizes differ by rounding (4e-5 at fp32, SmolLM2).
- `get_logits` before the first append, or after a rewind, returns stale memory instead of an error.
- On a GPU `append_tokens` may return before the step is computed: GenAI's casts to float32 run behind the step.
  `get_logits` copies to the host on GenAI's stream and waits for the stream (src/cuda/interface.cpp, CopyDeviceToCpu).
  So an append on a device other than the CPU reads the logits.
- A generator allocates and clears its whole cache on construction: max_length tokens are resident at once.
- Unset, `intra_op_num_threads` is half of the logical CPUs, 16 at most (src/models/model.cpp). This leaves half of a
  machine without hyper-threading idle, so this module always sets the number.
- An int4 graph (MatMulNBits, accuracy level 4) computes single tokens and chunks with different kernels. Logits of the
  same 40 tokens differ by up to 0.6 between one prefill and 25 + 15 single steps (SmolLM2). Compare equal chunks only.
- An fp32 embedding refuses token ids beyond the vocabulary; an int4 embedding accepts them silently.

- A generator is refused if its `max_length` is beyond `model.context_length`. `begin` sets it for every sequence.

A folder is checked before GenAI opens it; GenAI then opens nothing that was not checked. Threads and provider replace
those of genai_config.json.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nbl_export.errors import MissingPackageError, NblError, one_line
from nbl_export.graph.genai_config import read_genai_config
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.graph.rowwise import session_entries
from nbl_export.graph.trust import read_proto
from nbl_export.targets.base import default_threads
from nbl_export.targets.onnx.facts import GenaiSettings
from nbl_export.targets.tokenizer import TextGenerationMixin, TokenizerFiles
from nbl_export.trust.contained import check_folder

__all__ = ["SILENT", "GenaiRunner", "load_package", "open_model"]

_CPU_DEVICE = "CPU"  # og.Model.device_type


class GenaiRunner(TextGenerationMixin):
    """A loaded GenAI model directory: the TextRunner of ONNX Runtime. The directory is only read.

    Args:
        directory: model.onnx, its data, genai_config.json and, for text, the tokenizer.
        threads: intra-op threads; None uses `default_threads()`. `self.threads` is the number in use.
        on_cpu: use the CPU provider, and not the directory's provider.

    Raises:
        MissingPackageError: onnxruntime-genai is not installed.
        NblError: the directory is not a model that loads; the message has the path.
    """

    def __init__(self, directory: Path, threads: int | None = None, *, on_cpu: bool = False) -> None:
        self.directory = directory
        self.threads = threads or default_threads()
        self.settings = GenaiSettings.read(directory)
        self.context_length = self.settings.context_length
        self._og = load_package("onnxruntime_genai")
        self._model = open_model(self._og, directory, self.threads, on_cpu=on_cpu)
        self._waits = self._model.device_type != _CPU_DEVICE
        self._generator: Any = None
        self._capacity = self._length = 0

    def __exit__(self, *exc: object) -> None:
        """Free the cache and the model; the runner cannot be used afterwards."""
        self._generator = self._model = None

    def begin(self, max_tokens: int) -> None:
        """Forget the sequence; reserve cache for min(max_tokens, context length) tokens, resident at once."""
        self._generator = None  # free the old cache before the new one is allocated
        self._length = 0
        self._capacity = min(max_tokens, self.context_length)
        try:
            params = self._og.GeneratorParams(self._model)
            params.set_search_options(
                max_length=self._capacity, min_length=0, do_sample=False, num_beams=1, batch_size=1
            )
            self._generator = self._og.Generator(self._model, params)
        except Exception as error:
            raise NblError(
                f"cannot start a sequence of {max_tokens} tokens on {self.directory}: {one_line(error)}"
            ) from (error)

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids as one chunk; returns when the device has finished.

        Raises:
            NblError: the sequence would outgrow what `begin` reserved, or the engine fails.
        """
        self.check_room(self._length + len(ids), self._capacity)
        try:
            self._generator.append_tokens(np.asarray(ids, dtype=np.int32))
            if self._waits:
                self._generator.get_logits()
        except Exception as error:
            raise NblError(f"{self.directory} failed on a chunk of {len(ids)} tokens: {one_line(error)}") from error
        self._length += len(ids)

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens; costs microseconds, because the cache stays."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot rewind {self._length} tokens to {length}")
        try:
            self._generator.rewind_to(length)
        except Exception as error:
            raise NblError(
                f"{self.directory} cannot go back to its first {length} tokens: {one_line(error)}"
            ) from error
        self._length = length

    def last_logits(self) -> np.ndarray:
        return np.asarray(self._generator.get_logits()[0, -1], dtype=np.float32)

    @functools.cached_property
    def text(self) -> TokenizerFiles:
        """The tokenizer of the directory; genai_config.json says which ids end a text."""
        found = TokenizerFiles(self.directory)
        found.end_ids = self.settings.end_ids
        return found


def load_package(name: str) -> ModuleType:
    """Import a package of the extra `cpu`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(name.replace("_", "-"), "cpu", "running a decoder") from error


SILENT = 4  # ORT severity "fatal": only the exception raised here reports an error


def open_model(og: ModuleType, directory: Path, threads: int, *, on_cpu: bool) -> Any:
    """The og.Model of a directory.

    Args:
        og: the imported GenAI.
        on_cpu: use the CPU provider, and not the directory's provider.

    Raises:
        NblError: the directory is not a model that loads; the message has the path.
    """
    entries = session_entries(check_genai_folder(directory))
    try:
        config = og.Config(str(directory))  # checked by `check_genai_folder`
        session = {"intra_op_num_threads": threads, "log_severity_level": SILENT, **entries}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        if on_cpu:
            config.clear_providers()  # the CPU provider is the fallback and must not be named
        return og.Model(config)
    except Exception as error:
        raise NblError(f"{directory} does not load in ONNX Runtime GenAI: {one_line(error)}") from error


def check_genai_folder(directory: Path) -> Any:
    """Check links, settings and graph of a folder; returns the graph without its data.

    Raises:
        NblError: something is refused; the message names the file.
    """
    check_folder(directory)
    decoder = read_genai_config(directory).get("model", {}).get("decoder", {})
    return read_proto(directory / decoder.get("filename", GRAPH_FILE))
