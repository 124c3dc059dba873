"""Generates with proposed tokens: OpenVINO GenAI's speculative decoding, and plain decoding in the same pipeline.

    folder (openvino_model.xml with all logits, int4_draft/ or nbl_draft/) ─► LLMPipeline(draft_model=...) ─► generate
    folder without a draft, max_ngram_size in generation_config.json ──────► LLMPipeline(prompt_lookup=True)

Facts of OpenVINO GenAI 2026.4: both kinds need its paged back end, which computes the logits of the positions that it
reads, so the graph has all logits. A pipeline does not read the options of a prompt lookup from generation_config.json,
so this runner does.
"""

from __future__ import annotations

import importlib
import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.graph.names import GENERATION_CONFIG, IR_FILE, draft_folder
from nbl_export.targets.openvino.ir.anatomy import context_length
from nbl_export.targets.openvino.ir.files import precision_of, read_ir
from nbl_export.targets.openvino.signals import kept_signal_stack
from nbl_export.targets.runners import Draft, Generation
from nbl_export.targets.tokenizer import Text

__all__ = ["OpenVinoSpeculativeRunner"]

_LOOKUP, _COUNT = "max_ngram_size", "num_assistant_tokens"
_NAMES = ("int4", "nbl")


class OpenVinoSpeculativeRunner:
    """A runner on a folder of lossless decoding, or on any IR directory for plain decoding in the same pipeline.

    Args:
        draft: "ngram", or a draft in the folder; None for what the folder holds.

    Raises:
        MissingPackageError: openvino-genai is not installed. NblError: the folder does not load.
    """

    def __init__(self, directory: Path, threads: int, draft: Draft | None = None) -> None:
        self.directory, self.most_tokens = directory, context_length(directory)
        self._genai: Any = _load()
        self._text = Text(directory)
        self._options = {} if draft else _own_options(directory)
        own = draft.name if draft else _own_draft(directory, self._options)
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if precision_of(read_ir(directory, IR_FILE)) == "fp32":
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        more: dict[str, Any] = {"ATTENTION_BACKEND": "PA"}
        try:
            if own in _NAMES:
                place = str(directory / draft_folder(own))
                more["draft_model"] = self._genai.draft_model(place, "CPU", **settings)
            elif own == "ngram":
                more["prompt_lookup"] = True
            with kept_signal_stack():
                self._pipeline = self._genai.LLMPipeline(str(directory), "CPU", **settings, **more)
        except RuntimeError as error:
            raise NblError(f"{directory} does not load in OpenVINO GenAI: {_short(error)}") from error

    def __enter__(self) -> OpenVinoSpeculativeRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the pipeline; the runner cannot be used afterwards."""
        self._pipeline = None

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt, see `Text.encode`."""
        return self._text.encode(prompt, chat=chat)

    def generation(self, ids: Sequence[int], new_tokens: int, options: Mapping[str, int | bool]) -> Generation:
        """A timed greedy continuation, see `ProposingRunner`; the prefill contains the first token."""
        started = time.perf_counter_ns()
        found = self._generate(ids, self._config(new_tokens, options))
        total = time.perf_counter_ns() - started
        first = min(total, int(1e6 * found.perf_metrics.get_ttft().mean))
        tokens = tuple(map(int, found.tokens[0]))
        return Generation(tokens, first, total - first, *_counts(found.extended_perf_metrics, len(tokens)))

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Greedy continuation as text pieces, until the end of text, the limit or the end of the context."""
        return self._text.pieces(self._tokens(ids, max_new_tokens))

    def _tokens(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Token ids as the pipeline, on another thread, gives them."""
        said: queue.Queue[int | Exception | None] = queue.Queue()

        def give(tokens: Any) -> Any:
            for token in tokens if isinstance(tokens, list) else [tokens]:
                said.put(int(token))
            return self._genai.StreamingStatus.RUNNING

        def work() -> None:
            try:
                self._generate(ids, self._config(new_tokens, {}), _streamer(self._genai, give))
                said.put(None)
            except NblError as error:
                said.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        while (token := said.get()) is not None:
            if isinstance(token, Exception):
                raise token
            yield token
        worker.join()

    def _config(self, new_tokens: int, options: Mapping[str, int | bool]) -> Any:
        config = self._pipeline.get_generation_config()
        config.max_new_tokens, config.do_sample = new_tokens, False
        for name, value in {**self._options, **options}.items():
            setattr(config, name, value)
        return config

    def _generate(self, ids: Sequence[int], config: Any, streamer: Any = None) -> Any:
        if not 0 < len(ids) < self.most_tokens:
            raise NblError(
                f"the prompt has {len(ids)} tokens and {self.directory} takes 1 to {self.most_tokens - 1}: shorten it"
            )
        openvino = importlib.import_module("openvino")
        prompt = openvino.Tensor(np.asarray([list(ids)], np.int64))
        more = {} if streamer is None else {"streamer": streamer}
        try:
            return self._pipeline.generate(prompt, config, **more)
        except RuntimeError as error:
            raise NblError(f"{self.directory} failed on a prompt of {len(ids)} tokens: {_short(error)}") from error


def _streamer(genai: Any, give: Any) -> Any:
    """A streamer of token ids."""

    class Streamer(genai.StreamerBase):
        def write(self, tokens: Any) -> Any:
            return give(tokens)

        def end(self) -> None:
            """Nothing is held back."""

    return Streamer()


def _own_options(directory: Path) -> dict[str, int]:
    """Options of the proposer in a settled folder; empty in a folder of plain decoding."""
    config = directory / GENERATION_CONFIG
    found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return {name: int(found[name]) for name in (_LOOKUP, _COUNT) if name in found}


def _own_draft(directory: Path, options: Mapping[str, int]) -> str:
    """What proposes tokens in a settled folder; "" in a folder of plain decoding."""
    found = next((name for name in _NAMES if (directory / draft_folder(name)).is_dir()), "")
    return found or ("ngram" if _LOOKUP in options else "")


def _counts(metrics: Any, tokens: int) -> tuple[int, int, int]:
    """Proposed and accepted tokens, and steps that verified them; zeros if the pipeline does not count."""
    if metrics is None:
        return 0, 0, 0
    accepted = metrics.get_num_accepted_tokens()
    return metrics.get_num_draft_tokens(), accepted, max(1, tokens - accepted)


def _load() -> Any:
    try:
        return importlib.import_module("openvino_genai")
    except ImportError as error:
        raise MissingPackageError("openvino-genai", "openvino", "proposing tokens") from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[-200:]
