"""Moments of several candidate exit layers in one pass, and the maps of predicted KV that are fitted to them.

    stream c --- norm --- X [t], X [t - 1]  --+-- X'X      once for each exit layer c
                                              |
    k_proj, v_proj of layer l > c --- Y [t] --+-- Y'X      for each exit layer and each layer above it (*)

(*) also of layer c, if its own products on the normed stream are no exact map (`ExitShape.exact`).

A sum holds rows 1 .. T - 1 of each window: row 0 has no token before it. The map without the token before takes the
first D columns. Products are float32 over the rows of a batch, about a reference row, and add up in float64. Equal
batches in equal order give equal bytes, so a pass that stops and goes on gives those of one that does not stop. Several
processes give them too: rank 0 alone has sums, and adds the products of all processes in the order of their batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.methods.collector import Collector, batches
from nbl_export.methods.lmmse import RIDGE, cholesky
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.predicted_kv.module import features
from nbl_export.methods.predicted_kv.products import KeyValueProducts, epsilon_of, norm_of
from nbl_export.methods.sums import REFERENCE_ROWS, gram, total
from nbl_export.methods.sums_file import SumsFile, SumsWriter
from nbl_export.model import bfloat16, processes
from nbl_export.model.architectures import architecture_of

__all__ = ["ExitShape", "ExitSums", "fit", "maps_of", "own_map"]

_BLOCK = 4096  # rows of a float32 product
_FACTORS = {"rms": 0, "rms+1": 1}  # what is added to the weight of a norm before rows are multiplied by it


@dataclass(frozen=True)
class ExitShape:
    """What sums are of.

    Attributes:
        exits: candidates, ascending.
        layers: of the decoder.
        inputs: D.
        width: K, of keys and of values.
        epsilon: of the norm.
        exact: whether the map of the layer at the exit layer is its own products (`own_map`), and is not fitted.
    """

    exits: tuple[int, ...]
    layers: int
    inputs: int
    width: int
    epsilon: float
    exact: bool = True

    def __post_init__(self) -> None:
        if list(self.exits) != sorted({exit_layer for exit_layer in self.exits if 0 <= exit_layer < self.layers}):
            raise NblError(
                f"exit layers {', '.join(map(str, self.exits))} are not those of {self.layers} layers, ascending"
            )

    @staticmethod
    def of(model: Any, exits: Sequence[int]) -> ExitShape:
        """Of a causal LM of transformers.

        Raises:
            NblError: there are no such exit layers, or a layer has no products of keys and of values.
        """
        config = model.config
        record = architecture_of(config)
        layers = model.get_decoder().layers
        (width,) = {KeyValueProducts.of(layer.self_attn, config, n).width for n, layer in enumerate(layers)}
        epsilon = epsilon_of(norm_of(layers[0], config))
        exact = bool(record.norm_before) and record.norm in _FACTORS
        return ExitShape(tuple(exits), len(layers), int(config.hidden_size), width, epsilon, exact)

    def above(self, exit_layer: int) -> range:
        """Layers whose keys and values are predicted from an exit layer by a fitted map."""
        return range(exit_layer + self.exact, self.layers)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the sums by name."""
        outputs = 2 * self.width
        inputs = 2 * self.inputs
        found: dict[str, tuple[int, ...]] = {}
        for exit_layer in self.exits:
            above = len(self.above(exit_layer))
            shapes = {"ref": (inputs,), "sum": (inputs,), "xx": (inputs, inputs), "yx": (above, outputs, inputs)}
            found.update({f"exits.{exit_layer}.{name}": shape for name, shape in shapes.items()})
        for layer in self.above(self.exits[0]):
            found.update({f"layers.{layer}.{name}": (outputs,) for name in ("ref", "sum")})
        return found


