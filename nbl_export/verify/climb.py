"""Runs the verification ladder on both graphs of a run. The reference is the torch model or the input graph.

shipped graph ─┬─ float32, fp16: compared with the model and its own matrices              rungs b, c, d
               └─ int8, int4: float32 twin compared with the model and the graph's matrices   rungs b, c, d
                              shipped graph and its kernels compared with the same model      rungs a, d, g

A float32 twin is a float32 copy of the same graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.engines.ort.decoder import OnnxDecoder
from nbl_export.errors import CorruptError, RefusalError
from nbl_export.graph.names import ALL_LOGITS_FILE, GRAPH_FILE, all_logits_file
from nbl_export.graph.nbits import StoredMatrix
from nbl_export.records.decoder import ITEMSIZE
from nbl_export.records.plan import AffineMap
from nbl_export.records.results import RungResult
from nbl_export.verify import codes, files, ladder, last_token
from nbl_export.verify.reference import Reference
from nbl_export.verify.setting import Setting

__all__ = ["Climb", "Coded", "coded_graphs"]


@dataclass(frozen=True)
class Coded:
    """A graph with quantised matrices, and the float32 twin that proves its structure.

    twin: path of the float32 copy of the graph; the copy gives the logits of all tokens. open: opens a decoder of the
    twin. stored: the quantised matrices. graph: the quantised graph, whose kernels are checked; None if no CPU has
    these kernels.
    """

    twin: Path
    open: Callable[[], Any]
    stored: Sequence[StoredMatrix]
    graph: Path | None


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
                functools.partial(setting.engine.open_graph, form, setting.spec),
                stored_matrices(form / GRAPH_FILE),
                None,
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


class Climb:
    """Runs the rungs of both graphs and appends their results to `results`."""

    def __init__(
        self,
        setting: Setting,
        probe: ladder.Probe,
        maps: Mapping[int, AffineMap],
        rows_VD: Any,
        results: list[RungResult],
    ) -> None:
        self.setting, self.probe, self.maps, self.rows_VD, self.results = setting, probe, maps, rows_VD, results
        self.static = setting.static
        self.precision = "fp32" if self.static else setting.precision  # of the compared graphs
        self.truth: Mapping[str, Reference] = {}  # by subject: the model with its own matrices
        self.truth_of_codes: Mapping[str, Reference] = {}  # by subject: the model with the graphs' matrices
        self._yardstick: float | None = None

    # -- references ----------------------------------------------------------------------------------------

    def ask_torch(self, coded: Mapping[str, Coded], model: Any, floats: Sequence[Any] = ()) -> None:
        """Run the torch model with its own matrices, then with the graphs' matrices. This changes the model.

        Args:
            floats: matrices that a quantised checkpoint keeps as floats, see `torch_reference`.
        """
        from nbl_export.verify.torch_reference import references, references_with_codes

        tap = self.setting.plan.tap
        with self.setting.task("torch reference") as progress:
            self.truth = references(model, self.maps, tap, self.own_probe(coded))
            progress(1, 1 + bool(coded))
            if coded:
                stored = {subject: one.stored for subject, one in coded.items()}
                with self.none_of_ours():
                    self.truth_of_codes, found = references_with_codes(
                        model, self.maps, tap, self.probe, stored, floats
                    )
                    self.results.append(codes.check_nearness("original", found, self.setting.nearness))
                progress(2, 2)

    def ask_graph(self, coded: Mapping[str, Coded], graph: Path) -> None:
        """Run the input graph, then its float32 twin with the affine maps as they are stored."""
        from nbl_export.model.torch_matrices import nearest_maps
        from nbl_export.verify.graph_reference import references

        setting = self.setting
        self.truth = references(graph, setting, self.maps, self.own_probe(coded))
        if coded:
            with self.none_of_ours():
                stored = nearest_maps(self.maps, [m for m in coded["nbl"].stored if m.name.startswith("/nbl/")])
                self.truth_of_codes = references(coded["original"].twin, setting, stored, self.probe)

    def own_probe(self, coded: Mapping[str, Coded]) -> ladder.Probe:
        """The probe of the model with its own matrices; shorter if the model only measures quantisation error."""
        reported = bool(coded) and not self.static
        return dataclasses.replace(self.probe, prompts=(), long=()) if reported else self.probe

    @contextlib.contextmanager
    def none_of_ours(self) -> Iterator[None]:
        """Record a failed rung if the graph has a matrix that the model does not have."""
        try:
            yield
        except CorruptError as error:
            metric = "quantised matrices are the model's"
            self.results.append(RungResult("a", "nbl", metric, 1.0, 0.5, False, str(error)))

    # -- rungs -----------------------------------------------------------------------------------------------

    @property
    def tolerance(self) -> ladder.Tolerance:
        """The tolerance of the shipped graph."""
        alone = not self.truth_of_codes and ladder.WITHOUT_TWIN.get(self.precision)
        return alone or ladder.TOLERANCES[self.precision]

    def run(self, directories: Mapping[str, Path], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """Run the rungs of both graphs; return, by subject, decoders of the shipped graphs with all logits."""
        decoders = {}
        for subject, directory in directories.items():
            decoders[subject] = self.setting.engine.open_graph(directory, self.setting.spec)
            self._compare(subject, directory, decoders[subject], coded)
            if self.static and subject in coded:  # the closest graph to the shipped one that a CPU can run
                decoders[subject] = coded[subject].open()
        self.results += files.check_untouched(directories["nbl"], directories["original"])
        return decoders

    def _compare(self, subject: str, directory: Path, decoder: Any, coded: Mapping[str, Coded]) -> None:
        self._files(subject, directory, decoder)
        rung = "b" if subject == "original" else "c"
        by_codes = self.truth_of_codes.get(subject)
        if by_codes is not None:
            self._codes(rung, subject, decoder, coded[subject])
        if by_codes is None or self.static:
            by_codes = None
            self._logits(rung, subject, decoder, self.truth[subject], self.tolerance)
        self._text(subject, directory, by_codes or self.truth[subject])
        self.results.append(_measured_cache(subject, decoder, self.setting.spec.head_dim))

    def _files(self, subject: str, directory: Path, decoder: Any) -> None:
        """Rungs a and f."""
        setting, results = self.setting, self.results
        cache = next(a for a in decoder.contract.inputs if a.name.startswith("past_key_values."))
        ids, size = _cache_ids(setting, subject), ITEMSIZE[cache.dtype]
        pair = (directory / ALL_LOGITS_FILE).is_file()
        shipped = setting.engine.open_graph(directory, setting.spec, GRAPH_FILE) if pair else decoder
        results += files.check_file(subject, directory, setting.spec, ids, shipped.contract, size, setting.logits)
        ours = ({}, None) if subject == "original" else (self.maps, self.rows_VD)
        results += files.check_maps(subject, directory, *ours)
        if pair:
            results.append(last_token.check_pruned(subject, directory))
            results += last_token.check_last(subject, decoder, shipped, self.probe.rows[0], self.precision)

    def _logits(self, rung: str, subject: str, decoder: Any, truth: Reference, tolerance: ladder.Tolerance) -> None:
        """Compare short rows and the long row; the first graph of a precision is the yardstick of the second."""
        rows, yardstick = self.probe.rows, self._yardstick
        found = ladder.check_logits(rung, subject, decoder, rows, truth, tolerance, yardstick)
        if truth.long is not None:
            row = self.probe.long
            found += ladder.check_long(rung, subject, decoder, row, truth, tolerance, yardstick)
        if tolerance.ratio is not None and yardstick is None:
            self._yardstick = max(r.value or 0.0 for r in found)
        self.results += found

    def _codes(self, rung: str, subject: str, decoder: Any, coded: Coded) -> None:
        """Compare the twin, the kernels and the shipped graph with the model that has the graph's matrices."""
        from nbl_export.engines.ort.products import products

        truth, exact = self.truth_of_codes[subject], ladder.TOLERANCES["fp32"]
        twin = coded.open()
        self._logits(rung, subject, twin, truth, exact)
        if coded.graph is None:  # `float32_twins` compares the shipped graph with the twin bit for bit
            return
        if truth.greedy:
            said = [ladder.greedy(twin, prompt, self.probe.new_tokens)[0] for prompt in self.probe.prompts]
            name = "its float32 twin"
            self.results.append(ladder.check_greedy(subject, said, truth.greedy, truth.margins, exact, name))
        del twin
        ran = products(coded.graph, self.setting.threads)
        self.results.append(codes.check_products(subject, coded.stored, ran))
        self._logits("g", subject, decoder, truth, self.tolerance)
        got = [ladder.run_rows(decoder, [row])[0] for row in self.probe.rows]
        self.results.append(codes.distance(subject, got, self.truth[subject].logits))

    def _text(self, subject: str, directory: Path, truth: Reference) -> None:
        """Rung d: the shipped graph; skipped if the reference has no greedy text."""
        if not truth.greedy:
            return
        with self.setting.engine.open_checked(directory, self.setting.threads) as runner:
            said = [runner.greedy(prompt, self.probe.new_tokens) for prompt in self.probe.prompts]
        self.results.append(ladder.check_greedy(subject, said, truth.greedy, truth.margins, self.tolerance))


def _cache_ids(setting: Setting, subject: str) -> tuple[int, ...]:
    """Ids of the caches: the layers that keep one, or 0..K-1 if the engine numbers caches without gaps."""
    plan = setting.plan
    kept = plan.kept if subject == "nbl" else tuple(range(plan.num_layers))
    return tuple(range(len(kept))) if setting.engine.capabilities.dense_caches else kept


def _measured_cache(subject: str, decoder: Any, head_dim: int) -> RungResult:
    """Rung a: cache bytes that a running session holds for two sequences."""
    decoder.begin(2)
    decoder.step(np.zeros((2, 1), np.int64))
    per_token = decoder.cache_bytes // (2 * decoder.slots)
    stated = decoder.contract.cache_bytes_per_token(head_dim)
    passed = per_token == stated
    detail = f"{per_token} bytes a token held after a step, {stated} by contract"
    return RungResult("a", subject, "cache bytes in the running session", float(not passed), 0.5, passed, detail)
