"""Original and student of a distillation in one model, the trained parameters, and the student's loss.

    original   a batch ─► hidden states entering each layer from the first replaced layer on, and the last states
    student               the first of these states ─► its own states, by layers with maps instead of attention
    loss       of a row:  KL(original || student) + weight * distance of intermediate hidden states; `label_weight`
               gives a share of the KL to the cross-entropy of the text's next token (Hinton et al. 2015)

One copy of the weights serves both: a replaced layer is switched between its attention and its map. Below the first
replaced layer both models are equal, so the student begins there. Only the maps have gradients.

The distance is the mean square difference between the two states entering a layer, each divided by its root mean square
(hidden-state alignment: Bick et al. 2024, MOHAWK; Romero et al. 2015, FitNets). With a few hundred thousand tokens, a
map learns more from this distance than from logits alone. The logits reach a low layer through all other layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nbl_export.errors import NblError
from nbl_export.methods.applied import multiplier_of, run_from, switched
from nbl_export.methods.base import Mixer, changed
from nbl_export.methods.modules import Wrapped
from nbl_export.model import bfloat16
from nbl_export.model.head import logits_of

__all__ = ["TeacherStates", "TeacherStudent"]

_LOGIT_ROWS = 512  # positions whose logits are held at once
_KL_ROWS = 64  # positions whose float32 distributions are held at once


@dataclass(frozen=True)
class TeacherStates:
    """Hidden states [B, T, D] of the original for a batch.

    entering: input of the first replaced layer. last: output of the final norm. middle: inputs of the layers after the
    first replaced one. next_ids: token ids [B, T - 1] that follow in the text.
    """

    entering: torch.Tensor
    last: torch.Tensor
    next_ids: torch.Tensor
    middle: tuple[torch.Tensor, ...] = ()


class TeacherStudent:
    """A causal LM of transformers (the original) and its student in one model.

    Args:
        dtype: of the products of a training step, in original and student: "fp32", "bf16" or "auto".
        rank: of the trained deltas.

    Raises:
        NblError: a layer is of a kind that is not trained.
    """

    def __init__(self, model: Any, maps: Mapping[int, Mixer], tap: str, dtype: str, rank: int, seed: int) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.tap = tap
        self.layers = self.decoder.layers
        self.first = min(maps)
        self.bf16_matmul = dtype == "bf16" or (dtype == "auto" and bfloat16.has_native_bf16(model.device))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._weights = bfloat16.Weights(model) if self.bf16_matmul else None
        generator = torch.Generator().manual_seed(seed)
        multiplier = multiplier_of(model.config)
        self.affine = nn.ModuleDict()
        self._start = dict(maps)
        for i, mixer in maps.items():
            trained = mixer.trained(rank, generator)
            if trained is None:
                raise NblError("there is nothing to train in these layers; use --fit independent")
            self.affine[str(i)] = Wrapped(trained, multiplier)
        self.affine.to(model.device)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return dict(self.affine.named_parameters())

    def maps(self) -> dict[int, Mixer]:
        """The current mixers, deltas included."""
        return {i: changed(mixer, self.affine[str(i)].linear.tensors()) for i, mixer in self._start.items()}

    def keep_only(self, layers: Collection[int]) -> None:
        """Give the other layers their attention back. States of the original made before no longer serve."""
        for i in [i for i in self._start if i not in layers]:
            del self._start[i]
            del self.affine[str(i)]
        self.first = min(self._start)

    def student(self) -> contextlib.AbstractContextManager[None]:
        """Within: replaced layers compute their maps, and layers below the first replaced one are skipped."""
        return switched(self.decoder, {int(i): m for i, m in self.affine.items()}, self.tap, self.first)

    @torch.no_grad()
    def teacher_states(self, ids_BT: torch.Tensor, *, training: bool = False) -> TeacherStates:
        """Run the original on token ids [B, T]; `middle` is filled for training only."""
        watched = range(self.first, len(self.layers) if training else self.first + 1)
        with self._watch(watched) as seen, self._products(training):
            last = self.decoder(input_ids=ids_BT.to(self.model.device), use_cache=False).last_hidden_state
        return TeacherStates(seen[0], last, ids_BT[:, 1:].to(last.device), tuple(seen[1:]))

    @contextlib.contextmanager
    def _products(self, training: bool) -> Iterator[None]:
        """Within: products in bfloat16, if a training step may use bfloat16."""
        if not training or self._weights is None:
            yield
            return
        with self._weights.used(), bfloat16.bf16_autocast(self.model.device, True):
            yield

    @contextlib.contextmanager
    def _watch(self, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        """Within: hidden states that enter these layers are recorded."""
        seen: list[torch.Tensor] = []
        hooks = [self.layers[i].register_forward_pre_hook(lambda _m, args: seen.append(args[0])) for i in layers]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def init_lora_from_gradient(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Initialise the deltas from gradients by the `whole` weights (`TrainedLinear.init_lora_from_gradient`)."""
        for index, module in self.affine.items():
            own = f"{index}.linear."
            module.linear.init_lora_from_gradient(
                {name.removeprefix(own): g for name, g in gradients.items() if name.startswith(own)}
            )

    @property
    def units(self) -> dict[str, torch.Tensor]:
        """The units of each map's delta, by name."""
        return {name: buffer for name, buffer in self.affine.named_buffers() if name.endswith(".units")}

    @torch.no_grad()
    def measure(self, teacher: TeacherStates) -> None:
        """Set the units of the deltas (`TrainedLinear.measure`) by what the student's maps read in a batch."""
        read: dict[str, torch.Tensor] = {}
        hooks = [
            module.linear.register_forward_pre_hook(lambda _m, args, index=index: read.update({index: args[0]}))
            for index, module in self.affine.items()
        ]
        try:
            with self.student():
                run_from(self.decoder, teacher.entering)
        finally:
            for hook in hooks:
                hook.remove()
        for index, module in self.affine.items():
            module.linear.measure(read[index])

    def held_kl(self, teacher: TeacherStates) -> float:
        """Mean KL over the positions of a batch, in nats and float32."""
        with torch.no_grad(), self.student():
            last = run_from(self.decoder, teacher.entering)
            return self._apart(teacher.last.flatten(0, 1), last.flatten(0, 1))[1].item()

    def gradients(
        self, teacher: TeacherStates, weight: float, label_weight: float = 0.0, *, whole: bool = False
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients of each row's loss, name -> [B, ...], and the rows' KL [B].

        Args:
            weight: of the distance of intermediate hidden states.
            label_weight: of the text's next tokens, 0 to 1; the KL has the rest.
            whole: gradients by the weights [D, D] instead of the trained deltas.
        """
        size = len(teacher.entering)
        rows: dict[str, torch.Tensor] = {}
        for index, module in self.affine.items():
            values = module.linear.values(whole)
            own = {n: p.detach().expand(size, *p.shape).requires_grad_() for n, p in values.items()}
            module.linear.rows = own
            rows |= {f"{index}.linear.{name}": parameter for name, parameter in own.items()}
        try:
            loss_B, kl_B = self._losses(teacher, weight, label_weight)
            found = torch.autograd.grad(loss_B.sum(), list(rows.values()))
        finally:
            for module in self.affine.values():
                module.linear.rows = None
        return dict(zip(rows, found, strict=True)), kl_B.detach()

    def _losses(self, teacher: TeacherStates, weight: float, label_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        watched = range(self.first + 1, len(self.layers)) if weight else range(0)
        with self.student(), self._products(training=True), self._watch(watched) as seen:
            last = run_from(self.decoder, teacher.entering)
            rows = zip(teacher.last, last, teacher.next_ids, strict=True)
            pairs = [
                self._apart(theirs, ours, ids if label_weight else None, label_weight) for theirs, ours, ids in rows
            ]
        loss_B, kl_B = (torch.stack(values) for values in zip(*pairs, strict=True))
        if not seen:
            return loss_B, kl_B
        apart = [_distance(ours, theirs) for ours, theirs in zip(seen, teacher.middle, strict=True)]
        return loss_B + weight * torch.stack(apart).mean(0), kl_B

    def _apart(
        self,
        teacher_ND: torch.Tensor,
        student_ND: torch.Tensor,
        next_N: torch.Tensor | None = None,
        label_weight: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss and mean KL over positions, of which the first have labels; `_LOGIT_ROWS` logits at a time."""
        loss, kl = (student_ND.new_zeros((), dtype=torch.float32) for _ in range(2))
        for start in range(0, len(teacher_ND), _LOGIT_ROWS):
            here = slice(start, start + _LOGIT_ROWS)
            with torch.no_grad():
                target = logits_of(self.model, teacher_ND[here])
            labels = None if next_N is None else next_N[here]
            found: tuple[torch.Tensor, torch.Tensor]
            found = _Divergence.apply(logits_of(self.model, student_ND[here]), target, labels, label_weight)
            loss = loss + found[0]
            kl = kl + found[1]
        return loss / len(teacher_ND), kl / len(teacher_ND)


class _Divergence(torch.autograd.Function):
    """KL(target || ours) of logits [N, V], summed over N, as loss and as figure.

    Labels belong to the first of the N positions. The loss of a labelled position is its cross-entropy times
    `label_weight`, plus its KL times the rest. The gradient equals the gradient of one KL to a target mixed in the same
    way: the difference of two distributions.

    All is computed in float32. On a CPU autocast leaves log_softmax in bfloat16, which turns the gradient by an eighth
    of its length (bench/EXPERIMENTS.md). A few positions are computed at a time, since V is large.
    """

    @staticmethod
    def forward(
        ctx: Any, ours_NV: torch.Tensor, target_NV: torch.Tensor, labels_L: torch.Tensor | None, label_weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        apart = torch.empty_like(ours_NV) if ctx.needs_input_grad[0] else None
        loss, kl = (torch.zeros((), dtype=torch.float32, device=ours_NV.device) for _ in range(2))
        for start in range(0, len(ours_NV), _KL_ROWS):
            here = slice(start, start + _KL_ROWS)
            log_ours, log_target = (logits[here].float().log_softmax(-1) for logits in (ours_NV, target_NV))
            share = log_target.exp()
            kl_N = log_target.sub_(log_ours).mul_(share).sum(-1)
            kl += kl_N.sum()
            labels = ours_NV.new_empty(0, dtype=torch.long) if labels_L is None else labels_L[here]
            known = (torch.arange(len(labels), device=labels.device), labels)
            kl_N[: len(labels)] *= 1 - label_weight
            loss += kl_N.sum() - label_weight * log_ours[known].sum()
            if apart is not None:
                share[: len(labels)] *= 1 - label_weight
                share[known] += label_weight
                apart[here] = log_ours.exp_().sub_(share)
        if apart is not None:
            ctx.save_for_backward(apart)
        ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (apart,) = ctx.saved_tensors
        return apart * above[0], None, None, None


def _distance(ours_BTD: torch.Tensor, theirs_BTD: torch.Tensor) -> torch.Tensor:
    """Mean square difference of hidden states scaled to root mean square 1, by row: [B]."""
    ours, theirs = (nn.functional.rms_norm(h.float(), h.shape[-1:], eps=1e-6) for h in (ours_BTD, theirs_BTD))
    return (ours - theirs).square().mean((1, 2))
