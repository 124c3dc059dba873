"""Runs the verification ladder on both graphs of a run. The reference is the torch model.

shipped graph ─┬─ float32, fp16: compared with the model and its own matrices                  original, nbl, text
               └─ int8, int4: float32 twin compared with the model and the graph's matrices    original, nbl, text
                              shipped graph and its kernels compared with it           structure, text, quantised

A float32 twin is a float32 copy of the same graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.mixers.base import Mixer, Port, apply, state_of
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.results import YES_NO, CheckResult
from nbl_export.targets.checks import Coded
from nbl_export.verify import codes, ladder
from nbl_export.verify.kept import CODES, OWN, KeptReferences
from nbl_export.verify.ladder import Reference, greedy
from nbl_export.verify.structure import Setting, check_directory

__all__ = ["MappedOriginal", "Verifier"]

Noise = Callable[[str, Reference], Reference]  # subject and its reference -> the reference with its noise


class Verifier:
    """Runs the checks of both graphs and appends their results to `results`."""

    def __init__(
        self,
        setting: Setting,
        probe: ladder.Probe,
        maps: Mapping[int, Mixer],
        results: list[CheckResult],
        kept: KeptReferences,
    ) -> None:
        self.setting, self.probe, self.maps, self.results = setting, probe, maps, results
        self.kept = kept
        self.static = setting.static
        self.precision = "fp32" if self.static else setting.precision  # of the compared graphs
        self.truth: dict[str, Reference] = {}  # by subject: the model with its own matrices
        self.truth_of_codes: dict[str, Reference] = {}  # by subject: the model with the graphs' matrices
        self.said: dict[str, list[list[int]]] = {}  # by subject: greedy text of what ships, a list of tokens a prompt
        self._noise_of: dict[str, Noise] = {}  # by kind of matrices, `OWN` or `CODES`
        self._yardstick: float | None = None

    # -- references ----------------------------------------------------------------------------------------

    def refer_to_torch(
        self,
        coded: Mapping[str, Coded],
        open_model: Callable[[], AbstractContextManager[Any]],
        floats: Sequence[Path] = (),
    ) -> None:
        """Run the torch model with its own matrices, then with the graphs' matrices.

        Args:
            open_model: opens a fresh torch model, which is changed.
            floats: matrices that a quantised checkpoint keeps as floats, see `torch_reference`.
        """
        from nbl_export.verify import torch_reference as torch_side

        maps, tap, own = self.maps, self.setting.plan.tap, self.own_probe(coded)
        given = torch_side.Codes({subject: one.stored for subject, one in coded.items()}, floats)
        with self.setting.task("torch reference") as progress, open_model() as model:
            self.truth = torch_side.references(model, maps, tap, own, self.kept.get(OWN, own))
            progress(1, 1 + bool(coded))
            if coded:
                known = self.kept.get(CODES, self.probe, coded["original"].source)
                with self.refuse_unknown():
                    found = torch_side.references_with_codes(model, maps, tap, self.probe, given, known)
                    self.truth_of_codes, fidelity = found
                    self.results.append(codes.check_nearness("original", fidelity, self.setting.nearness))
                progress(2, 2)

        def of_own(subject: str, reference: Reference) -> Reference:
            with open_model() as model:
                return torch_side.noise_with_maps(model, maps, tap, own, subject, reference)

        def of_codes(subject: str, reference: Reference) -> Reference:
            with open_model() as model:
                return torch_side.noise_with_codes(model, maps, tap, self.probe, given, subject, reference)

        self._noise_of = {OWN: of_own, CODES: of_codes}

    def refer_to_layers(
        self, coded: Mapping[str, Coded], directories: Mapping[str, Path], checkpoint: Path, floats: Sequence[Path] = ()
    ) -> None:
        """Like `refer_to_torch`, with one layer of the checkpoint in memory at a time.

        Args:
            directories: of the graphs, which propose the greedy text.
        """
        from nbl_export.verify.streamed_reference import StreamedReference
        from nbl_export.verify.torch_reference import Codes

        own = self.own_probe(coded)
        probes = {OWN: own, CODES: self.probe} if coded else {OWN: own}
        known = {OWN: self.kept.get(OWN, own)}
        given = Codes({subject: one.stored for subject, one in coded.items()}, floats)

        def propose(kind: str, subject: str, texts: Any, counts: Any) -> list[Any]:
            engine, head_dim = self.setting.engine, self.setting.spec.head_dim
            shipped = kind == OWN
            decoder = engine.open_graph(directories[subject], head_dim) if shipped else coded[subject].open()
            return [greedy(decoder, text, count)[0] for text, count in zip(texts, counts, strict=True)]

        def streamed(with_codes: Any) -> StreamedReference:
            return StreamedReference(checkpoint, self.maps, self.setting.plan.tap, with_codes, propose)

        with self.setting.task("torch reference, one layer at a time") as progress:
            if coded:
                known[CODES] = self.kept.get(CODES, self.probe, coded["original"].source)
                with self.refuse_unknown():
                    model = streamed(given)
                    found, fidelity = model.references(probes, known, progress)
                    self.truth, self.truth_of_codes = found[OWN], found[CODES]
                    self.results.append(codes.check_nearness("original", fidelity, self.setting.nearness))
            if not self.truth:
                model = streamed(None)
                self.truth = model.references({OWN: own}, known, progress)[0][OWN]

        def noise_of(kind: str) -> Noise:
            return lambda subject, reference: model.noise(kind, subject, probes[kind], reference)

        self._noise_of = {kind: noise_of(kind) for kind in probes}

    def _keep(self, coded: Mapping[str, Coded]) -> None:
        """Keep the references of the original, for another plan of the same model."""
        if "original" in self.truth:
            self.kept.put(OWN, self.own_probe(coded), self.truth["original"])
        if "original" in self.truth_of_codes:
            self.kept.put(CODES, self.probe, self.truth_of_codes["original"], coded["original"].source)

    def own_probe(self, coded: Mapping[str, Coded]) -> ladder.Probe:
        """The probe of the model with its own matrices; shorter if the model only measures quantisation error."""
        reported = bool(coded) and not self.static
        return dataclasses.replace(self.probe, prompts=(), long=()) if reported else self.probe

    @contextlib.contextmanager
    def refuse_unknown(self) -> Iterator[None]:
        """Record a failed check if the graph has a matrix that the model does not have."""
        try:
            yield
        except CorruptError as error:
            metric = "quantised matrices are the model's"
            self.results.append(CheckResult("structure", "nbl", metric, 1.0, YES_NO, False, str(error)))

    @property
    def references(self) -> dict[str, Reference]:
        """By subject, the model that has the matrices of the shipped graph, as far as one was run."""
        return {**self.truth, **self.truth_of_codes}

    # -- checks -----------------------------------------------------------------------------------------------

    @property
    def tolerance(self) -> ladder.Tolerance:
        """The tolerance of the shipped graph."""
        if self.setting.narrow:
            return ladder.NARROW[self.precision]
        alone = not self.truth_of_codes and ladder.WITHOUT_TWIN.get(self.precision)
        return alone or ladder.TOLERANCES[self.precision]

    def run(self, directories: Mapping[str, Path], coded: Mapping[str, Coded]) -> dict[str, Any]:
        """Run the checks of both graphs; return, by subject, decoders of the shipped graphs with all logits.

        A graph is closed before the next graph or its own runtime is opened: each takes its weights in memory.
        """
        for subject, directory in directories.items():
            self._text(subject, directory, self._compare(subject, directory, coded))
        self.results += self.setting.engine.check_untouched(directories["nbl"], directories["original"])
        self._keep(coded)
        return {subject: self._most_exact(subject, directory, coded) for subject, directory in directories.items()}

    def _most_exact(self, subject: str, directory: Path, coded: Mapping[str, Coded]) -> Any:
        """A decoder of the closest graph to the shipped one that a CPU can run."""
        if self.static and subject in coded:
            return coded[subject].open()
        return self.setting.engine.open_graph(directory, self.setting.spec.head_dim)

    def _compare(self, subject: str, directory: Path, coded: Mapping[str, Coded]) -> Reference:
        """Compare the graph with its references; return the one that its text is compared with."""
        decoder = self.setting.engine.open_graph(directory, self.setting.spec.head_dim)
        wanted = self.setting.wanted(subject, self.maps)
        self.results += check_directory(self.setting, directory, decoder, wanted, self.probe, self.precision)
        check = subject
        by_codes = self.truth_of_codes.get(subject)
        if by_codes is not None:
            self._codes(check, subject, decoder, coded[subject])
        if by_codes is None or self.static:
            by_codes = None
            self._logits(check, subject, decoder, self.tolerance)
        return by_codes or self.truth[subject]

    def _logits(self, check: str, subject: str, decoder: Any, tolerance: ladder.Tolerance, kind: str = OWN) -> None:
        """Compare short rows and the long row; the first graph of a precision is the yardstick of the second.

        Noise can only widen a limit. So noise is measured only if a position differs by more than the limit.
        """
        truth = self.truth if kind == OWN else self.truth_of_codes
        found = self._compared(check, subject, decoder, truth[subject].quiet, tolerance)
        noise = self._noise_of.get(kind)
        if noise is not None and tolerance.metric == "max_abs" and not all(r.passed for r in found):
            if not truth[subject].noisy:
                truth[subject] = noise(subject, truth[subject])
            found = self._compared(check, subject, decoder, truth[subject], tolerance)
        if tolerance.ratio is not None and self._yardstick is None:
            self._yardstick = max(r.value or 0.0 for r in found)
        self.results += found

    def _compared(
        self, check: str, subject: str, decoder: Any, truth: Reference, tolerance: ladder.Tolerance
    ) -> list[CheckResult]:
        rows, yardstick = self.probe.rows, self._yardstick
        found = ladder.check_logits(check, subject, decoder, rows, truth, tolerance, yardstick)
        if truth.long is not None:
            row = self.probe.long
            found += ladder.check_long(check, subject, decoder, row, truth, tolerance, yardstick)
        return found

    def _codes(self, check: str, subject: str, decoder: Any, coded: Coded) -> None:
        """Compare the twin, the kernels and the shipped graph with the model that has the graph's matrices."""
        truth, exact = self.truth_of_codes[subject], ladder.TOLERANCES["fp32"]
        twin = coded.open()
        self._logits(check, subject, twin, exact, CODES)
        if not coded.ships:  # `float32_twins` compares the shipped graph with the twin bit for bit
            return
        if truth.greedy:
            said = [ladder.greedy(twin, prompt, self.probe.new_tokens)[0] for prompt in self.probe.prompts]
            name = "its float32 twin"
            self.results.append(ladder.check_greedy(subject, said, truth.greedy, truth.margins, exact, name))
        del twin
        if coded.graph is not None:
            self.results.append(codes.check_products(subject, coded.stored, codes.products(coded.graph)))
        self._logits("quantised", subject, decoder, self.tolerance, CODES)
        got = [ladder.run_rows(decoder, [row])[0] for row in self.probe.rows]
        self.results.append(codes.distance(subject, got, self.truth[subject].logits))

    def _text(self, subject: str, directory: Path, truth: Reference) -> None:
        """Check text: the shipped graph; skipped if the reference has no greedy text."""
        if not truth.greedy:
            return
        with self.setting.engine.open_checked(directory) as runner:
            said = [runner.greedy(prompt, self.probe.new_tokens) for prompt in self.probe.prompts]
        self.said[subject] = said
        self.results.append(ladder.check_greedy(subject, said, truth.greedy, truth.margins, self.tolerance))


