"""Trains the maps, and nothing else, against the original model's own logits.

    start      closed-form maps of the plan
    loss       KL(original || NBL) over all positions and the whole vocabulary, in nats
    kept       the maps with the lowest loss on held-back text; those of the start if nothing was better

One copy of the weights serves both models: a replaced layer holds its attention and its map and is switched. The
original is run once over the text; what the student needs of it is kept (the hidden states entering the first
replaced layer, below which both models are the same, and the last ones, from which its logits follow). A student
step then runs the layers from the first replaced one upward.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nbl_export.errors import NblError
from nbl_export.linearize import AffineAttention
from nbl_export.records import AffineMap

__all__ = ["DistillSettings", "Distilled", "distill"]

_LOGIT_ROWS = 512  # positions whose logits are held at once


@dataclass(frozen=True)
class DistillSettings:
    """How to train. steps: optimizer steps; minutes: stop earlier when this much time is used (None: no limit).

    A step sees batch_tokens tokens. The rate falls from learning_rate to nothing along a cosine over the steps.
    """

    steps: int = 200
    minutes: float | None = None
    learning_rate: float = 1e-3
    batch_tokens: int = 1024
    check_every: int = 20
    patience: int = 4
    seed: int = 0


@dataclass
class Distilled:
    """The best maps and how they came about: held-back KL by step (0 is the start), training KL by step."""

    maps: dict[int, AffineMap]
    held_kl: list[tuple[int, float]] = field(default_factory=list)
    train_kl: list[float] = field(default_factory=list)
    seconds: float = 0.0


class _Twin:
    """Original and student in one model: replaced layers are switched between attention and map."""

    def __init__(self, model: Any, maps: Mapping[int, AffineMap], tap: str) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.layers = self.decoder.layers
        self.first = min(maps)
        self.tap = tap
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.affine = nn.ModuleDict({str(i): AffineAttention(m) for i, m in maps.items()})
        for parameter in self.affine.parameters():
            parameter.requires_grad_(True)

    @contextlib.contextmanager
    def student(self) -> Iterator[None]:
        """Within: replaced layers compute their maps, and layers below the first one are left out."""
        kept = {i: (self.layers[i].self_attn, self.layers[i].input_layernorm) for i in map(int, self.affine)}
        for i in kept:
            self.layers[i].self_attn = self.affine[str(i)]
            if self.tap == "residual":
                self.layers[i].input_layernorm = nn.Identity()
        self.decoder.layers = self.layers[self.first :]
        try:
            yield
        finally:
            self.decoder.layers = self.layers
            for i, (attention, norm) in kept.items():
                self.layers[i].self_attn, self.layers[i].input_layernorm = attention, norm

    @torch.no_grad()
    def observe(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The original's hidden states [B, T, D]: entering the first replaced layer, and the last ones."""
        seen: list[torch.Tensor] = []
        hook = self.layers[self.first].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        try:
            last = self.decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
        finally:
            hook.remove()
        return seen[0], last

    def run(self, entering_BTD: torch.Tensor) -> torch.Tensor:
        """The student's last hidden states."""
        out: torch.Tensor = self.decoder(inputs_embeds=entering_BTD, use_cache=False).last_hidden_state
        return out

    def kl(self, teacher_ND: torch.Tensor, student_ND: torch.Tensor) -> torch.Tensor:
        """Mean KL over positions; logits of a few hundred positions at a time."""
        total = student_ND.new_zeros(())
        for t, s in zip(teacher_ND.split(_LOGIT_ROWS), student_ND.split(_LOGIT_ROWS), strict=True):
            with torch.no_grad():
                target = self.model.lm_head(t).float().log_softmax(-1)
            ours = self.model.lm_head(s).float().log_softmax(-1)
            total = total + nn.functional.kl_div(ours, target, reduction="sum", log_target=True)
        return total / teacher_ND.shape[0]

    def maps(self) -> dict[int, AffineMap]:
        return {
            int(i): AffineMap(m.linear.weight.detach().numpy().copy(), m.linear.bias.detach().numpy().copy())
            for i, m in self.affine.items()
        }


def distill(
    model: Any,
    maps: Mapping[int, AffineMap],
    windows_WT: torch.Tensor,
    held_WT: torch.Tensor,
    settings: DistillSettings,
    progress: Callable[[int, int], None],
    tap: str = "residual",
    say: Callable[[str], None] = lambda _line: None,
) -> Distilled:
    """Train the maps of `model`, which comes back as it was. Deterministic for a seed on one machine.

    Args:
        windows_WT, held_WT: token ids [windows, context] to train on and to judge by.

    Raises:
        NblError: there is nothing to train, or the loss is not finite from the start.
    """
    if not maps or not len(held_WT):
        raise NblError("distillation needs at least one replaced layer and some held-back text")
    started = time.monotonic()
    twin = _Twin(model, maps, tap)
    held = [twin.observe(row[None]) for row in held_WT]
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    optimizer = torch.optim.AdamW(
        twin.affine.parameters(), lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * min(1.0, k / settings.steps)))
    )
    best = _held_kl(twin, held)
    if not math.isfinite(best):
        raise NblError("distillation cannot start: the closed-form maps give logits that are not finite")
    result = Distilled(twin.maps(), [(0, best)])
    since_best = 0
    for step, batch in enumerate(_batches(len(windows_WT), settings, windows_WT.shape[1]), 1):
        for w in batch:
            if w not in seen:
                seen[w] = twin.observe(windows_WT[w][None])
        entering, last = (torch.cat([seen[w][k] for w in batch]) for k in (0, 1))
        with twin.student():
            loss = twin.kl(last.flatten(0, 1), twin.run(entering).flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.affine.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        result.train_kl.append(loss.item())
        progress(step, settings.steps)
        out_of_time = settings.minutes is not None and time.monotonic() - started > settings.minutes * 60
        if step % settings.check_every == 0 or step == settings.steps or out_of_time:
            found = _held_kl(twin, held)
            result.held_kl.append((step, found))
            say(f"step {step}: KL {result.train_kl[-1]:.4f}, held back {found:.4f} (start {result.held_kl[0][1]:.4f})")
            since_best = 0 if found < best else since_best + 1
            if found < best:
                best, result.maps = found, twin.maps()
            if out_of_time or since_best >= settings.patience:
                break
    result.seconds = time.monotonic() - started
    return result


@torch.no_grad()
def _held_kl(twin: _Twin, held: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    with twin.student():
        values = [twin.kl(last[0], twin.run(entering)[0]).item() for entering, last in held]
    return sum(values) / len(values)


def _batches(windows: int, settings: DistillSettings, context: int) -> Iterator[list[int]]:
    """Window numbers of each step: epochs of seeded permutations."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = max(1, min(windows, settings.batch_tokens // context))
    queue: list[int] = []
    for _ in range(settings.steps):
        if len(queue) < size:
            queue += torch.randperm(windows, generator=generator).tolist()
        batch, queue = queue[:size], queue[size:]
        yield batch
