"""An IR as the paged back end of OpenVINO GenAI runs it: steps that hold tokens of several sequences.

    tokens of a step   a a a a b c c c          one list: a prompt, a decode token, and a part of a prompt
    positions          0 1 2 3 9 4 5 6
    caches             blocks of some tokens; each sequence has blocks of its own

OpenVINO's own transformation, which OpenVINO GenAI applies too, turns attention and states into paged attention. Each
token becomes a row of the batch. lm_head multiplies the rows that are asked for (`rows`), as in OpenVINO GenAI.

A graph with sliding windows is refused. Tiny models of nine architectures with windows have other logits in this form
than in the stateful one (OpenVINO 2026.4).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError, RefusalError
from nbl_export.graph.ir.anatomy import Dataflow, has_window
from nbl_export.graph.ir.files import read_ir
from nbl_export.graph.ir.session import check_ids, compiled, load_openvino, settings_of, vocab_size_of
from nbl_export.graph.names import IR_FILE

__all__ = ["PagedIr"]

_ROWS = "nbl.rows"
_CACHES = ("key_cache.", "value_cache.")


class PagedIr:
    """A compiled IR with blocks of caches.

    Args:
        exact: float32 arithmetic and caches.
        threads: None is the plugin's choice.

    Raises:
        RefusalError: OpenVINO has no paged form of this IR.
        CorruptError: the files are damaged.
    """

    def __init__(
        self, directory: Path, file: str = IR_FILE, *, exact: bool = False, threads: int | None = None
    ) -> None:
        self.directory = directory
        self._openvino = load_openvino()
        if has_window(directory):
            raise RefusalError(None, "OpenVINO's paged form of it can lose the sliding window")
        model = read_ir(directory, file)
        settings = settings_of(model, exact=exact, threads=threads)
        self.vocab_size = vocab_size_of(model)
        _page(model)
        self._compiled = compiled(self._openvino.Core(), model, settings, directory / file)
        self._request = self._compiled.create_infer_request()
        ports = [port for port in self._compiled.inputs if port.get_any_name().startswith(_CACHES)]
        self._shapes = {p.get_any_name(): [d.get_length() for d in list(p.get_partial_shape())[1:]] for p in ports}
        self._types = {port.get_any_name(): port.get_element_type() for port in ports}
        asked = next(value for name, value in self._shapes.items() if name.startswith("value_cache."))
        self._block = asked[1]  # of [heads, tokens, head size]
        self._blocks = 0
        self.lengths: list[int] = []

    def begin(self, tokens: int, sequences: int = 1) -> None:
        """Make room for so many tokens of each sequence; the caches are empty."""
        needed = -(-tokens // self._block)
        if (needed, sequences) != (self._blocks, len(self.lengths)):
            self._blocks = needed
            for name, shape in self._shapes.items():
                cache = self._openvino.Tensor(self._types[name], [needed * sequences, *shape])
                cache.data[...] = 0
                self._request.set_tensor(name, cache)
        self.lengths = [0] * sequences

    def step(self, chunks: Mapping[int, np.ndarray], rows: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns float32 logits [rows, V].

        Args:
            chunks: sequence -> token ids [T], in the order in which they stand in the step.
            rows: of the step, whose logits are given; None for all.

        Raises:
            NblError: a token is not in the vocabulary, or OpenVINO fails.
        """
        ids = np.concatenate(list(chunks.values())).astype(np.int64)
        check_ids(ids, self.vocab_size, self.directory)
        past = [self.lengths[sequence] for sequence in chunks]
        counts = [len(ids) for ids in chunks.values()]
        held = [length + count for length, count in zip(past, counts, strict=True)]
        used = [-(-length // self._block) for length in held]
        blocks = [sequence * self._blocks + np.arange(n) for sequence, n in zip(chunks, used, strict=True)]
        positions = [np.arange(start, stop) for start, stop in zip(past, held, strict=True)]
        feeds = {
            "input_ids": ids,
            "position_ids": np.concatenate(positions).astype(np.int64),
            "max_context_len": np.array(max(held), np.int32),
            "past_lens": np.array(past, np.int32),
            "subsequence_begins": np.cumsum([0, *counts]).astype(np.int32),
            "block_indices_begins": np.cumsum([0, *used]).astype(np.int32),
            "block_indices": np.concatenate(blocks).astype(np.int32),
            _ROWS: np.arange(sum(counts)) if rows is None else np.asarray(rows, np.int64),
        }
        try:
            found = self._request.infer(feeds)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-200:]
            raise NblError(f"{self.directory} failed on a step of {sum(counts)} tokens: {reason}") from error
        for sequence, length in zip(chunks, held, strict=True):
            self.lengths[sequence] = length
        return np.array(found["logits"], np.float32)[:, 0]

    def close(self) -> None:
        """Free the model and its caches."""
        del self._request, self._compiled


def _page(model: Any) -> None:
    """Turn attention into paged attention, and have lm_head multiply the rows of an input, in place."""
    from openvino import opset13 as ops
    from openvino._offline_transformations import paged_attention_transformation

    port = Dataflow(model).head().input(0)
    try:
        paged_attention_transformation(model)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RefusalError(None, f"OpenVINO has no paged form of it: {reason}") from error
    rows = ops.parameter([-1], np.int64, name=_ROWS)
    rows.output(0).get_tensor().set_names({_ROWS})
    port.replace_source_output(ops.gather(port.get_source_output(), rows, ops.constant(0)).output(0))
    model.add_parameters([rows])
    model.validate_nodes_and_infer_types()
