"""The session that computes mixers between the parts of a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.methods.mixed_session import MixedSession
from tests.tiny import HEAD_DIM, random_map

ENTRY = "memory.enable_memory_arena_shrinkage"


def stepped(decoder: OnnxDecoder) -> None:
    decoder.begin(1)
    decoder.step(np.arange(1, 6)[None])


def test_no_part_keeps_the_memory_of_its_steps(exported: Callable[..., Path]) -> None:
    """Parts of a large model would fill the memory with what each of them used once."""
    session = MixedSession(exported("llama") / GRAPH_FILE, {0: random_map(0), 1: random_map(1)}, "residual")
    session._parts = parts = [mock.Mock(wraps=part) for part in session._parts]
    stepped(OnnxDecoder(Path(), HEAD_DIM, session=session))
    runs = [call for part in parts for call in part.run.call_args_list]
    assert len(runs) == len(parts) == 3
    assert {run.args[2].get_run_config_entry(ENTRY) for run in runs} == {"cpu:0"}


def test_a_decoder_with_fp32_activations_keeps_no_memory_of_its_steps_and_another_one_does(
    exported: Callable[..., Path],
) -> None:
    """Verification opens one after the other, and a limit on memory counts what the last one keeps."""
    found = []
    for fp32_activations in (True, False):
        decoder = OnnxDecoder(exported("llama"), HEAD_DIM, fp32_activations=fp32_activations)
        decoder.session = mock.Mock(wraps=decoder.session)
        stepped(decoder)
        found.append([run.get_run_config_entry(ENTRY) for run in decoder.session.run.call_args.args[2:]])
    assert found == [["cpu:0"], []]
