"""Trains the maps, and nothing else, against the original model's own logits.

    start      closed-form maps of the plan
    loss       KL(original || NBL) over all positions and the whole vocabulary, in nats, mixed with the text's own
               next tokens (label_weight), and how far apart the hidden states are on the way (`distill_model`)
    kept       the maps with the lowest KL on held-back text; those of the start if nothing was better

Three choices against learning the text by heart (bench/README.md): the hidden states on the way; maps that are changed
by deltas of low rank; and text that is cut anew in every epoch into short rows. The first token of a row is what
attention rests on (a sink) and shapes the whole row; the same few hundred first tokens again and again would be all
that the maps know of it.

A delta up down of low rank begins with up at zero and down at the first right singular vectors of the whole matrix's
gradient (Wang et al. 2024, LoRA-GA, who set up by it too), since R random directions see R of D parts of it at first.

Gradients are clipped row by row. A row whose sink is about to be lost or found has a gradient up to a hundred times
that of the others, and clipped with them it would be all that a step heard of.

bfloat16 is for the products of a training step alone, the original's and the student's (autocast: the residual stream,
norms, softmax and the maps themselves stay float32), and never for what is judged: held-back figures are float32.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nbl_export.distill_model import Lesson, Twin
from nbl_export.distributed import ALONE, Peers
from nbl_export.errors import NblError
from nbl_export.records import AffineMap

__all__ = ["DEFAULT_STEPS", "UNLIMITED", "DistillSettings", "Distilled", "State", "distill"]

DEFAULT_STEPS = 320
UNLIMITED = 1_000_000  # steps, where minutes are given
_CLIP = 1.0  # norm of a row's gradient, at most
_AIMING = 0.05  # of the steps, or of the minutes, before the first step


@dataclass(frozen=True)
class DistillSettings:
    """How to train.

    steps: optimizer steps. minutes: stop earlier when this much time is used (None: no limit; a run that a clock ends
    is not repeatable). A step sees batch_tokens tokens. The rate falls from learning_rate (None: 1e-2 for deltas of low
    rank, 1e-3 for whole matrices; bench/README.md) to nothing along a cosine over the steps or the minutes, whichever
    are nearer to their end. window: tokens of a training row, at most. patience: share of the run after which it is
    over where nothing was better; while the rate is high held-back KL goes up and down, and most is gained as it falls.
    check_every: steps between two judgements, which take as long as three steps each on a CPU; the run is kept twice
    as often.
    hidden_weight: of the distance of the hidden states, beside the KL; 0 leaves it out. label_weight: how much of the
    KL gives way to the cross-entropy of the text's own next tokens (Hinton et al. 2015), 0 to 1. Near the lowest KL a
    little of it costs KL in second order and gains perplexity in first: 0.1 costs 1% of the KL, 0.2 up to 7%
    (bench/README.md). weight_decay: of the deltas.
    dtype: "fp32", "bf16", or "auto": bf16 where the processor multiplies it natively. lora_rank: train a delta of that
    rank on each map, which is added to it afterwards (Hu et al. 2022, LoRA), instead of the whole matrix (None).
    """

    steps: int = DEFAULT_STEPS
    minutes: float | None = None
    learning_rate: float | None = None
    batch_tokens: int = 1024
    window: int = 256
    check_every: int = 80
    patience: float = 0.5
    seed: int = 0
    dtype: str = "fp32"
    lora_rank: int | None = 16
    hidden_weight: float = 0.3
    label_weight: float = 0.1
    weight_decay: float = 0.0

    @property
    def rate(self) -> float:
        """Of learning, at the start."""
        return (1e-2 if self.lora_rank else 1e-3) if self.learning_rate is None else self.learning_rate

    @property
    def kept_every(self) -> int:
        """Steps between two savings."""
        return max(1, self.check_every // 2)

    @property
    def aimed(self) -> int:
        """Batches whose gradients say where deltas of low rank begin, at most: a twentieth of the steps, or 16."""
        return max(1, min(16, int(_AIMING * self.steps)))


@dataclass
class Distilled:
    """The best maps and how they came about: held-back KL by step (0 is the start), training KL by step."""

    maps: dict[int, AffineMap]
    held_kl: list[tuple[int, float]] = field(default_factory=list)
    train_kl: list[float] = field(default_factory=list)
    seconds: float = 0.0


class State(Protocol):
    """Where a training run is kept between its steps."""

    def load(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """Tensors and facts of an earlier, unfinished run of the same inputs; None where there is none."""

    def save(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        """Keep them instead of what was there."""


class _Training:
    """Optimizer, best maps so far, and everything that a run needs to go on from where it was killed."""

    def __init__(self, twin: Twin, settings: DistillSettings, held: list[Lesson], peers: Peers) -> None:
        self.twin, self.settings, self.held, self.peers = twin, settings, held, peers
        self.fraction = 0.0
        self.step, self.best_at = 0, 0.0
        self._earlier, self._started = 0.0, time.monotonic()
        deltas = {name: p for name, p in twin.trained.items() if name.rpartition(".")[2] in ("up", "down")}
        others = [p for name, p in twin.trained.items() if name not in deltas]  # zero is no place to go back to
        groups: list[dict[str, Any]] = [{"params": others}]
        if deltas:
            groups.append({"params": list(deltas.values()), "weight_decay": settings.weight_decay})
        self.optimizer = torch.optim.AdamW(groups, lr=settings.rate, weight_decay=0.0, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda _: 0.5 * (1 + math.cos(math.pi * min(1.0, self.fraction)))
        )
        self.result = Distilled(twin.maps())

    @property
    def seconds(self) -> float:
        """Time used, that of killed runs included."""
        return self._earlier + time.monotonic() - self._started

    def _look_at_the_clock(self) -> None:
        """How much of the steps or minutes is used, by the clock of process 0."""
        limit = self.settings.minutes
        by_time = self.peers.share(self.seconds / (limit * 60)) if limit else 0.0
        self.fraction = max(self.step / self.settings.steps, by_time)

    def begin(self, state: State | None) -> None:
        """Go on with what was saved, or judge the start."""
        saved = self.peers.share(state.load() if state else None)
        if saved is not None:
            self._restore(*saved)
            return
        start = self._held_kl()
        if not math.isfinite(start):
            raise NblError("distillation cannot start: the closed-form maps give logits that are not finite")
        self.result.held_kl.append((0, start))

    def aim(self, lessons: Iterable[Lesson]) -> None:
        """Before the first step: deltas read what the gradients of some batches read; of minutes a share is for it."""
        total: dict[str, torch.Tensor] = {}
        for lesson in lessons:
            for name, gradient in self._gradients(lesson, whole=True)[0].items():
                total[name] = total[name] + gradient if name in total else gradient
            self._look_at_the_clock()
            if self.fraction >= _AIMING:
                break
        self.twin.aim(total)

    def _gradients(self, lesson: Lesson, whole: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Mean of the rows' gradients, each clipped, over all processes, and the KL [B] of the rows here."""
        weights = self.settings.hidden_weight, self.settings.label_weight
        found, kl_B = self.twin.gradients(lesson, *weights, whole=whole)
        norm_B = torch.stack([g.flatten(1).square().sum(1) for g in found.values()]).sum(0).sqrt()
        share_B = (_CLIP / norm_B).clamp(max=1.0) / len(norm_B)
        gradients = {name: torch.tensordot(share_B, g, 1) for name, g in found.items()}
        self.peers.average(list(gradients.values()))
        return gradients, kl_B

    def advance(self, lesson: Lesson) -> None:
        """One optimizer step."""
        gradients, kl_B = self._gradients(lesson)
        for name, parameter in self.twin.trained.items():
            parameter.grad = gradients[name]
        self.optimizer.step()
        self.step += 1
        self._look_at_the_clock()
        self.schedule.step()
        self.result.train_kl.append(kl_B.mean().item())

    def judge(self) -> float:
        """Hold the maps against held-back text, and keep them if nothing before was better."""
        found = self._held_kl()
        best = min(kl for _, kl in self.result.held_kl)
        self.result.held_kl.append((self.step, found))
        if found < best:
            self.result.maps, self.best_at = self.twin.maps(), self.fraction
        return found

    @property
    def over(self) -> bool:
        """No steps, time or patience left."""
        return self.fraction >= 1.0 or self.fraction - self.best_at >= self.settings.patience

    def _held_kl(self) -> float:
        values = [self.twin.held_kl(lesson) for lesson in self.held]
        total, count = self.peers.add(sum(values), len(values))
        return total / count

    def save(self, state: State) -> None:
        tensors = {f"parameters.{name}": p.detach() for name, p in self.twin.trained.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        for i, best in self.result.maps.items():
            tensors |= {
                f"best.{i}.weight": torch.from_numpy(best.weight),
                f"best.{i}.bias": torch.from_numpy(best.bias),
            }
        kept = {"held_kl": self.result.held_kl, "train_kl": self.result.train_kl, "best_at": self.best_at}
        state.save(tensors, {**kept, "step": self.step, "seconds": self.seconds})

    def _restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.twin.trained.items():
                parameter.copy_(tensors[f"parameters.{name}"])
        state = self.optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)
        self.result.maps = {
            i: AffineMap(tensors[f"best.{i}.weight"].numpy(), tensors[f"best.{i}.bias"].numpy())
            for i in self.result.maps
        }
        self.result.held_kl = [(int(step), float(kl)) for step, kl in facts["held_kl"]]
        self.result.train_kl = [float(kl) for kl in facts["train_kl"]]
        self.step, self.best_at, self._earlier = facts["step"], facts["best_at"], facts["seconds"]
        self._look_at_the_clock()
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * self.schedule.lr_lambdas[0](self.step)


