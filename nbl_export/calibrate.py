"""Hooks on the torch model -> moments of every layer. Activations are never kept.

    reference pass   the first tokens of the text: reference row and units of every layer (`sums`)
    batches          the text in batches of the same windows whatever part of it is collected: products of rows

The logits are never computed: the base decoder is run, not the language-model head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch

from nbl_export.blocks import block_output
from nbl_export.errors import NblError
from nbl_export.lmmse import Moments
from nbl_export.moments_file import load_moments, save_moments
from nbl_export.sums import REFERENCE_ROWS, Accumulator, Sums

__all__ = ["Collection", "Rows", "attach", "batches", "collect", "load_moments", "refuse_not_finite", "save_moments"]

_BATCH_TOKENS = 4096


def batches(ids_WT: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The text's windows in batches: what is run at once, and what shards are made of."""
    return ids_WT.split(max(1, _BATCH_TOKENS // ids_WT.shape[1]))


class Rows:
    """Accumulators of all layers and taps; who fills them is a subclass.

    Args:
        taps: of `records.TAPS`. size: of the hidden state. device: of the sums.
    """

    def __init__(self, taps: Sequence[str], num_layers: int, size: int, device: Any = "cpu") -> None:
        self.taps, self.num_layers, self.size, self._device = tuple(taps), num_layers, size, device
        self.found = {tap: [Accumulator(size) for _ in range(num_layers)] for tap in self.taps}

    def add(self, batch_BT: torch.Tensor) -> None:
        """Run one batch and add its rows."""
        raise NotImplementedError

    def refer(self, ids_WT: torch.Tensor) -> None:
        """Take reference rows and units from the beginning of the whole text."""
        self.add(ids_WT[:1, :REFERENCE_ROWS])
        for accumulator in self.accumulators():
            accumulator.clear()

    def accumulators(self) -> list[Accumulator]:
        """All of them, in an order that is the same everywhere."""
        return [accumulator for accumulators in self.found.values() for accumulator in accumulators]

    @property
    def count(self) -> int:
        """Rows so far."""
        return self.found[self.taps[0]][0].count

    def layer(self, index: int) -> dict[str, Sums]:
        """The sums of a layer, by tap.

        Raises:
            NblError: its activations are not finite.
        """
        found = {tap: accumulators[index].sums() for tap, accumulators in self.found.items()}
        for sums in found.values():
            refuse_not_finite(sums, index)
        return found

    def restore(self, index: int, sums: dict[str, Sums]) -> None:
        """Go on from what `layer` gave."""
        for tap, found in sums.items():
            self.found[tap][index].restore(found, self._device)


class Collection(Rows):
    """Accumulators hooked to a torch model while the context is open.

    Args:
        model: a causal LM of transformers, float32.
        taps: of `records.TAPS`.
    """

    def __init__(self, model: Any, taps: Sequence[str]) -> None:
        self._decoder = model.get_decoder()
        device = next(model.parameters()).device
        super().__init__(taps, len(self._decoder.layers), int(model.config.hidden_size), device)
        self._handles: list[Any] = []

    def __enter__(self) -> Collection:
        for tap, accumulators in self.found.items():
            for layer, accumulator in zip(self._decoder.layers, accumulators, strict=True):
                self._handles += attach(layer, accumulator, tap, self._decoder.config)
        return self

    def __exit__(self, _k: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def add(self, batch_BT: torch.Tensor) -> None:
        """Run one batch and add its rows."""
        with torch.inference_mode():
            self._decoder(input_ids=batch_BT.to(self._device), use_cache=False)


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
    with Collection(model, taps) as collection:
        collection.refer(ids_WT)
        done = 0
        for batch in batches(ids_WT):
            collection.add(batch)
            done += batch.numel()
            progress(done, ids_WT.numel())
        layers = [collection.layer(i) for i in range(collection.num_layers)]
    return {tap: [sums[tap].moments() for sums in layers] for tap in taps}


def refuse_not_finite(sums: Sums, layer: int) -> None:
    """Raise NblError where a layer's sums hold NaN or infinity."""
    if not sums.is_finite:
        raise NblError(f"layer {layer}: its activations hold NaN or infinity; check the checkpoint's weights")


def attach(layer: torch.nn.Module, accumulator: Accumulator, tap: str, config: Any) -> list[Any]:
    """Hook an accumulator to a decoder layer: its input at the tap, and what its attention block adds to the residual.

    Args:
        config: of the model.

    Returns:
        The handles.
    """
    seen: dict[str, torch.Tensor] = {}

    def on_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    def on_output(_module: Any, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        y = y if multiplier == 1.0 else y * multiplier
        x = seen.pop("x")
        accumulator.update(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))

    attention: Any = layer.self_attn
    last, multiplier = block_output(layer, config)
    tapped = layer if tap == "residual" else attention
    return [
        tapped.register_forward_pre_hook(on_input, with_kwargs=True),
        last.register_forward_hook(on_output),
    ]
