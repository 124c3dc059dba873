"""The torch reference of a model larger than memory, with one decoder layer in memory at a time.

    tokens of all probes ─┬─ layer i with its own matrices ─────► original ─┐
                          ├─ the same, maps for attention ──────► nbl       │ layer i + 1 ... head ─► logits
                          ├─ layer i with the graphs' matrices ─► original  │
                          └─ the same, maps for attention ──────► nbl      ─┘

All variants go through a layer before the next layer is loaded, so a pass reads the weights once. A graph's matrix is
recognised by its values, as in `torch_reference`, in the layer that is in memory.

Greedy text needs no pass a token. The graph proposes tokens, and one pass gives the model's own choice at each of them.
Proposals hold up to the first difference. There the model's choice takes the place, and the graph proposes again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nbl_export.mixers.base import Mixer
from nbl_export.model.checkpoint.pretrained import config_of
from nbl_export.model.head import logits_of
from nbl_export.model.linearize import multiplier_of, run_from, switched
from nbl_export.model.one_layer import WeightReader, one_layer, only_head
from nbl_export.records.quantised import Fidelity, StoredMatrix
from nbl_export.verify.kept import CODES, OWN
from nbl_export.verify.ladder import Probe, Reference, shown_positions
from nbl_export.verify.torch_reference import (
    NOISE_DRAWS,
    NOISE_DRAWS_LONG,
    Codes,
    factors,
    give_floats,
    give_known,
    nearest_maps,
    unknown,
)

__all__ = ["StreamedReference"]

Ids = Sequence[int]
# kind of matrices, subject, texts, numbers of tokens -> the greedy tokens of the graph behind each text
Propose = Callable[[str, str, Sequence[Ids], Ids], Sequence[Ids]]
Variant = tuple[str, str]  # kind of matrices (OWN, CODES), subject (original, nbl)


@dataclass(frozen=True)
class _Run:
    """Tokens that go through the layers.

    Attributes:
        kept: positions whose logits are computed. factor_1TD: of the embeddings; None changes nothing.
    """

    ids: Ids
    kept: Sequence[int]
    factor_1TD: torch.Tensor | None = None

    def entering(self, look_up: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        rows_1TD = look_up(torch.tensor([list(self.ids)]))
        return rows_1TD if self.factor_1TD is None else rows_1TD * self.factor_1TD


@dataclass
class _Text:
    """Greedy text that grows with each pass."""

    prompt: Ids
    wanted: int
    ids: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    proposed: Ids = ()

    @property
    def open(self) -> bool:
        return len(self.ids) < self.wanted

    @property
    def so_far(self) -> list[int]:
        return [*self.prompt, *self.ids]

    @property
    def run(self) -> _Run:
        ids = [*self.so_far, *self.proposed]
        return _Run(ids, range(len(self.so_far) - 1, len(ids)))

    def take(self, logits_NV: np.ndarray) -> None:
        """The model's choices behind the text so far and behind each proposal, up to the first that differs."""
        for row_V, proposal in zip(logits_NV, [*self.proposed, None], strict=True):
            second, best = np.argpartition(row_V, -2)[-2:]
            self.ids.append(int(best))
            self.margins.append(float(row_V[best] - row_V[second]))
            if best != proposal:
                return


