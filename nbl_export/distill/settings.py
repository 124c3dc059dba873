"""Settings, text, surroundings and result of a distillation, and an unfinished one on disk.

DIR/distill.partial.safetensors    parameters.*, optimizer.*, best.*; metadata: key, facts (JSON), and sha256 of all
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nbl_export.files import arrays_sha256, key_of, replacing
from nbl_export.mixers.base import Mixer
from nbl_export.parallel.ranks import ALONE, Ranks

__all__ = ["AIMING", "DEFAULT_STEPS", "UNLIMITED", "Callbacks", "DistillSettings", "Distilled", "State", "TrainingText"]

DEFAULT_STEPS = 320
UNLIMITED = 1_000_000  # steps, if minutes are given
AIMING = 0.05  # share of the steps or minutes that `aim` takes before the first step


@dataclass(frozen=True)
class DistillSettings:
    """How maps are trained.

    Attributes:
        steps: optimizer steps.
        minutes: time limit; None for no limit. A run that the clock ends is not repeatable.
        learning_rate: at the start, in units of each map (`distill.trained_map`). The rate falls to zero along a cosine
            over the steps or the minutes, whichever are nearer to their end.
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
            0.1 costs 1% of the KL, 0.2 up to 7% (docs/experiments.md).
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

    @property
    def kept_every(self) -> int:
        """Steps between two saves."""
        return max(1, self.check_every // 2)

    @property
    def aimed(self) -> int:
        """Most batches whose gradients initialise low-rank deltas: a twentieth of the steps, 16 at most."""
        return max(1, min(16, int(AIMING * self.steps)))


@dataclass
class Distilled:
    """The best maps, held-back KL by step (0 is the start), and training KL by step, in nats."""

    maps: dict[int, Mixer]
    held_kl: list[tuple[int, float]] = field(default_factory=list)
    train_kl: list[float] = field(default_factory=list)
    seconds: float = 0.0


class State:
    """A training run between its steps, in a file.

    Args:
        key: fingerprint of everything that the run depends on. A damaged file, or one with another key, is ignored.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Tensors and facts; None if the file is ignored or missing."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                said = file.metadata() or {}
                if said.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whole = said["sha256"] == _hash({name: tensor.numpy() for name, tensor in tensors.items()}, said["facts"])
            return (tensors, json.loads(said["facts"])) if whole else None
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def save(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Replace the file, complete or not at all."""
        from safetensors.numpy import save as serialised

        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
        said = {"key": self.key, "facts": json.dumps(facts)}
        with replacing(self.path) as stream:
            stream.write(serialised(arrays, metadata={**said, "sha256": _hash(arrays, said["facts"])}))


def _hash(arrays: dict[str, Any], facts: str) -> str:
    return key_of(arrays_sha256(arrays), facts)


@dataclass(frozen=True)
class TrainingText:
    """Token ids [windows, context] to train on, and held-back ids to judge maps by."""

    windows_WT: torch.Tensor
    held_WT: torch.Tensor


@dataclass(frozen=True)
class Callbacks:
    """Progress, log, storage and processes of a training run.

    Attributes:
        progress: called with thousandths of the run done, and 1000.
        say: takes a line of log.
        state: stores the run at every check, and halfway between two checks.
        peers: processes that train together, with equal arguments; progress, say and state are process 0's alone. Each
            process reads its rows of every step, and its held-back windows.
    """

    progress: Callable[[int, int], None] = lambda _done, _total: None
    say: Callable[[str], None] = lambda _line: None
    state: State | None = None
    ranks: Ranks = ALONE
