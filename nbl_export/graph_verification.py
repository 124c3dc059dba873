"""The ladder for a model that is only a graph: what is rewritten against the graph as it came, maps applied in numpy.

    a  the files, as ever
    b  the original graph against itself: cached steps and batches against one pass over each row
    c  the NBL graph against the original graph in which numpy computes the maps: their input is read off a tap, their
       output given to the graph in place of its attention. No bypass, no dropped cache, no sweep is behind that.
    d  greedy text through ONNX Runtime GenAI, where there is a genai_config.json, against that same reference
    e  the price, f the last token, g codes and kernels: as ever; a graph in codes climbs b and c as its float32 twin

What is not proven without the torch model: that the graph as it came computes what its makers meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.engines.onnx_decoder import OnnxDecoder, all_logits_file
from nbl_export.job import Job
from nbl_export.records import AffineMap, DecoderSpec, RungResult
from nbl_export.verify import Probe, greedy, shown_positions

if TYPE_CHECKING:
    from nbl_export.climb import Climb, Coded

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


def run(job: Job) -> dict[str, Any]:
    """The value of verify.json."""
    from nbl_export.climb import Climb, coded_graphs
    from nbl_export.plan import load_maps
    from nbl_export.price import price
    from nbl_export.verification import conclude, make_probe, price_texts

    maps = load_maps(job.run.path / "maps.safetensors", job.plan.replaced)
    results: list[RungResult] = []
    directories = {"original": job.run.path / "original", "nbl": job.run.path / "model"}
    with coded_graphs(job, directories, results) as coded:
        climb = Climb(job, make_probe(job), maps, None, results)
        _ask_graph(climb, directories["original"], coded)
        decoders = climb.run(directories, coded)
        with job.ui.task("price on held-back text") as progress:
            prices = price(decoders["original"], decoders["nbl"], price_texts(job), progress)
    return conclude(job, results, prices)


def _ask_graph(climb: Climb, directory: Path, coded: Mapping[str, Coded]) -> None:
    """Let the graph as it came answer, and its float32 twin with the maps as they are stored."""
    from nbl_export.torch_matrices import nearest_maps

    graph = directory / all_logits_file(directory)
    climb.truth = _references(climb, graph, climb.maps, climb.own_probe(coded))
    if coded:
        with climb.none_of_ours():
            stored = nearest_maps(climb.maps, [m for m in coded["nbl"].stored if m.name.startswith("/nbl/")])
            climb.truth_of_codes = _references(climb, coded["original"].twin, stored, climb.probe)


def _references(climb: Climb, graph: Path, maps: Mapping[int, AffineMap], probe: Probe) -> dict[str, GraphReference]:
    job, found = climb.job, {}
    for subject, ours in (("original", {}), ("nbl", maps)):
        mapped = MappedOriginal(graph, job.spec, ours, job.plan.tap)
        with job.ui.task(f"reference of {subject}"):
            speaks = (job.run.path / "original" / "genai_config.json").is_file()
            found[subject] = _reference(mapped, probe if speaks else dataclasses.replace(probe, prompts=()))
    return found


@dataclass(frozen=True)
class GraphReference:
    """What a graph says in one pass over each row; as `reference.Reference`, without noise."""

    logits: tuple[np.ndarray, ...]
    noise: tuple[np.ndarray, ...]
    greedy: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    long: np.ndarray | None
    long_noise: np.ndarray | None


def _reference(decoder: MappedOriginal, probe: Probe) -> GraphReference:
    logits = tuple(_one_pass(decoder, row) for row in probe.rows)
    texts = [greedy(decoder, prompt, probe.new_tokens) for prompt in probe.prompts]
    long = _one_pass(decoder, probe.long)[shown_positions(len(probe.long))] if probe.long else None
    return GraphReference(
        logits,
        tuple(np.zeros(len(row), np.float32) for row in probe.rows),
        tuple(ids for ids, _ in texts),
        tuple(gaps for _, gaps in texts),
        long,
        None if long is None else np.zeros(len(long), np.float32),
    )


def _one_pass(decoder: Any, row: Sequence[int]) -> np.ndarray:
    decoder.begin(1)
    logits: np.ndarray = decoder.step(np.asarray([row]))[0]
    return logits
