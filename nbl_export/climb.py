"""Both graphs of a job up the ladder of `verify`, each against what torch or the graph as it came says.

what ships ─┬─ float32, fp16: held to the model with its own matrices                     rungs b, c, d
            └─ int8, int4: its float32 twin held to the model with the graph's matrices   rungs b, c, d
                           it and its kernels held to the same                            rungs a, d, g
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

from nbl_export import verify, verify_codes, verify_file, verify_last
from nbl_export.engines.onnx_decoder import ALL_LOGITS_FILE, GRAPH_FILE, OnnxDecoder, all_logits_file
from nbl_export.errors import CorruptError, RefusalError
from nbl_export.job import Job
from nbl_export.nbits import StoredMatrix
from nbl_export.records import ITEMSIZE, AffineMap, RungResult

__all__ = ["Climb", "Coded", "coded_graphs"]


@dataclass(frozen=True)
class Coded:
    """A graph with matrices in codes, and how its wiring is proven.

    twin: directory and name of the same graph in float32, with the logits of all tokens. open: a decoder of it. graph:
    the one in codes, whose kernels are looked at; None where no CPU has them.
    """

    twin: Path
    open: Callable[[], Any]
    stored: Sequence[StoredMatrix]
    graph: Path | None


@contextlib.contextmanager
def coded_graphs(job: Job, directories: Mapping[str, Path], results: list[RungResult]) -> Iterator[dict[str, Coded]]:
    """The graphs in codes, by subject; none where there are no codes, or a result says that no twin can be made."""
    from nbl_export.rewrite.codes import stored_matrices
    from nbl_export.rewrite.widen import save_twin
    from nbl_export.twins import INT4

    if job.engine.CAPABILITIES.static:  # the form in int4 computes in float32
        forms = {subject: d / INT4 for subject, d in directories.items() if (d / INT4).is_dir()}
        yield {
            s: Coded(
                form / GRAPH_FILE,
                functools.partial(job.engine.open_graph, form, job.spec),
                stored_matrices(form / GRAPH_FILE),
                None,
            )
            for s, form in forms.items()
        }
        return
    found: dict[str, Coded] = {}
    with job.run.scratch() as scratch:
        try:
            for subject, directory in directories.items():
                graph = directory / all_logits_file(directory)
                stored = stored_matrices(graph)
                if not stored and not found:
                    break
                with job.ui.task(f"float32 twin of {subject}"):
                    save_twin(graph, scratch / subject)
                twin = scratch / subject / graph.name
                found[subject] = Coded(
                    twin,
                    functools.partial(OnnxDecoder, twin.parent, job.spec.head_dim, file=twin.name),
                    stored,
                    graph,
                )
        except RefusalError as error:
            found = {}
            detail = f"none can be made: {error.reason}; the graph is held to the model as it is"
            results.append(RungResult("a", "nbl", verify_codes.TWIN, None, None, True, detail))
        yield found


class Climb:
    """The rungs of both graphs; what is found goes to `results`."""

    def __init__(
        self, job: Job, probe: verify.Probe, maps: Mapping[int, AffineMap], rows_VD: Any, results: list[RungResult]
    ) -> None:
        self.job, self.probe, self.maps, self.rows_VD, self.results = job, probe, maps, rows_VD, results
        self.static = job.engine.CAPABILITIES.static
        self.precision = "fp32" if self.static else job.options.precision  # of what is compared
        self.truth: Mapping[str, Any] = {}  # of the model with its own matrices, by subject
        self.truth_of_codes: Mapping[str, Any] = {}  # with those of the graphs
        self._yardstick: float | None = None

    # -- what is true --------------------------------------------------------------------------------------

    def ask_torch(self, coded: Mapping[str, Coded]) -> None:
        """Let the torch model answer, with its own matrices and with those of the graphs."""
        from nbl_export.reference import references, references_with_codes

        job, tap = self.job, self.job.plan.tap
        floats = () if job.quantized is None else job.quantized.weights
        with job.ui.task("torch reference") as progress:
            self.truth = references(job.model, self.maps, tap, self.own_probe(coded))
            progress(1, 1 + bool(coded))
            if coded:
                stored = {subject: one.stored for subject, one in coded.items()}
                with self.none_of_ours():
                    self.truth_of_codes, found = references_with_codes(
                        job.model, self.maps, tap, self.probe, stored, floats
                    )
                    self.results.append(verify_codes.check_nearness("original", found, _nearness(job)))
                progress(2, 2)
        del job.model  # it has been changed, and memory is wanted

    def own_probe(self, coded: Mapping[str, Coded]) -> verify.Probe:
        """What the model with its own matrices is asked: less where it only tells what the codes cost."""
        reported = bool(coded) and not self.static
        return dataclasses.replace(self.probe, prompts=(), long=()) if reported else self.probe

    @contextlib.contextmanager
    def none_of_ours(self) -> Iterator[None]:
        """Within: a matrix of the graph that is none of the model's is a rung that failed."""
        try:
            yield
        except CorruptError as error:
            metric = "quantised matrices are the model's"
            self.results.append(RungResult("a", "nbl", metric, 1.0, 0.5, False, str(error)))

    # -- rungs -----------------------------------------------------------------------------------------------

    @property
    def tolerance(self) -> verify.Tolerance:
        """Of what ships."""
        alone = not self.truth_of_codes and verify.WITHOUT_TWIN.get(self.precision)
        return alone or verify.TOLERANCES[self.precision]

    def run(self, directories: Mapping[str, Path], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """Climb with both graphs; returns decoders of what ships with all logits, by subject."""
        decoders = {}
        for subject, directory in directories.items():
            decoders[subject] = self.job.engine.open_graph(directory, self.job.spec)
            self._compare(subject, directory, decoders[subject], coded)
            if self.static and subject in coded:  # the nearest to what ships that a CPU runs
                decoders[subject] = coded[subject].open()
        self.results += verify_file.check_untouched(directories["nbl"], directories["original"])
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
        self.results.append(_measured_cache(subject, decoder, self.job))

    def _files(self, subject: str, directory: Path, decoder: Any) -> None:
        """Rungs a and f."""
        job, results = self.job, self.results
        cache = next(a for a in decoder.contract.inputs if a.name.startswith("past_key_values."))
        ids, size = _cache_ids(job, subject), ITEMSIZE[cache.dtype]
        pair = (directory / ALL_LOGITS_FILE).is_file()
        shipped = job.engine.open_graph(directory, job.spec, GRAPH_FILE) if pair else decoder
        results += verify_file.check_file(
            subject, directory, job.spec, ids, shipped.contract, size, job.options.kept_logits
        )
        ours = ({}, None) if subject == "original" else (self.maps, self.rows_VD)
        results += verify_file.check_maps(subject, directory, *ours)
        if pair:
            results.append(verify_last.check_pruned(subject, directory))
            results += verify_last.check_last(subject, decoder, shipped, self.probe.rows[0], self.precision)

    def _logits(self, rung: str, subject: str, decoder: Any, truth: Any, tolerance: verify.Tolerance) -> None:
        """Short rows and the long one; the first graph of a precision is the yardstick of the second."""
        rows, yardstick = self.probe.rows, self._yardstick
        found = verify.check_logits(rung, subject, decoder, rows, truth.logits, truth.noise, tolerance, yardstick)
        if truth.long is not None:
            row = self.probe.long
            found += verify.check_long(rung, subject, decoder, row, truth.long, truth.long_noise, tolerance, yardstick)
        if tolerance.ratio is not None and yardstick is None:
            self._yardstick = max(r.value or 0.0 for r in found)
        self.results += found

    def _codes(self, rung: str, subject: str, decoder: Any, coded: Coded) -> None:
        """The twin, the kernels and what ships against the model with the graph's matrices."""
        from nbl_export.engines.ort_products import products

        truth, exact = self.truth_of_codes[subject], verify.TOLERANCES["fp32"]
        twin = coded.open()
        self._logits(rung, subject, twin, truth, exact)
        if coded.graph is None:  # what ships is compared with the twin bit for bit, see `twins`
            return
        if truth.greedy:
            said = [verify.greedy(twin, prompt, self.probe.new_tokens)[0] for prompt in self.probe.prompts]
            name = "its float32 twin"
            self.results.append(verify.check_greedy(subject, said, truth.greedy, truth.margins, exact, name))
        del twin
        ran = products(coded.graph, self.job.options.first_threads)
        self.results.append(verify_codes.check_products(subject, coded.stored, ran))
        self._logits("g", subject, decoder, truth, self.tolerance)
        got = [verify.run_rows(decoder, [row])[0] for row in self.probe.rows]
        self.results.append(verify_codes.distance(subject, got, self.truth[subject].logits))

    def _text(self, subject: str, directory: Path, truth: Any) -> None:
        """Rung d: what ships; nothing where the reference says no text."""
        if not truth.greedy:
            return
        with self.job.engine.open_checked(directory, self.job.options.first_threads) as runner:
            said = [runner.greedy(prompt, self.probe.new_tokens) for prompt in self.probe.prompts]
        self.results.append(verify.check_greedy(subject, said, truth.greedy, truth.margins, self.tolerance))


def _nearness(job: Job) -> float | None:
    """How many steps codes may be from their matrices; None for those of another tool."""
    if job.quantized is not None:
        return None
    searched = any(option.startswith("algo_config=k_quant") for option in job.options.builder_option)
    return verify_codes.SEARCHED if searched else verify_codes.NEAREST


def _cache_ids(job: Job, subject: str) -> tuple[int, ...]:
    """Layers that keep a cache, or ids 0..K-1 where the graph counts so."""
    kept = job.plan.kept if subject == "nbl" else tuple(range(job.plan.num_layers))
    return tuple(range(len(kept))) if job.engine.CAPABILITIES.dense_caches else kept


def _measured_cache(subject: str, decoder: Any, job: Job) -> RungResult:
    """Rung a: the bytes that a running session holds, of two sequences."""
    decoder.begin(2)
    decoder.step(np.zeros((2, 1), np.int64))
    per_token = decoder.cache_bytes // (2 * decoder.slots)
    stated = decoder.contract.cache_bytes_per_token(job.spec.head_dim)
    passed = per_token == stated
    detail = f"{per_token} bytes a token held after a step, {stated} by contract"
    return RungResult("a", subject, "cache bytes in the running session", float(not passed), 0.5, passed, detail)
