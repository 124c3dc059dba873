"""The ladder for a model that is only a graph: what is rewritten against the graph as it came, maps applied in numpy.

    a  the files, as ever
    b  the original graph against itself: cached steps and batches against one pass over each row
    c  the NBL graph against the original graph in which numpy computes the maps: their input is read off a tap, their
       output given to the graph in place of its attention. No bypass, no dropped cache, no sweep is behind that.
    d  greedy text through ONNX Runtime GenAI, where there is a genai_config.json, against that same reference
    e  the price, f the last token: as ever

What is not proven without the torch model: that the graph as it came computes what its makers meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.engines.onnx_decoder import ALL_LOGITS_FILE, GRAPH_FILE, OnnxDecoder
from nbl_export.job import Job
from nbl_export.records import ITEMSIZE, AffineMap, DecoderSpec, RungResult

__all__ = ["MappedOriginal", "run"]


class MappedOriginal:
    """The original graph with maps in place of attention, computed here; an `OnnxDecoder` to whoever runs it.

    Args:
        graph: with the logits of all tokens.
        maps: of the replaced layers; none of them is the original.
        tap: what they act on.
    """

    def __init__(self, graph: Path, spec: DecoderSpec, maps: Mapping[int, AffineMap], tap: str) -> None:
        from nbl_export.rewrite.taps import overriding_graph

        self._graph = overriding_graph(graph, tuple(maps), tap)
        self._maps, self._tap = maps, tap
        self._inner = OnnxDecoder(graph.parent, spec.head_dim, caches=self._graph.caches, proto=self._graph.proto)

    def begin(self, batch: int) -> None:
        """Empty caches for a batch."""
        self._inner.begin(batch)

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens and return their logits [B, T, V]: layer by layer, as each map needs those before it."""
        taps, names = self._graph.taps[self._tap], self._graph.given
        width = next((affine.bias.shape[0] for affine in self._maps.values()), 0)
        given = {name: np.zeros((*ids_BT.shape, width), np.float32) for name in names.values()}
        for layer, affine in self._maps.items():
            (x_BTD,) = self._inner.look([taps[layer]], ids_BT, valid_BT, given)
            given[names[layer]] = x_BTD.astype(np.float32) @ affine.weight.T + affine.bias
        return self._inner.step(ids_BT, valid_BT, given)

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Continuation, and the gap between the two best logits at each of its tokens."""
        ids: list[int] = []
        gaps: list[float] = []
        self.begin(1)
        logits = self.step(np.asarray([prompt]))[0, -1]
        for _ in range(new_tokens):
            second, best = np.argsort(logits)[-2:]
            ids.append(int(best))
            gaps.append(float(logits[best] - logits[second]))
            logits = self.step(np.asarray([[best]]))[0, -1]
        return tuple(ids), tuple(gaps)


def run(job: Job) -> dict[str, Any]:
    """The value of verify.json."""
    from nbl_export import price, verification, verify, verify_file, verify_last
    from nbl_export.plan import load_maps

    plan, spec, precision = job.plan, job.spec, job.options.precision
    probe = verification.make_probe(job)
    maps = load_maps(job.run.path / "maps.safetensors", plan.replaced)
    results: list[RungResult] = []
    decoders, graphs = {}, {"original": job.run.path / "original", "nbl": job.run.path / "model"}
    for subject, directory in graphs.items():
        ours, kept = ({}, range(spec.num_layers)) if subject == "original" else (maps, plan.kept)
        decoder = decoders[subject] = job.engine.open_graph(directory, spec)
        size = ITEMSIZE[next(a for a in decoder.contract.inputs if a.name.startswith("past_key_values.")).dtype]
        last_only = (directory / ALL_LOGITS_FILE).is_file()
        shipped = OnnxDecoder(directory, spec.head_dim) if last_only else decoder
        results += verify_file.check_file(
            subject, directory, spec, tuple(kept), shipped.contract, size, job.options.kept_logits
        )
        results += verify_file.check_maps(subject, directory, ours)
        if last_only:
            results.append(verify_last.check_pruned(subject, directory))
            results += verify_last.check_last(subject, decoder, shipped, probe.rows[0], precision)
        reference = MappedOriginal(_all_logits(graphs["original"]), spec, ours, plan.tap)
        with job.ui.task(f"reference of {subject}"):
            expected = [_one_pass(reference, row) for row in probe.rows]
            greedy = (
                [reference.greedy(prompt, probe.new_tokens) for prompt in probe.prompts] if _speaks(directory) else []
            )
        noise = [np.zeros(len(row), np.float32) for row in probe.rows]
        rung = "b" if subject == "original" else "c"
        results += verify.check_logits(rung, subject, decoder, probe.rows, expected, noise, precision)
        results.append(verification.measured_cache(subject, decoder, len(probe.rows), job))
        if greedy:
            with job.engine.open_checked(directory, job.options.threads) as runner:
                said = [runner.greedy(prompt, probe.new_tokens) for prompt in probe.prompts]
            texts, gaps = [ids for ids, _ in greedy], [margins for _, margins in greedy]
            results.append(verify.check_greedy(subject, said, texts, gaps, precision))
    results += verify_file.check_untouched(graphs["nbl"], graphs["original"])
    with job.ui.task("price on held-back text") as progress:
        prices = price.price(decoders["original"], decoders["nbl"], verification.price_texts(job), progress)
    return verification.conclude(job, results, prices)


def _all_logits(directory: Path) -> Path:
    return directory / (ALL_LOGITS_FILE if (directory / ALL_LOGITS_FILE).is_file() else GRAPH_FILE)


def _speaks(directory: Path) -> bool:
    return (directory / "genai_config.json").is_file()


def _one_pass(decoder: Any, row: Sequence[int]) -> np.ndarray:
    decoder.begin(1)
    logits: np.ndarray = decoder.step(np.asarray([row]))[0]
    return logits
