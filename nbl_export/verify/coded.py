"""Graphs with quantised matrices, and the float32 twins that prove their structure.

graph with int4 or int8 matrices ─┬─ stored matrices
                                  └─ float32 twin: a float32 copy of the same graph
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import RefusalError
from nbl_export.graph.coded.nbits import StoredMatrix
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import GRAPH_FILE, all_logits_file
from nbl_export.records.results import RungResult
from nbl_export.verify import codes
from nbl_export.verify.setting import Setting

__all__ = ["Coded", "coded_graphs"]


@dataclass(frozen=True)
class Coded:
    """A graph with quantised matrices, and the float32 twin that proves its structure.

    twin: path of the float32 copy of the graph; the copy gives the logits of all tokens. open: opens a decoder of the
    twin. stored: the quantised matrices. graph: the quantised graph, whose kernels are checked; None if no CPU has
    these kernels, or if they are OpenVINO's. ships: whether the setting's decoder runs the quantised graph itself.
    """

    twin: Path
    open: Callable[[], Any]
    stored: Sequence[StoredMatrix]
    graph: Path | None
    ships: bool = True

    @property
    def source(self) -> Path:
        """The graph that the stored matrices come from."""
        return self.twin if self.graph is None else self.graph


def coded_graphs(
    setting: Setting, directories: Mapping[str, Path], results: list[RungResult], scratch: Path
) -> dict[str, Coded]:
    """Return the quantised graphs by subject, and write their float32 twins.

    The result is empty if no matrix is quantised. It is also empty if no twin can be made; `results` then says why.

    Args:
        scratch: directory of the twins; it must exist as long as the returned objects are used.
    """
    from nbl_export.rewrite.codes import stored_matrices
    from nbl_export.rewrite.widen import save_twin
    from nbl_export.verify.float32_twins import INT4

    if setting.static:  # the static int4 form computes in float32
        forms = {subject: d / INT4 for subject, d in directories.items() if (d / INT4).is_dir()}
        return {
            s: Coded(
                form / GRAPH_FILE,
                functools.partial(setting.engine.open_graph, form, setting.spec.head_dim),
                stored_matrices(form / GRAPH_FILE),
                None,
                ships=False,
            )
            for s, form in forms.items()
        }
    found: dict[str, Coded] = {}
    try:
        for subject, directory in directories.items():
            graph = directory / all_logits_file(directory)
            stored = stored_matrices(graph)
            if not stored and not found:
                break
            with setting.task(f"float32 twin of {subject}"):
                save_twin(graph, scratch / subject)
            twin = scratch / subject / graph.name
            opened = functools.partial(OnnxDecoder, twin.parent, setting.spec.head_dim, file=twin.name)
            found[subject] = Coded(twin, opened, stored, graph)
    except RefusalError as error:
        detail = f"none can be made: {error.reason}; the quantised graph itself is compared with the model"
        results.append(RungResult("a", "nbl", codes.TWIN, None, None, True, detail))
        return {}
    return found
