"""Generates with proposed tokens: ONNX Runtime GenAI's speculative decoding, and plain decoding in the same loop.

    prompt ─► append_tokens ─► generate_next_token ... ─► tokens, times, statistics

`generate_next_token` gives one token. A call at the start of a round lets the proposer propose tokens, and the decoder
verify them in one step; the next calls hand out what was accepted. So only whole texts are timed. The prefill is that
of both decoders: GenAI runs the draft on the prompt too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError, one_line
from nbl_export.targets.onnx.genai import GenaiRunner, open_model
from nbl_export.targets.runners import Generation

__all__ = ["SpeculativeRunner"]


class SpeculativeRunner(GenaiRunner):
    """A runner on a folder of lossless decoding, or on any GenAI folder for the same loop without proposed tokens.

    Args:
        draft: the block `model.draft` of genai_config.json; None leaves the folder's own.

    Raises:
        NblError: as `GenaiRunner`.
    """

    def __init__(self, directory: Path, threads: int | None = None, draft: Mapping[str, Any] | None = None) -> None:
        self._draft = draft
        super().__init__(directory, threads)

    def _open(self) -> Any:
        return open_model(self._og, self.directory, self.threads, self._provider, self._room, self._draft)

    def __enter__(self) -> SpeculativeRunner:
        return self

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest sequence."""
        return self.settings.context_length

    def begin(self, max_tokens: int, batch: int = 1) -> None:
        """As `GenaiRunner.begin`.

        Raises:
            NblError: a batch of more than one sequence.
        """
        if batch > 1:
            raise NblError(f"{self.directory} takes one sequence: ONNX Runtime GenAI proposes no tokens in a batch")
        super().begin(max_tokens)

    def generation(self, ids: Sequence[int], new_tokens: int, options: Mapping[str, int | bool]) -> Generation:
        """A timed greedy continuation, up to `new_tokens` or the end of text.

        Args:
            options: of `set_speculative_options`; empty for the folder's own way.

        Raises:
            NblError: the engine fails, or there is no room for an answer.
        """
        started = time.perf_counter_ns()
        self._read(ids, new_tokens, options)
        read = time.perf_counter_ns()
        tokens = tuple(self._steps())
        ended = time.perf_counter_ns()
        stats = self._generator.get_speculative_stats()
        accepted, proposed = stats["draft_tokens_accepted"], stats["draft_tokens_evaluated"]
        return Generation(tokens, read - started, ended - read, proposed, accepted, stats["rounds"])

    def continuation(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        self._read(ids, new_tokens, {})
        return self._steps()

    def _read(self, ids: Sequence[int], new_tokens: int, options: Mapping[str, int | bool]) -> None:
        """Start a sequence with a prompt."""
        limit = self.settings.context_length
        if not 0 < len(ids) < limit:
            raise NblError(f"the prompt has {len(ids)} tokens and {self.directory} takes 1 to {limit - 1}")
        self._generator = None  # free the old cache before the new one is allocated
        try:
            params = self._og.GeneratorParams(self._model)
            params.set_search_options(max_length=min(len(ids) + new_tokens, limit), do_sample=False, num_beams=1)
            if options:
                params.set_speculative_options(**options)
            self._generator = self._og.Generator(self._model, params)
            self._generator.append_tokens(np.asarray(ids, dtype=np.int32))
        except Exception as error:
            raise NblError(f"{self.directory} failed on a prompt of {len(ids)} tokens: {one_line(error)}") from error

    def _steps(self) -> Iterator[int]:
        while not self._generator.is_done():
            try:
                self._generator.generate_next_token()
            except Exception as error:
                raise NblError(f"{self.directory} failed on a token: {one_line(error)}") from error
            yield int(self._generator.get_next_tokens()[0])
