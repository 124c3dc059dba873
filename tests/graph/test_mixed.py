"""The session that computes mixers between the parts of a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.mixed import MixedSession
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.mixers.base import Running

from ..tiny import HEAD_DIM, random_map


def test_no_part_keeps_the_memory_of_its_steps(exported: Callable[..., Path]) -> None:
    """Parts of a large model would fill the memory with what each of them used once."""
    session = MixedSession(exported("llama") / GRAPH_FILE, Running({0: random_map(0), 1: random_map(1)}), "residual")
    session._parts = parts = [mock.Mock(wraps=part) for part in session._parts]
    decoder = OnnxDecoder(Path(), HEAD_DIM, session=session)
    decoder.begin(1)
    decoder.step(np.arange(1, 6)[None])
    runs = [call for part in parts for call in part.run.call_args_list]
    assert len(runs) == len(parts) == 3
    assert {run.args[2].get_run_config_entry("memory.enable_memory_arena_shrinkage") for run in runs} == {"cpu:0"}
