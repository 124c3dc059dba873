"""Collects moments of every layer of a torch model.

`collect` sets hooks on the torch model. Activations are never kept.

    reference pass   the first tokens of the text give the reference row and the units of every layer (`sums`)
    batches          each batch of windows gives products of rows

Logits are never computed: the base decoder runs without the language-model head.

With a model larger than memory (`model.mapped`), all windows go through a layer before the next layer has its weights.
So only one layer's sums are in memory (`Collection.by_layer`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.methods.applied import block_output
from nbl_export.methods.lmmse import Moments
from nbl_export.methods.sums import REFERENCE_ROWS, Accumulator, Sums
from nbl_export.model import bfloat16, processes
from nbl_export.model.mapped import in_batches

__all__ = ["Collection", "attach", "batches", "collect", "run_batch"]

_BATCH_TOKENS = 4096


def batches(ids_WT: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split windows [windows, context] into the batches that run at once."""
    return ids_WT.split(max(1, _BATCH_TOKENS // ids_WT.shape[1]))


def run_batch(model: Any, batch_BT: torch.Tensor, *, narrow: bool) -> None:
    """Run a decoder without its head on windows [B, T]; `narrow`: products in bfloat16."""
    with torch.inference_mode(), bfloat16.products(model.device, narrow):
        model.get_decoder()(input_ids=batch_BT.to(model.device), use_cache=False)


class Collection:
    """Accumulators of all layers and taps, hooked to a torch model while the context is open.

    Args:
        model: a causal LM of transformers, float32.
        taps: some of `records.plan.TAPS`.
        narrow: the model's products in bfloat16; products of the sums are float32.
    """

    def __init__(self, model: Any, taps: Sequence[str], *, narrow: bool = False) -> None:
        self._model = model
        self._decoder = model.get_decoder()
        self._narrow = narrow
        self.taps = tuple(taps)
        self.size = int(model.config.hidden_size)
        self.num_layers = int(model.config.num_hidden_layers)
        self.found = {tap: {i: Accumulator() for i in range(self.num_layers)} for tap in self.taps}
        self._handles: list[Any] = []

    def __enter__(self) -> Collection:
        for tap, accumulators in self.found.items():
            for layer, accumulator in accumulators.items():
                self._handles += attach(self._decoder, layer, accumulator, tap)
        return self

    def __exit__(self, _k: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def add(self, batch_BT: torch.Tensor) -> None:
        """Run one batch and add its rows."""
        run_batch(self._model, batch_BT, narrow=self._narrow)

    def refer(self, ids_WT: torch.Tensor) -> None:
        """Take reference rows and units from the beginning of the whole text."""
        for accumulator in self._accumulators():
            accumulator.only_refers = True
        self.add(ids_WT[:1, :REFERENCE_ROWS])
        for accumulator in self._accumulators():
            accumulator.only_refers = False
        self.share_references()

    def share_references(self) -> None:
        """Give all processes the reference rows and units of rank 0."""
        for accumulator in self._accumulators():
            accumulator.share_reference()

    def meet(self) -> None:
        """Give rank 0 the sums of all processes (`model.processes`); the others begin at zero."""
        for accumulator in self._accumulators():
            accumulator.meet()

    def _accumulators(self) -> Iterator[Accumulator]:
        for accumulators in self.found.values():
            yield from accumulators.values()

    def by_layer(
        self,
        ids_WT: torch.Tensor,
        write: Callable[[dict[str, Sums]], None] | None,
        scratch: Path,
        progress: Callable[[int, int], None],
    ) -> None:
        """Collect all windows with a mapped model; each layer's sums are written and freed when the layer has run.

        Several processes share the batches.

        Args:
            write: gets the sums of all processes; None in another process than rank 0.
            scratch: a directory for hidden states, 8 x tokens x hidden size bytes.
            progress: called with tokens done in all layers, and the total.

        Raises:
            NblError: a weight is missing or damaged, or a layer's activations are not finite.
        """
        parts = batches(ids_WT)
        own = [parts[k] for k in processes.own(len(parts))]
        done = 0
        total = self.num_layers * sum(part.numel() for part in own)

        def seen(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(min(done, total), total)

        def leave(index: int, *_: Any) -> None:
            for accumulators in self.found.values():
                accumulators[index].meet()
            if write is not None:
                write(self.layer(index))
            for accumulators in self.found.values():
                accumulators[index].clear()

        with in_batches(self._model, _BATCH_TOKENS, scratch, seen):
            self.refer(ids_WT)
            for index, layer in enumerate(self._decoder.layers):
                self._handles.append(layer.register_forward_hook(functools.partial(leave, index)))
            if own:
                self.add(torch.cat(own))
            else:  # more processes than batches
                for index in range(self.num_layers):
                    leave(index)

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
        if not all(torch.isfinite(product).all() for sums in found.values() for product in (sums.xx, sums.yy)):
            raise NblError(f"layer {index}: its activations hold NaN or infinity; check the checkpoint's weights")
        return found

    def restore(self, index: int, sums: dict[str, Sums]) -> None:
        """Continue from the sums that `layer` returned."""
        for tap, found in sums.items():
            self.found[tap][index].restore(found, self._model.device)


def collect(
    model: Any,
    ids_WT: torch.Tensor,
    progress: Callable[[int, int], None],
    taps: Sequence[str] = ("residual",),
    *,
    narrow: bool = False,
) -> dict[str, dict[int, Moments]]:
    """Moments of every layer over windows of token ids, for each tap (`records.plan.TAPS`).

    Args:
        model: a causal LM of transformers, float32.
        ids_WT: token ids [windows, context].
        progress: called with tokens done and the total.

    Raises:
        NblError: a layer's activations are not finite.
    """
    with Collection(model, taps, narrow=narrow) as collection:
        collection.refer(ids_WT)
        done = 0
        for batch in batches(ids_WT):
            collection.add(batch)
            done += batch.numel()
            progress(done, ids_WT.numel())
        layers = {i: collection.layer(i) for i in range(collection.num_layers)}
    return {tap: {i: sums[tap].moments() for i, sums in layers.items()} for tap in taps}


def attach(decoder: Any, layer: int, accumulator: Accumulator, tap: str) -> list[Any]:
    """Hook an accumulator to a decoder layer.

    X is the layer's input at the tap, Y what its attention adds to the residual stream.

    Returns:
        The handles of the hooks.
    """
    seen: dict[str, torch.Tensor] = {}
    read: Any = decoder.layers[layer]
    module, multiplier = block_output(read, decoder.config)

    def on_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    def on_output(_module: Any, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        y_BTD = (y if multiplier == 1.0 else y * multiplier).float()
        x_BTD = seen.pop("x")
        if len(x_BTD) > len(y_BTD):  # the layer runs in batches
            x_BTD, seen["x"] = x_BTD[: len(y_BTD)], x_BTD[len(y_BTD) :]
        with bfloat16.products(y_BTD.device, False):
            accumulator.update(x_BTD.to(y_BTD.device).float().flatten(0, 1), y_BTD.flatten(0, 1))

    tapped = read if tap == "residual" else read.self_attn
    return [tapped.register_forward_pre_hook(on_input, with_kwargs=True), module.register_forward_hook(on_output)]
