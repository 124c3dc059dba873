"""Trains only the maps, against the original model's logits.

    start      closed-form maps of the plan
    loss       KL(original || NBL) in nats over all positions and the whole vocabulary, mixed with the cross-entropy of
               the text's next tokens (label_weight), plus the distance of intermediate hidden
               states (`methods.distill.teacher_student`)
    kept       the maps with the lowest held-back KL; the closed-form maps if training never improved on them

With `drops_layers`, more layers than a limit on quality allows may begin. After `DROP_AT` of the run, the caller says
which of them stay. The others get their attention back, and the rest of the run trains the maps that stay.

Three choices reduce overfitting (bench/EXPERIMENTS.md): the loss on intermediate hidden states, low-rank deltas, and
short rows divided anew in each epoch. Attention uses the first token of a row as a sink, which shapes the whole
row. Without new rows the maps would see the same few hundred first tokens in every epoch.

A low-rank delta `up down` begins with `up` at zero. `down` begins at the first right singular vectors of the whole
matrix's gradient (Wang et al. 2024, LoRA-GA, who also set `up` by the gradient). R random directions would see only R
of the gradient's D parts at first.

Gradients are clipped row by row. A row whose sink is about to be lost or found has a gradient up to a hundred times as
large as other rows. Clipped together with other rows, such a row would dominate the step.

bfloat16 serves only the products of a training step, of original and student (autocast). The residual stream, norms,
softmax, maps and all held-back figures are float32.

Processes of one command (`model.processes`) share the rows of a step and the held-back rows. Each of them then has the
gradients of all rows and takes the same step, at the clock of rank 0. Rows of a step are few, so more processes than
rows do not help. Every process aims the deltas by itself, since gradients of whole matrices are large.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.methods.base import Mixer, changed
from nbl_export.methods.distill.state import State
from nbl_export.methods.distill.teacher_student import TeacherStudent
from nbl_export.model import processes
from nbl_export.options.goals import DEFAULT_STEPS

__all__ = ["DROP_AT", "LORA_INIT_SHARE", "UNLIMITED", "Callbacks", "DistillSettings", "Distilled", "distill"]

UNLIMITED = 1_000_000  # steps, if minutes are given
LORA_INIT_SHARE = 0.05  # share of the steps or minutes that `init_lora_from_gradient` takes before the first step
DROP_AT = 0.4  # share of the steps or minutes after which layers are given back

_CLIP = 1.0  # largest norm of a row's gradient
# Training rolls back if the mean KL of so many steps is this many times the KL at the start. The rate then falls.
_RECENT = 5
_AWAY = 1.5
_SLOWER = 0.25


@dataclass(frozen=True)
class DistillSettings:
    """How maps are trained.

    Attributes:
        steps: optimizer steps.
        minutes: time limit; None for no limit. A run that the clock ends is not repeatable.
        learning_rate: at the start, in units of each map (`methods.base.Kind.trained`). The rate falls to zero along a
            cosine over the steps or the minutes, whichever are nearer to their end.
        batch_tokens: tokens of a step.
        window: most tokens of a training row.
        check_every: steps between two checks of held-back KL. A check takes as long as three steps on a CPU. The run
            is saved twice as often.
        patience: share of the run without improvement after which training stops. Held-back KL goes up and down while
            the rate is high, and falls most as the rate falls.
        dtype: "fp32", "bf16", or "auto": bf16 if the processor multiplies bfloat16 natively.
        lora_rank: rank of the trained delta, which is then added to the map (Hu et al. 2022, LoRA).
        hidden_weight: weight of the hidden states' distance, beside the KL; 0 leaves the distance out.
        label_weight: share of the KL, 0 to 1, that the cross-entropy of the text's next tokens replaces (Hinton et al.
            2015). Near the lowest KL a small share raises KL in second order and lowers perplexity in first order.
            0.1 costs 1% of the KL, 0.2 up to 7% (bench/EXPERIMENTS.md).
        drops_layers: whether `Callbacks.drop_layers` says which layers stay.
    """

    steps: int = DEFAULT_STEPS
    minutes: float | None = None
    learning_rate: float = 1e-2
    batch_tokens: int = 1024
    window: int = 256
    check_every: int = 80
    patience: float = 0.5
    seed: int = 0
    dtype: str = "fp32"
    lora_rank: int = 16
    hidden_weight: float = 0.3
    label_weight: float = 0.1
    drops_layers: bool = False

    @property
    def kept_every(self) -> int:
        """Steps between two saves."""
        return max(1, self.check_every // 2)

    @property
    def lora_init_batches(self) -> int:
        """Most batches whose gradients initialise low-rank deltas: a twentieth of the steps, 16 at most."""
        return max(1, min(16, int(LORA_INIT_SHARE * self.steps)))


@dataclass
class Distilled:
    """The best maps, held-back KL by step (0 is the start), and training KL by step, in nats.

    dropped_at: place in `held_kl` from which on the figures are of the layers that stayed.
    """

    maps: dict[int, Mixer]
    held_kl: list[tuple[int, float]] = field(default_factory=list)
    train_kl: list[float] = field(default_factory=list)
    seconds: float = 0.0
    dropped_at: int = 0


@dataclass(frozen=True)
class Callbacks:
    """Progress, log and storage of a training run.

    Attributes:
        progress: called with thousandths of the run done, and 1000.
        say: takes a line of log.
        state: stores the run at every check, and halfway between two checks.
        drop_layers: takes the current maps; returns the layers that stay.
    """

    progress: Callable[[int, int], None] = lambda _done, _total: None
    say: Callable[[str], None] = lambda _line: None
    state: State | None = None
    drop_layers: Callable[[dict[int, Mixer]], Collection[int]] | None = None


class _Training:
    """Optimizer, best maps so far, and everything that a run needs to resume after a kill."""

    def __init__(self, pair: TeacherStudent, settings: DistillSettings, held_WT: torch.Tensor) -> None:
        self.pair = pair
        self.settings = settings
        self._held_WT = held_WT
        self.fraction = 0.0
        self.slowed = 1.0
        self.step = 0
        self.best_at = 0.0
        self.rolled_back_at = 0
        self._earlier = 0.0
        self._started = time.monotonic()
        self.result = Distilled(pair.maps())
        self.dropped = not settings.drops_layers
        self._weights = settings.hidden_weight, settings.label_weight
        self._build_optimizer()

    def _build_optimizer(self) -> None:
        """Make optimizer and held-back states for the layers that the student replaces."""
        own = processes.rank_slice(len(self._held_WT))
        self._held = {row: self.pair.teacher_states(self._held_WT[row : row + 1]) for row in own}
        parameters = self.pair.trained.values()
        rate = self.settings.learning_rate
        self.optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.99))
        self._set_rate()
        self.keep()

    def drop_layers(self, layers: Collection[int]) -> None:
        """Train only these layers from here on; they keep what the optimizer knows of them."""
        known = self.optimizer.state
        self.dropped = True
        self.pair.keep_only(layers)
        self._build_optimizer()
        self.optimizer.state.update({p: known[p] for p in self.pair.trained.values() if p in known})
        self.result.maps = self.pair.maps()
        self.result.dropped_at = len(self.result.held_kl)
        self.best_at = self.fraction
        self.rolled_back_at = self.step
        self.result.held_kl.append((self.step, self._held_kl()))

    @property
    def held_kl(self) -> list[float]:
        """Held-back KL of the layers that are trained now, the first at their start."""
        return [kl for _, kl in self.result.held_kl[self.result.dropped_at :]]

    def keep(self) -> None:
        """Keep the parameters as those to go back to."""
        self._kept = {name: p.detach().clone() for name, p in self.pair.trained.items()}

    def rollback(self) -> bool:
        """Go back to the kept parameters at a lower rate if the training KL has run away; returns whether it had.

        A rate that suits one model can be too high for another, although it is in units of each map.
        """
        recent = self.result.train_kl[-_RECENT:]
        away = not sum(recent) / _RECENT <= _AWAY * self.held_kl[0]  # NaN too
        if not away or self.step - self.rolled_back_at < _RECENT:
            return False
        with torch.no_grad():
            for name, parameter in self.pair.trained.items():
                parameter.copy_(self._kept[name])
        self.optimizer.state.clear()
        self.slowed *= _SLOWER
        self.rolled_back_at = self.step
        self.best_at = self.fraction
        self._set_rate()
        return True

    def _set_rate(self) -> None:
        """Let the learning rate fall along a cosine."""
        share = self.slowed * 0.5 * (1 + math.cos(math.pi * min(1.0, self.fraction)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * share

    @property
    def seconds(self) -> float:
        """Time used, including the time of killed runs."""
        return self._earlier + time.monotonic() - self._started

    def _look_at_the_clock(self) -> None:
        """Update the share of steps or minutes used."""
        limit = self.settings.minutes
        by_time = float(processes.broadcast_str(repr(self.seconds / (limit * 60)))) if limit else 0.0
        self.fraction = max(self.step / self.settings.steps, by_time)

    def begin(self, state: State | None) -> None:
        """Resume the saved run, or judge the start."""
        saved = state.load() if state else None
        step = str(saved[1]["step"] if saved else 0)
        if processes.broadcast_str(step) != step:
            raise NblError(
                f"rank {processes.rank()} does not see the saved training that rank 0 sees; give all the same --output"
            )
        if saved is not None:
            self._restore(*saved)
            return
        start = self._held_kl()
        if not math.isfinite(start):
            raise NblError("distillation cannot start: the closed-form maps give logits that are not finite")
        self.result.held_kl.append((0, start))

    def init_lora_from_gradient(self, batches: Iterable[torch.Tensor]) -> None:
        """Initialise the deltas from the gradients of some batches, within the share `LORA_INIT_SHARE` of the run."""
        total: dict[str, torch.Tensor] = {}
        for ids_BT in batches:
            teacher = self.pair.teacher_states(ids_BT, training=True)
            rows, _ = self.pair.gradients(teacher, *self._weights, whole=True)
            for name, gradient in _clipped_mean(rows).items():
                total[name] = total[name] + gradient if name in total else gradient
            self._look_at_the_clock()
            if self.fraction >= LORA_INIT_SHARE:
                break
        self.pair.init_lora_from_gradient(total)
        self.pair.measure(teacher)
        self.keep()

    def _gradients(self, ids_BT: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients of each row's loss, name -> [B, ...], and the rows' KL [B]; this process computes its own rows."""
        size = len(ids_BT)
        mine = processes.rank_slice(len(ids_BT))
        rows = {name: p.detach().new_zeros(size, *p.shape) for name, p in self.pair.trained.items()}
        kl_B = next(iter(rows.values())).new_zeros(size)
        if mine:
            own = slice(mine.start, mine.stop, mine.step)
            found, kl_B[own] = self.pair.gradients(self.pair.teacher_states(ids_BT[own], training=True), *self._weights)
            for name, gradient in found.items():
                rows[name][own] = gradient
        for value in (*rows.values(), kl_B):
            processes.all_reduce_sum(value)  # exact: a row is zeros in every other process
        return rows, kl_B

    def advance(self, ids_BT: torch.Tensor) -> None:
        """One optimizer step on token ids [B, T]."""
        rows, kl_B = self._gradients(ids_BT)
        gradients = _clipped_mean(rows)
        for name, parameter in self.pair.trained.items():
            parameter.grad = gradients[name]
        self.optimizer.step()
        self.step += 1
        self._look_at_the_clock()
        self._set_rate()
        self.result.train_kl.append(kl_B.mean().item())

    def judge(self) -> float:
        """Measure held-back KL, and keep the maps if this KL is the lowest so far."""
        found = self._held_kl()
        best = min(self.held_kl)
        self.result.held_kl.append((self.step, found))
        if found < best:
            self.result.maps = self.pair.maps()
            self.best_at = self.fraction
            self.keep()
        return found

    @property
    def over(self) -> bool:
        """Whether steps, time or patience are used up."""
        return self.fraction >= 1.0 or self.fraction - self.best_at >= self.settings.patience

    def _held_kl(self) -> float:
        values_W = torch.zeros(len(self._held_WT), dtype=torch.float64)
        for row, teacher in self._held.items():
            values_W[row] = self.pair.held_kl(teacher)
        return processes.all_reduce_sum(values_W).mean().item()

    def save(self, state: State) -> None:
        tensors = {f"parameters.{name}": p.detach() for name, p in self.pair.trained.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        for i, best in self.result.maps.items():
            tensors |= {f"best.{i}.{name}": torch.from_numpy(array) for name, array in best.tensors().items()}
        tensors |= {f"kept.{name}": value for name, value in self._kept.items()}
        tensors |= {f"units.{name}": value for name, value in self.pair.units.items()}
        facts = {
            "held_kl": self.result.held_kl,
            "train_kl": self.result.train_kl,
            "best_at": self.best_at,
            "slowed": self.slowed,
            "rolled_back_at": self.rolled_back_at,
            "dropped": self.dropped,
            "since": self.result.dropped_at,
            "layers": list(self.result.maps),
            "step": self.step,
            "seconds": self.seconds,
        }
        state.save(tensors, facts)

    def _restore(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        self.dropped = facts["dropped"]
        self.result.dropped_at = facts["since"]
        if set(facts["layers"]) != set(self.result.maps):
            self.pair.keep_only(facts["layers"])
            self._build_optimizer()
            self.result.maps = self.pair.maps()
        with torch.no_grad():
            for name, parameter in self.pair.trained.items():
                parameter.copy_(tensors[f"parameters.{name}"])
            for name, units in self.pair.units.items():
                units.copy_(tensors[f"units.{name}"])
        self._kept = {name: tensors[f"kept.{name}"] for name in self.pair.trained}
        self.slowed = facts["slowed"]
        self.rolled_back_at = facts["rolled_back_at"]
        state = self.optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)
        self.result.maps = {
            i: changed(
                mixer,
                {n.removeprefix(f"best.{i}."): v.numpy() for n, v in tensors.items() if n.startswith(f"best.{i}.")},
            )
            for i, mixer in self.result.maps.items()
        }
        self.result.held_kl = [(int(step), float(kl)) for step, kl in facts["held_kl"]]
        self.result.train_kl = [float(kl) for kl in facts["train_kl"]]
        self.step = facts["step"]
        self.best_at = facts["best_at"]
        self._earlier = facts["seconds"]
        self._look_at_the_clock()
        self._set_rate()


def distill(
    model: Any,
    maps: Mapping[int, Mixer],
    tap: str,
    windows_WT: torch.Tensor,
    held_WT: torch.Tensor,
    settings: DistillSettings,
    around: Callbacks = Callbacks(),
) -> Distilled:
    """Train the maps of `model`; the model itself is unchanged afterwards.

    Without a time limit the result is deterministic for a seed on one machine, also after a kill and a resume.

    Args:
        windows_WT: token ids [windows, context] to train on.
        held_WT: held-back ids [windows, context] to judge maps by.

    Raises:
        NblError: no map or no held-back text is given, or the loss is not finite at the start.
    """
    if not maps or not len(held_WT):
        raise NblError("distillation needs at least one replaced layer and some held-back text")
    state = around.state
    pair = TeacherStudent(model, maps, tap, settings.dtype, settings.lora_rank, settings.seed)
    training = _Training(pair, settings, held_WT)
    training.begin(state)
    if training.step == 0:
        training.init_lora_from_gradient(itertools.islice(_batches(windows_WT, settings), settings.lora_init_batches))
    for number, batch_BT in enumerate(_batches(windows_WT, settings)):
        if number < training.step:
            continue
        if training.over:
            break
        training.advance(batch_BT)
        around.progress(min(1000, round(1000 * training.fraction)), 1000)
        if training.rollback():
            around.say(
                f"step {training.step}: KL runs away; back to the best maps at {training.slowed:.2g} of the rate"
            )
        checked = training.step % settings.check_every == 0 or training.over
        drops_layers = not training.dropped and training.fraction >= DROP_AT
        if drops_layers:
            training.drop_layers(around.drop_layers(pair.maps()) if around.drop_layers else pair.maps())
        elif checked:
            found = training.judge()
            around.say(
                f"step {training.step}, {training.seconds / 60:.1f} min: KL {training.result.train_kl[-1]:.4f}, "
                f"held back {found:.4f} (start {training.held_kl[0]:.4f})"
            )
        if state and processes.is_rank0() and (drops_layers or checked or training.step % settings.kept_every == 0):
            training.save(state)
    training.result.seconds = training.seconds
    return training.result


def _clipped_mean(rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mean of the rows' clipped gradients; name -> [B, ...] becomes name -> [...]."""
    norm_B = torch.stack([g.flatten(1).square().sum(1) for g in rows.values()]).sum(0).sqrt()
    share_B = (_CLIP / norm_B).clamp(max=1.0) / len(norm_B)
    return {name: torch.tensordot(share_B, g, 1) for name, g in rows.items()}


def _batches(windows_WT: torch.Tensor, settings: DistillSettings) -> Iterator[torch.Tensor]:
    """Token ids [B, T] of each step. Each epoch divides the text anew from a random offset, and shuffles the rows."""
    generator = torch.Generator().manual_seed(settings.seed)
    text = windows_WT.flatten()
    length = min(settings.window, windows_WT.shape[1])
    size = max(1, min(len(text) // length - 1, settings.batch_tokens // length))
    queue: list[torch.Tensor] = []
    for _ in range(settings.steps):
        while len(queue) < size:
            start = int(torch.randint(length, (1,), generator=generator)) if len(text) > length else 0
            rows = text[start : start + (len(text) - start) // length * length].view(-1, length)
            queue += list(rows[torch.randperm(len(rows), generator=generator)])
        batch = queue[:size]
        queue = queue[size:]
        yield torch.stack(batch)
