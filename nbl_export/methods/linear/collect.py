"""Moments of every layer of a torch model: of its input at a tap, and of what its attention adds.

    reference pass   the first tokens of the text give the reference row and the units of every layer (`sums`)
    batches          each batch of windows gives products of rows

    layers.{i}.{tap}.{x_sum,y_sum,yx}            sums over the rows, about the reference row
    layers.{i}.{tap}.{xx,yy}_upper               of symmetric sums, the rows of the upper triangle in their order
    layers.{i}.{tap}.{x_ref,y_ref,x_unit,y_unit} see `sums`

With a model larger than memory (`model.mapped`), all windows go through a layer before the next layer has its weights.
So only one layer's sums are in memory (`Collection.by_layer`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.methods.applied import block_output
from nbl_export.methods.collector import BATCH_TOKENS, Collector, batches
from nbl_export.methods.lmmse import Moments
from nbl_export.methods.sums import REFERENCE_ROWS, Accumulator, Sums, tensor_shapes
from nbl_export.methods.sums_file import SumsFile, SumsWriter
from nbl_export.model import bfloat16, processes
from nbl_export.model.mapped import in_batches

__all__ = ["Collection", "attach", "collect", "read_sums"]


class Collection(Collector):
    """Accumulators of all layers and taps.

    Args:
        taps: some of `records.plan.TAPS`.
    """

    def __init__(self, model: Any, taps: Sequence[str], *, bf16: bool = False) -> None:
        super().__init__(model, bf16=bf16)
        self._decoder = model.get_decoder()
        self.taps = tuple(taps)
        self.size = int(model.config.hidden_size)
        self.num_layers = int(model.config.num_hidden_layers)
        self.found = {tap: {i: Accumulator() for i in range(self.num_layers)} for tap in self.taps}

    def hooks(self) -> list[Any]:
        return [
            handle
            for tap, accumulators in self.found.items()
            for layer, accumulator in accumulators.items()
            for handle in attach(self._decoder, layer, accumulator, tap)
        ]

    def begin(self, ids_WT: torch.Tensor) -> None:
        if self.count and processes.is_rank0():
            self.share_references()
        else:
            self.refer(ids_WT)

    def add(self, batch_BT: torch.Tensor | None) -> None:
        if batch_BT is not None:
            self.run(batch_BT)

    def refer(self, ids_WT: torch.Tensor) -> None:
        """Take reference rows and units from the beginning of the whole text."""
        for accumulator in self._accumulators():
            accumulator.only_refers = True
        self.run(ids_WT[:1, :REFERENCE_ROWS])
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
        path: Path,
        facts: dict[str, Any],
        scratch: Path,
        progress: Callable[[int, int], None],
    ) -> None:
        """Each layer's sums are written and freed when the layer has run. Several processes share the batches.

        Raises:
            NblError: a weight is missing or damaged, or a layer's activations are not finite.
        """
        parts = batches(ids_WT)
        own = [parts[k] for k in processes.rank_slice(len(parts))]
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
                write(self._tensors(index))
            for accumulators in self.found.values():
                accumulators[index].clear()

        write = None
        with contextlib.ExitStack() as files:
            if processes.is_rank0():
                stated = {**facts, "count": ids_WT.numel()}
                write = files.enter_context(SumsWriter(path, stated, self.shapes)).write
            files.enter_context(in_batches(self._model, BATCH_TOKENS, scratch, seen))
            self.refer(ids_WT)
            for index, layer in enumerate(self._decoder.layers):
                self._handles.append(layer.register_forward_hook(functools.partial(leave, index)))
            if own:
                self.run(torch.cat(own))
            else:  # more processes than batches
                for index in range(self.num_layers):
                    leave(index)

    @property
    def count(self) -> int:
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

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors of a file of sums."""
        shapes = tensor_shapes(self.size)
        return {
            f"{_title(layer, tap)}.{name}": shape
            for layer in range(self.num_layers)
            for tap in self.taps
            for name, shape in shapes.items()
        }

    def _tensors(self, layer: int) -> dict[str, torch.Tensor]:
        held = self.layer(layer).items()
        return {f"{_title(layer, tap)}.{name}": value for tap, sums in held for name, value in sums.tensors().items()}

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        with SumsWriter(path, {**facts, "count": self.count}, self.shapes) as file:
            for layer in range(self.num_layers):
                file.write(self._tensors(layer))

    def restore(self, file: SumsFile) -> None:
        file.require(self.shapes)
        for tap, accumulators in self.found.items():
            for layer, accumulator in accumulators.items():
                accumulator.restore(read_sums(file, layer, tap), self._model.device)


def _title(layer: int, tap: str) -> str:
    return f"layers.{layer}.{tap}"


def read_sums(file: SumsFile, layer: int, tap: str) -> Sums:
    """The sums of a layer.

    Raises:
        CorruptError: the file has no sums of this layer and tap.
    """
    return Sums.of(file.count, lambda name: file.tensor(f"{_title(layer, tap)}.{name}"))


def collect(
    model: Any,
    ids_WT: torch.Tensor,
    progress: Callable[[int, int], None],
    taps: Sequence[str] = ("residual",),
    *,
    bf16: bool = False,
) -> dict[str, dict[int, Moments]]:
    """Moments of every layer over windows of token ids, for each tap (`records.plan.TAPS`).

    Args:
        model: a causal LM of transformers, float32.
        ids_WT: token ids [windows, context].
        progress: called with tokens done and the total.

    Raises:
        NblError: a layer's activations are not finite.
    """
    with Collection(model, taps, bf16=bf16) as collection:
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
        with bfloat16.bf16_autocast(y_BTD.device, False):
            accumulator.update(x_BTD.to(y_BTD.device).float().flatten(0, 1), y_BTD.flatten(0, 1))

    tapped = read if tap == "residual" else read.self_attn
    return [tapped.register_forward_pre_hook(on_input, with_kwargs=True), module.register_forward_hook(on_output)]