class ExitSums(Collector):
    """Sums of some exit layers in float64.

    Args:
        exits: candidates, ascending.

    Attributes:
        sums: by name (`ExitShape.tensors`), about the reference rows; a reference row is NaN before the first rows.

    Raises:
        NblError: there are no such exit layers, or a layer has no products of keys and of values.
    """

    def __init__(self, model: Any, exits: Sequence[int], *, bf16: bool = False) -> None:
        super().__init__(model, bf16=bf16)
        self.shape = ExitShape.of(model, exits)
        self._count = 0
        self.sums = {}
        for name, size in self.shape.tensors().items():
            held = name.endswith(".ref") or processes.is_rank0()  # another process has places alone
            start = torch.nan if name.endswith(".ref") else 0.0
            made = torch.full(size if held else (), start, dtype=torch.float64, device=model.device)
            self.sums[name] = made.expand(size)
        self._features: dict[int, torch.Tensor] = {}
        self._idle = False  # whether rows of this process do not count, since other processes have the last batches

    @property
    def count(self) -> int:
        return self._count

    def hooks(self) -> list[Any]:
        layers = self._model.get_decoder().layers
        handles = [
            layers[exit_layer].register_forward_pre_hook(self._on_stream(exit_layer), with_kwargs=True)
            for exit_layer in self.shape.exits
        ]
        for layer in self.shape.above(self.shape.exits[0]):
            products = KeyValueProducts.of(layers[layer].self_attn, self._model.config, layer)
            handles += products.hooks(partial(self._on_products, layer))
        return handles

    def begin(self, ids_WT: torch.Tensor) -> None:
        self._any_batch = batches(ids_WT)[0]
        for name, value in self.sums.items():
            if name.endswith(".ref"):
                processes.from_first(value)

    def add(self, batch_BT: torch.Tensor | None) -> None:
        self._idle = batch_BT is None
        self.run(self._any_batch if batch_BT is None else batch_BT)
        self._features = {}

    def meet(self) -> None:
        """Rank 0 has all sums already."""

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        with SumsWriter(path, {**facts, "count": self.count}, self.shape.tensors()) as file:
            for name, value in self.sums.items():
                file.write({name: value})

    def restore(self, file: SumsFile) -> None:
        file.require(self.shape.tensors())
        self._count = file.count
        self.sums = {name: file.tensor(name).to(self._model.device) for name in self.sums}

    def _on_stream(self, exit_layer: int) -> Any:
        def take(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x_BTD = (args[0] if args else kwargs["hidden_states"]).float()
            self._add_features(exit_layer, features(x_BTD, self.shape.epsilon)[:, 1:].flatten(0, 1))

        return take

    def _add_features(self, exit_layer: int, x_NF: torch.Tensor) -> None:
        x_NF = self._about(f"exits.{exit_layer}", slice(None), x_NF)
        self._features[exit_layer] = x_NF
        if exit_layer == self.shape.exits[0]:
            count = torch.zeros(1, dtype=torch.int64, device=x_NF.device)
            self._add(count, torch.full_like(count, len(x_NF)))
            self._count += int(count.item())
        self._add(self.sums[f"exits.{exit_layer}.sum"], total(x_NF))
        with bfloat16.bf16_autocast(x_NF.device, False):
            for rows in x_NF.split(_BLOCK):
                self._add(self.sums[f"exits.{exit_layer}.xx"], gram(rows))

    def _on_products(self, layer: int, half: int, output: torch.Tensor) -> None:
        places = slice(half * self.shape.width, (half + 1) * self.shape.width)
        y_NK = self._about(f"layers.{layer}", places, output[:, 1:].float().flatten(0, 1))
        self._add(self.sums[f"layers.{layer}.sum"][places], total(y_NK))
        with bfloat16.bf16_autocast(y_NK.device, False):
            for exit_layer in (exit_layer for exit_layer in self.shape.exits if layer in self.shape.above(exit_layer)):
                first = self.shape.above(exit_layer)[0]
                yx_KF = self.sums[f"exits.{exit_layer}.yx"][layer - first, places]
                for y, x in zip(y_NK.split(_BLOCK), self._features[exit_layer].split(_BLOCK), strict=True):
                    self._add(yx_KF, y.T @ x)

    def _about(self, name: str, places: slice, rows: torch.Tensor) -> torch.Tensor:
        """Rows about their reference row, which is the mean of the first rows ever."""
        reference = self.sums[f"{name}.ref"][places]
        if reference[0].isnan():
            processes.from_first(reference.copy_(rows[:REFERENCE_ROWS].mean(0)))
        return rows - reference.float()

    def _add(self, to: torch.Tensor, value: torch.Tensor) -> None:
        """Add what a batch gives, of each process in turn."""
        for each in processes.gather(torch.zeros_like(value) if self._idle else value):
            to += each


def fit(
    shape: ExitShape, read: Callable[[str], torch.Tensor], count: int, exit_layer: int, recent_tokens: int
) -> dict[int, PredictedKV]:
    """The LMMSE maps of all layers above an exit layer; X'X is factored once.

    Args:
        read: name of a sum (`ExitShape.tensors`) -> its value on the CPU. count: of rows in the sums.

    Raises:
        NblError: the sums hold NaN or infinity, or the stream at the exit layer does not vary.
    """
    title = f"exits.{exit_layer}"
    mean_x = read(f"{title}.sum") / count
    cxx = read(f"{title}.xx") / count - torch.outer(mean_x, mean_x)
    lower = cholesky(cxx, exit_layer, RIDGE)
    reference = read(f"{title}.ref")
    products = read(f"{title}.yx")
    found = {}
    for place, layer in enumerate(shape.above(exit_layer)):
        mean_y = read(f"layers.{layer}.sum") / count
        cyx = products[place] / count - torch.outer(mean_y, mean_x)
        if not torch.isfinite(cyx).all():
            raise NblError(f"layer {layer}: its activations hold NaN or infinity; check the checkpoint's weights")
        weight = torch.cholesky_solve(cyx.T, lower).T
        bias = mean_y + read(f"layers.{layer}.ref") - weight @ (mean_x + reference)
        numbers = shape.inputs, exit_layer, recent_tokens, shape.epsilon
        found[layer] = PredictedKV(weight.float().numpy(), bias.float().numpy(), *numbers)
    return found


def maps_of(
    model: Any, file: SumsFile, exits: Sequence[int], exit_layer: int, recent_tokens: int
) -> dict[int, PredictedKV]:
    """The maps of an exit layer: the exact one of the exit layer itself if there is one, and the fitted ones.

    Args:
        file: sums of this model and these `exits`.
    """
    shape = ExitShape.of(model, exits)
    file.require(shape.tensors())
    fitted = fit(shape, file.tensor, file.count, exit_layer, recent_tokens)
    own = {exit_layer: own_map(model, exit_layer, exit_layer, recent_tokens)} if shape.exact else {}
    return {**own, **fitted}


@torch.no_grad()
def own_map(model: Any, layer: int, exit_layer: int, recent_tokens: int) -> PredictedKV:
    """A layer's own products on the stream at the exit layer, with the weight of its norm in them.

    The map of the layer at the exit layer is exact. The columns of the token before are zeros. The norm is one of
    `_FACTORS`.

    Raises:
        NblError: the layer has no products of keys and of values.
    """
    decoder = model.get_decoder()
    block = decoder.layers[layer]
    config = decoder.config
    norm = norm_of(block, config)
    weight, bias = KeyValueProducts.of(block.self_attn, config, layer).weights()
    weight = weight * (norm.weight.float() + _FACTORS[architecture_of(config).norm])
    weight = torch.cat([weight, torch.zeros_like(weight)], 1)
    numbers = len(norm.weight), exit_layer, recent_tokens, epsilon_of(norm)
    return PredictedKV(weight.cpu().numpy(), bias.cpu().numpy(), *numbers)