def distill(
    model: Any,
    maps: Mapping[int, AffineMap],
    windows_WT: torch.Tensor,
    held_WT: torch.Tensor,
    settings: DistillSettings,
    progress: Callable[[int, int], None],
    tap: str = "residual",
    say: Callable[[str], None] = lambda _line: None,
    state: State | None = None,
    peers: Peers = ALONE,
) -> Distilled:
    """Train the maps of `model`, which comes back as it was. With steps alone deterministic for a seed on one machine,
    also when it was killed and went on.

    Args:
        windows_WT, held_WT: token ids [windows, context] to train on and to judge by.
        state: keeps the run at every check, and between two.
        peers: processes that do this together, each with the same arguments but for progress, say and state, which
            are of process 0; each reads its rows of every step, and its held-back windows.

    Raises:
        NblError: there is nothing to train, or the loss is not finite from the start.
    """
    if not maps or not len(held_WT):
        raise NblError("distillation needs at least one replaced layer and some held-back text")
    twin = Twin(model, maps, tap, settings.dtype, settings.lora_rank, settings.seed)
    training = _Training(twin, settings, [twin.lesson(row[None]) for row in held_WT[peers.rank :: peers.size]], peers)
    training.begin(state)
    start = training.result.held_kl[0][1]
    if training.step == 0 and settings.lora_rank:
        first = itertools.islice(_batches(windows_WT, settings, peers.size), settings.aimed)
        training.aim(twin.lesson(batch_BT[peers.rank :: peers.size], training=True) for batch_BT in first)
    for number, batch_BT in enumerate(_batches(windows_WT, settings, peers.size)):
        if number < training.step:
            continue
        if training.over:
            break
        training.advance(twin.lesson(batch_BT[peers.rank :: peers.size], training=True))
        progress(round(1000 * training.fraction), 1000)
        checked = training.step % settings.check_every == 0 or training.over
        if checked:
            found = training.judge()
            say(
                f"step {training.step}, {training.seconds / 60:.1f} min: KL {training.result.train_kl[-1]:.4f}, "
                f"held back {found:.4f} (start {start:.4f})"
            )
        if state and (checked or training.step % settings.kept_every == 0):
            training.save(state)
    training.result.seconds = training.seconds
    return training.result


def _batches(windows_WT: torch.Tensor, settings: DistillSettings, multiple: int = 1) -> Iterator[torch.Tensor]:
    """Token ids [B, T] of each step: the text cut anew in each epoch, from a place of its own, in a random order.

    B is a multiple of `multiple`, of which each process has as many rows.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    text, length = windows_WT.flatten(), min(settings.window, windows_WT.shape[1])
    size = max(1, min(len(text) // length - 1, settings.batch_tokens // length))
    size = -(-size // multiple) * multiple
    queue: list[torch.Tensor] = []
    for _ in range(settings.steps):
        while len(queue) < size:
            start = int(torch.randint(length, (1,), generator=generator)) if len(text) > length else 0
            rows = text[start : start + (len(text) - start) // length * length].view(-1, length)
            queue += list(rows[torch.randperm(len(rows), generator=generator)])
        batch, queue = queue[:size], queue[size:]
        yield torch.stack(batch)
