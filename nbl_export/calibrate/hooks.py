"""Collects moments of every layer by hooks on the torch model. Activations are never kept.

    reference pass   the first tokens of the text give the reference row and the units of every layer (`sums`)
    batches          each batch of windows gives products of rows

Logits are never computed: the base decoder runs without the language-model head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from nbl_export.calibrate.sums import REFERENCE_ROWS, Accumulator, Sums
from nbl_export.errors import NblError
from nbl_export.mixers import DEFAULT
from nbl_export.mixers.base import Kind
from nbl_export.mixers.lmmse import Moments
from nbl_export.model import bfloat16
from nbl_export.model.blocks import block_output

__all__ = ["Collection", "Rows", "attach", "batches", "collect", "refuse_not_finite"]

_BATCH_TOKENS = 4096


def batches(ids_WT: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split windows [windows, context] into the batches that run at once."""
    return ids_WT.split(max(1, _BATCH_TOKENS // ids_WT.shape[1]))


class Rows:
    """Accumulators of all layers and taps. Subclasses fill the accumulators.

    Args:
        taps: some of `records.plan.TAPS`.
        size: hidden size.
        kind: of the mixers that the sums are for.
        device: device of the sums.
    """

    def __init__(
        self, taps: Sequence[str], num_layers: int, size: int, kind: Kind = DEFAULT, device: Any = "cpu"
    ) -> None:
        self.taps, self.num_layers, self.kind, self._device = tuple(taps), num_layers, kind, device
        self.sizes = (kind.feature_count(size), size)
        self.found = {tap: [Accumulator(self.sizes) for _ in range(num_layers)] for tap in self.taps}

    def add(self, batch_BT: torch.Tensor) -> None:
        """Run one batch and add its rows."""
        raise NotImplementedError

    def refer(self, ids_WT: torch.Tensor) -> None:
        """Take reference rows and units from the beginning of the whole text."""
        self.add(ids_WT[:1, :REFERENCE_ROWS])
        for accumulator in self.accumulators():
            accumulator.clear()

    def accumulators(self) -> list[Accumulator]:
        """All accumulators, in the same order in every process."""
        return [accumulator for accumulators in self.found.values() for accumulator in accumulators]

    @property
    def count(self) -> int:
        """Rows added so far."""
        return self.found[self.taps[0]][0].count

    def layer(self, index: int) -> dict[str, Sums]:
        """The sums of a layer, by tap.

        Raises:
            NblError: the layer's activations are not finite.
        """
        found = {tap: accumulators[index].sums() for tap, accumulators in self.found.items()}
        for sums in found.values():
            refuse_not_finite(sums, index)
        return found

    def restore(self, index: int, sums: dict[str, Sums]) -> None:
        """Continue from the sums that `layer` returned."""
        for tap, found in sums.items():
            self.found[tap][index].restore(found, self._device)


class Collection(Rows):
    """Accumulators hooked to a torch model while the context is open.

    Args:
        model: a causal LM of transformers, float32.
        taps: some of `records.plan.TAPS`.
        kind: of the mixers that the sums are for.
        narrow: the model's products in bfloat16; products of the sums are float32.
    """

    def __init__(self, model: Any, taps: Sequence[str], kind: Kind = DEFAULT, *, narrow: bool = False) -> None:
        self._decoder, self._narrow = model.get_decoder(), narrow
        device = next(model.parameters()).device
        super().__init__(taps, len(self._decoder.layers), int(model.config.hidden_size), kind, device)
        self._handles: list[Any] = []

    def __enter__(self) -> Collection:
        for tap, accumulators in self.found.items():
            for layer, accumulator in zip(self._decoder.layers, accumulators, strict=True):
                self._handles += attach(layer, accumulator, tap, self._decoder.config, self.kind)
        return self

    def __exit__(self, _k: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def add(self, batch_BT: torch.Tensor) -> None:
        """Run one batch and add its rows."""
        with torch.inference_mode(), bfloat16.products(torch.device(self._device), self._narrow):
            self._decoder(input_ids=batch_BT.to(self._device), use_cache=False)


def collect(
    model: Any,
    ids_WT: torch.Tensor,
    progress: Callable[[int, int], None],
    taps: Sequence[str] = ("residual",),
    kind: Kind = DEFAULT,
    *,
    narrow: bool = False,
) -> dict[str, list[Moments]]:
    """Moments of every decoder layer over windows of token ids, for each tap (`records.plan.TAPS`).

    Args:
        model: a causal LM of transformers, float32.
        ids_WT: token ids [windows, context].
        progress: called with tokens done and the total.
        kind: of the mixers that the moments are for.

    Raises:
        NblError: a layer's activations are not finite.
    """
    with Collection(model, taps, kind, narrow=narrow) as collection:
        collection.refer(ids_WT)
        done = 0
        for batch in batches(ids_WT):
            collection.add(batch)
            done += batch.numel()
            progress(done, ids_WT.numel())
        layers = [collection.layer(i) for i in range(collection.num_layers)]
    return {tap: [sums[tap].moments() for sums in layers] for tap in taps}


def refuse_not_finite(sums: Sums, layer: int) -> None:
    """Raise NblError if a layer's sums hold NaN or infinity."""
    if not sums.is_finite:
        raise NblError(f"layer {layer}: its activations hold NaN or infinity; check the checkpoint's weights")


def attach(layer: torch.nn.Module, accumulator: Accumulator, tap: str, config: Any, kind: Kind = DEFAULT) -> list[Any]:
    """Hook an accumulator to a decoder layer.

    X are the features that the kind asks for, of the layer's input at the tap. Y is what the attention block adds to
    the residual stream.

    Args:
        config: the model's configuration.

    Returns:
        The handles of the hooks.
    """
    seen: dict[str, torch.Tensor] = {}

    def on_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    def on_output(_module: Any, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        y = y if multiplier == 1.0 else y * multiplier
        x_BTD, y_BTD = seen.pop("x").float(), y.float()
        with bfloat16.products(y.device, False):
            accumulator.update(kind.features(x_BTD).flatten(0, 1), y_BTD.flatten(0, 1))

    attention: Any = layer.self_attn
    last, multiplier = block_output(layer, config)
    tapped = layer if tap == "residual" else attention
    return [tapped.register_forward_pre_hook(on_input, with_kwargs=True), last.register_forward_hook(on_output)]