class StreamedReference:
    """The original and the NBL model of a checkpoint directory.

    Args:
        checkpoint: holds config.json and safetensors files.
        tap: what the maps act on.
        codes: matrices of the quantised graphs; None without.
        propose: gives the proposals of the graphs.

    Raises:
        CorruptError: a graph's map is not like any of the maps.
    """

    def __init__(
        self, checkpoint: Path, maps: Mapping[int, Mixer], tap: str, codes: Codes | None, propose: Propose
    ) -> None:
        self._config, self._weights = config_of(checkpoint), WeightReader(checkpoint)
        self._tap, self._codes, self._propose = tap, codes, propose
        self._maps = {OWN: maps} if codes is None else {OWN: maps, CODES: nearest_maps(maps, codes.maps)}

    def references(
        self, probes: Mapping[str, Probe], known: Mapping[str, Reference | None], progress: Callable[[int, int], None]
    ) -> tuple[dict[str, dict[str, Reference]], list[Fidelity]]:
        """By kind of matrices and subject; also the distances of the graphs' matrices from the model's.

        Args:
            probes: by kind of matrices.
            known: references of the original that are known; these are not computed.

        Raises:
            CorruptError: a matrix of the graph does not match any matrix of the model.
        """
        wanted = {
            (kind, subject): probe
            for kind, probe in probes.items()
            for subject in ("original", "nbl")
            if subject == "nbl" or known.get(kind) is None
        }
        texts = {v: [_Text(prompt, probe.new_tokens) for prompt in probe.prompts] for v, probe in wanted.items()}
        rows = {v: _rows(probe) for v, probe in wanted.items()}
        found, fidelity = self._pass({v: [*rows[v], *self._proposed(v, texts[v])] for v in wanted}, progress)
        first = found
        while found:
            for v, logits in found.items():
                growing = [text for text in texts[v] if text.open]
                for text, logits_NV in zip(growing, logits[len(logits) - len(growing) :], strict=True):
                    text.take(logits_NV)
            asked = {v: self._proposed(v, texts[v]) for v in wanted}
            asked = {v: runs for v, runs in asked.items() if runs}
            found = self._pass(asked, progress)[0] if asked else {}
        made: dict[str, dict[str, Reference]] = {kind: {} for kind in probes}
        made |= {kind: {"original": reference} for kind, reference in known.items() if reference is not None}
        for (kind, subject), probe in wanted.items():
            made[kind][subject] = _reference(probe, first[kind, subject], texts[kind, subject])
        return made, fidelity

    def noise(self, kind: str, subject: str, probe: Probe, reference: Reference) -> Reference:
        """The reference with its noise."""
        draws = [NOISE_DRAWS_LONG if run.ids is probe.long else NOISE_DRAWS for run in _rows(probe)]
        runs = [
            [dataclasses.replace(run, factor_1TD=factor) for factor in factors(self._shape(run), count)]
            for run, count in zip(_rows(probe), draws, strict=True)
        ]
        noisy = iter(self._pass({(kind, subject): list(itertools.chain(*runs))}, lambda *_: None)[0][kind, subject])
        clean = [*reference.logits, *(() if reference.long is None else (reference.long,))]
        away = [
            np.max([np.abs(next(noisy) - logits_NV).max(1) for _ in range(count)], 0)
            for logits_NV, count in zip(clean, draws, strict=True)
        ]
        long = None if reference.long is None else away.pop()
        return dataclasses.replace(reference, noise=tuple(away), long_noise=long, noisy=True)

    def _shape(self, run: _Run) -> tuple[int, int, int]:
        return 1, len(run.ids), int(self._config.hidden_size)

    def _proposed(self, variant: Variant, texts: Sequence[_Text]) -> list[_Run]:
        """What the next pass runs for the texts that are not complete."""
        growing = [text for text in texts if text.open]
        if growing:
            counts = [text.wanted - len(text.ids) - 1 for text in growing]
            given = self._propose(*variant, [text.so_far for text in growing], counts)
            for text, proposed in zip(growing, given, strict=True):
                text.proposed = proposed
        return [text.run for text in growing]

    @torch.inference_mode()
    def _pass(
        self, asked: Mapping[Variant, Sequence[_Run]], progress: Callable[[int, int], None]
    ) -> tuple[dict[Variant, list[np.ndarray]], list[Fidelity]]:
        """Logits of each run; also the distances of the graphs' matrices, if a variant has these."""
        states: dict[Variant, list[torch.Tensor]] = {variant: [] for variant in asked}
        found: dict[Variant, list[np.ndarray]] = {}
        fidelity: list[Fidelity] = []
        left = sorted(self._codes.stored["original"], key=_place) if self._codes is not None else []
        layers = int(self._config.num_hidden_layers)
        kinds = [kind for kind in (OWN, CODES) if any(kind == variant[0] for variant in asked)]
        for layer in range(layers + 1):
            part = self._head() if layer == layers else one_layer(self._config, layer, self._weights)
            for kind in kinds:
                if kind == CODES:
                    fidelity += self._give(part, layer, left)
                for variant in (v for v in asked if v[0] == kind):
                    if layer < layers:
                        states[variant] = self._advance(part, layer, variant, asked[variant], states[variant])
                        continue
                    runs = zip(asked[variant], states.pop(variant), strict=True)
                    found[variant] = [logits_of(part, state[0, list(run.kept)]).numpy() for run, state in runs]
            del part
            progress(layer + 1, layers + 1)
        if CODES in kinds and left:
            raise unknown(left[0].name)
        return found, fidelity

    def _head(self) -> Any:
        head = only_head(self._config, self._weights)
        module = nn.Module()
        module.lm_head, module.config = head.lm_head, head.config
        return module

    def _give(self, part: Any, layer: int, left: list[StoredMatrix]) -> list[Fidelity]:
        """Give a layer or the head the graphs' matrices, in place."""
        assert self._codes is not None

        def named(name: str) -> str:
            place = name.replace("layers.0.", f"layers.{layer}.", 1)
            return place if place.startswith("lm_head") else f"model.{place}"

        give_floats(part, self._codes.floats, named)
        return give_known(part, left, named)

    def _advance(
        self, decoder: Any, layer: int, variant: Variant, runs: Sequence[_Run], states: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Hidden states behind a layer."""
        kind, subject = variant
        maps = self._maps[kind] if subject == "nbl" else {}
        modules = {0: maps[layer].module(multiplier_of(self._config)).eval()} if layer in maps else {}
        with switched(decoder, modules, self._tap):
            if states:
                return [run_from(decoder, state) for state in states]
            rows = (run.entering(decoder.embed_tokens) for run in runs)
            return [decoder(inputs_embeds=row, use_cache=False).last_hidden_state for row in rows]


def _place(matrix: StoredMatrix) -> float:
    """The first number in a name: in most graphs the layer, in which a matrix is found at the first try."""
    number = re.search(r"\d+", matrix.name)
    return float(number[0]) if number else math.inf


def _rows(probe: Probe) -> list[_Run]:
    """The short rows, and the long row at the positions that are compared."""
    short = [_Run(row, range(len(row))) for row in probe.rows]
    return [*short, *([_Run(probe.long, shown_positions(len(probe.long)).tolist())] if probe.long else [])]


def _reference(probe: Probe, logits: Sequence[np.ndarray], texts: Sequence[_Text]) -> Reference:
    count = len(probe.rows)
    said, margins = tuple(tuple(t.ids) for t in texts), tuple(tuple(t.margins) for t in texts)
    return Reference.without_noise(tuple(logits[:count]), said, margins, logits[count] if probe.long else None)
