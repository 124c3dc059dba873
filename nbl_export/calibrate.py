"""Hooks on the torch model -> moments of every layer. Activations are never kept.

Per batch and layer the products X'X, Y'X, Y'Y are float32 matrix products over at most `_BLOCK` rows, added
up in float64. Two facts keep them as good as float64 throughout (a test holds the fitted maps to 1e-4):
  - a few tokens carry a residual norm a hundred times the median ("massive activations"); their rows are
    multiplied in float64,
  - rows are shifted by a fixed reference row, which is undone in float64 at the end.
The logits are never computed: the base decoder is run, not the language-model head.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import CorruptError, NblError
from nbl_export.lmmse import Moments

__all__ = ["collect", "load_moments", "save_moments"]

_BATCH_TOKENS = 4096
_BLOCK = 4096
_MASSIVE = 4.0  # times the median row norm
_FIELDS = ("x_sum", "y_sum", "xx", "yx", "yy")


class _Accumulator:
    """Moments of one layer, relative to a reference row (`shift`)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.shift_x: torch.Tensor | None = None
        self.shift_y: torch.Tensor | None = None
        self.x_sum, self.y_sum = torch.zeros(2, size, dtype=torch.float64)
        self.xx, self.yx, self.yy = torch.zeros(3, size, size, dtype=torch.float64)

    def update(self, x_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        norms = x_ND.norm(dim=1)
        massive = norms > _MASSIVE * norms.median()
        if self.shift_x is None or self.shift_y is None:
            self.shift_x, self.shift_y = x_ND[~massive].mean(0), y_ND[~massive].mean(0)
        self.count += x_ND.shape[0]
        x_ND, y_ND = x_ND - self.shift_x, y_ND - self.shift_y
        if massive.any():
            self._add(x_ND[massive].double(), y_ND[massive].double())
            x_ND[massive], y_ND[massive] = 0, 0  # zero rows add nothing, and leave the others where they are
        for x, y in zip(x_ND.split(_BLOCK), y_ND.split(_BLOCK), strict=True):
            self._add(x, y)

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x_sum += x.sum(0, dtype=torch.float64)
        self.y_sum += y.sum(0, dtype=torch.float64)
        self.xx += x.T @ x
        self.yx += y.T @ x
        self.yy += y.T @ y

    def moments(self) -> Moments:
        """Undo the shift: sum (x + s)(x + s)' = X'X + s Sx' + Sx s' + n s s', and likewise for the others."""
        assert self.shift_x is not None and self.shift_y is not None
        s, t, n = self.shift_x.double(), self.shift_y.double(), self.count
        return Moments(
            count=n,
            x_sum=self.x_sum + n * s,
            y_sum=self.y_sum + n * t,
            xx=self.xx + torch.outer(s, self.x_sum) + torch.outer(self.x_sum, s) + n * torch.outer(s, s),
            yx=self.yx + torch.outer(t, self.x_sum) + torch.outer(self.y_sum, s) + n * torch.outer(t, s),
            yy=self.yy + torch.outer(t, self.y_sum) + torch.outer(self.y_sum, t) + n * torch.outer(t, t),
        )


def collect(
    model: Any,
    ids_WT: torch.Tensor,
    progress: Callable[[int, int], None],
    taps: Sequence[str] = ("residual",),
) -> dict[str, list[Moments]]:
    """Moments of every decoder layer over windows of token ids, for each tap (`records.TAPS`).

    Args:
        model: a causal LM of transformers, float32.
        ids_WT: token ids [windows, context].
        progress: called with tokens done and tokens in all.

    Raises:
        NblError: a layer's activations are not finite.
    """
    decoder = model.get_decoder()
    accumulators = {tap: [_Accumulator(model.config.hidden_size) for _ in decoder.layers] for tap in taps}
    handles = [
        handle
        for tap, found in accumulators.items()
        for layer, accumulator in zip(decoder.layers, found, strict=True)
        for handle in _attach(layer, accumulator, tap)
    ]
    try:
        with torch.inference_mode():
            done = 0
            for batch in ids_WT.split(max(1, _BATCH_TOKENS // ids_WT.shape[1])):
                decoder(input_ids=batch, use_cache=False)
                done += batch.numel()
                progress(done, ids_WT.numel())
    finally:
        for handle in handles:
            handle.remove()
    moments = {tap: [a.moments() for a in found] for tap, found in accumulators.items()}
    for layers in moments.values():
        for layer, m in enumerate(layers):
            if not (torch.isfinite(m.xx).all() and torch.isfinite(m.yy).all()):
                raise NblError(f"layer {layer}: its activations hold NaN or infinity; check the checkpoint's weights")
    return moments


def _attach(layer: torch.nn.Module, accumulator: _Accumulator, tap: str) -> list[Any]:
    """Hooks that see a layer's input at the tap and its attention output."""
    seen: dict[str, torch.Tensor] = {}

    def on_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    def on_attention(_module: Any, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        x = seen.pop("x")
        accumulator.update(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))

    attention: Any = layer.self_attn
    tapped = layer if tap == "residual" else attention
    return [
        tapped.register_forward_pre_hook(on_input, with_kwargs=True),
        attention.register_forward_hook(on_attention),
    ]


def save_moments(moments: Mapping[str, Sequence[Moments]], path: Path) -> None:
    """Write moments of all layers and taps as one safetensors file, float64: `layers.{i}.{tap}.{xx,yx,...}`."""
    from safetensors.torch import save_file

    tensors = {
        f"layers.{i}.{tap}.{name}": getattr(m, name)
        for tap, layers in moments.items()
        for i, m in enumerate(layers)
        for name in _FIELDS
    }
    first = next(iter(moments.values()))
    facts = {"count": first[0].count, "num_layers": len(first), "taps": list(moments)}
    save_file(tensors, path, metadata={"moments": json.dumps(facts)})  # one entry: safetensors shuffles several


def load_moments(path: Path) -> dict[str, list[Moments]]:
    """Read what `save_moments` wrote.

    Raises:
        CorruptError: not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads(file.metadata()["moments"])
            return {
                tap: [
                    Moments(int(facts["count"]), *(file.get_tensor(f"layers.{i}.{tap}.{name}") for name in _FIELDS))
                    for i in range(int(facts["num_layers"]))
                ]
                for tap in facts["taps"]
            }
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{path} is not a moments file ({error}); run calibrate again") from error