class MappedOriginal:
    """The original graph with numpy maps in place of attention; its interface is that of `OnnxDecoder`.

    Args:
        graph: with the logits of all tokens.
        maps: of the replaced layers; empty for the original.
        tap: the input of the maps.
    """

    def __init__(self, graph: Path, spec: DecoderSpec, maps: Mapping[int, Mixer], tap: str) -> None:
        from nbl_export.rewrite.taps import overriding_graph

        self._graph = overriding_graph(graph, tuple(maps), tap)
        self._maps, self._tap = maps, tap
        self._inner = OnnxDecoder(graph.parent, spec.head_dim, caches=self._graph.caches, proto=self._graph.proto)

    def begin(self, batch: int) -> None:
        """Empty caches and states for a batch."""
        self._states: dict[tuple[int, int], np.ndarray | None] = {}
        self._inner.begin(batch)

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens and return their logits [B, T, V]. Layers run in order: each map needs the maps before it."""
        taps, names = self._graph.taps[self._tap], self._graph.override
        counts = np.full(len(ids_BT), ids_BT.shape[1]) if valid_BT is None else valid_BT.sum(1)
        width = next((mixer.size for mixer in self._maps.values()), 0)
        given = {name: np.zeros((*ids_BT.shape, width), np.float32) for name in names.values()}
        for layer in self._maps:
            (x_BTD,) = self._inner.look([taps[layer]], ids_BT, valid_BT, given)
            given[names[layer]] = self._mixed(layer, x_BTD, counts)
        return self._inner.step(ids_BT, valid_BT, given)

    def _mixed(self, layer: int, x_BTD: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
        """The output of a layer's mixer, which remembers each row's valid tokens alone."""
        mixer = self._maps[layer]
        if state_of(mixer) is None:
            return apply(mixer, {None: x_BTD})[0][Port.OUTPUT]
        found = np.zeros(x_BTD.shape, np.float32)
        for row, count in enumerate(counts_B):
            past = self._states.get((layer, row))
            given, self._states[layer, row] = apply(mixer, {None: x_BTD[row : row + 1, :count]}, past)
            found[row, :count] = given[Port.OUTPUT]
        return found
