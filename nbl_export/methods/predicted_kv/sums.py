"""Moments of several candidate exit layers in one pass, and the maps of predicted KV that are fitted to them.

    stream c --- norm --- X [t], X [t - 1]  --+-- X'X      once for each exit layer c
                                              |
    k_proj, v_proj of layer l > c --- Y [t] --+-- Y'X      for each exit layer and each layer above it

A sum holds rows 1 .. T - 1 of each window: row 0 has no token before it. The map without the token before takes the
first D columns. Products are float32 over the rows of a batch, about a reference row, and add up in float64. Equal
batches in equal order give equal bytes, so a pass that stops and goes on gives those of one that does not stop. Several
processes give them too: rank 0 alone has sums, and adds the products of all processes in the order of their batches.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import CorruptError, NblError
from nbl_export.files import arrays_sha256, replaced
from nbl_export.methods.lmmse import RIDGE, cholesky
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.predicted_kv.module import features
from nbl_export.methods.predicted_kv.torch_layers import check_attention, own_map
from nbl_export.methods.sums import REFERENCE_ROWS, gram, total
from nbl_export.model import bfloat16, processes
from nbl_export.model.architectures import architecture_of

__all__ = ["ExitShape", "ExitSums", "fit", "load", "maps_of"]

_BLOCK = 4096  # rows of a float32 product


@dataclass(frozen=True)
class ExitShape:
    """What sums are of.

    Attributes:
        exits: candidates, ascending.
        layers: of the decoder.
        inputs: D.
        width: K, of keys and of values.
        epsilon: of the norm.
    """

    exits: tuple[int, ...]
    layers: int
    inputs: int
    width: int
    epsilon: float

    def __post_init__(self) -> None:
        numbers = (self.layers, self.inputs, self.width, *self.exits)
        whole = all(type(number) is int for number in numbers) and type(self.epsilon) is float
        if not whole or min(numbers[:3]) < 1 or not self.exits:
            raise ValueError("no exit layer, or sizes that are no whole numbers above 0")
        if list(self.exits) != sorted({exit_layer for exit_layer in self.exits if 0 <= exit_layer < self.layers}):
            raise NblError(
                f"exit layers {', '.join(map(str, self.exits))} are not those of {self.layers} layers, ascending"
            )

    def above(self, exit_layer: int) -> range:
        """Layers whose keys and values are predicted from an exit layer by a fitted map."""
        return range(exit_layer + 1, self.layers)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the sums by name."""
        outputs = 2 * self.width
        inputs = 2 * self.inputs
        found: dict[str, tuple[int, ...]] = {}
        for exit_layer in self.exits:
            above = len(self.above(exit_layer))
            shapes = {"ref": (inputs,), "sum": (inputs,), "xx": (inputs, inputs), "yx": (above, outputs, inputs)}
            found.update({f"cuts.{exit_layer}.{name}": shape for name, shape in shapes.items()})
        for layer in self.above(self.exits[0]):
            found.update({f"layers.{layer}.{name}": (outputs,) for name in ("ref", "sum")})
        return found


class ExitSums:
    """Sums of some exit layers in float64.

    Attributes:
        count: rows so far.
        sums: by name (`ExitShape.tensors`), about the reference rows; a reference row is NaN before the first rows.
        idle: whether the rows of this process do not count, since other processes have the last batches.
    """

    idle = False

    def __init__(self, shape: ExitShape, sums: dict[str, torch.Tensor], count: int = 0) -> None:
        self.shape = shape
        self.sums = sums
        self.count = count
        self._features: dict[int, torch.Tensor] = {}

    @staticmethod
    def of(model: Any, exits: Sequence[int]) -> ExitSums:
        """Empty sums for a causal LM of transformers.

        Raises:
            NblError: there are no such exit layers, or attention above them is not like llama's.
        """
        config = model.config
        layers = model.get_decoder().layers
        for index, layer in enumerate(layers):
            check_attention(layer, config, index)
        norm = getattr(layers[0], architecture_of(config).norm_before or "")
        width = int(layers[0].self_attn.k_proj.out_features)
        shape = ExitShape(tuple(exits), len(layers), int(config.hidden_size), width, float(norm.variance_epsilon))
        device = next(model.parameters()).device
        sums = {}
        for name, size in shape.tensors().items():
            held = name.endswith(".ref") or processes.leads()  # another process has places alone
            begin = torch.nan if name.endswith(".ref") else 0.0
            sums[name] = torch.full(size if held else (), begin, dtype=torch.float64, device=device).expand(size)
        return ExitSums(shape, sums)

    @contextlib.contextmanager
    def attached(self, model: Any) -> Iterator[ExitSums]:
        """Within: each run of the model adds its rows, whoever runs it (`collect.Collection.add`)."""
        layers = model.get_decoder().layers
        handles = [
            layers[exit_layer].register_forward_pre_hook(self._on_stream(exit_layer), with_kwargs=True)
            for exit_layer in self.shape.exits
        ]
        for layer in self.shape.above(self.shape.exits[0]):
            attention = layers[layer].self_attn
            for half, product in enumerate((attention.k_proj, attention.v_proj)):
                handles.append(product.register_forward_hook(self._on_product(layer, half)))
        try:
            yield self
        finally:
            self._features = {}
            for handle in handles:
                handle.remove()

    def clear(self) -> None:
        """Forget the rows, and keep the reference rows."""
        self.count = 0
        for name, value in self.sums.items():
            if not name.endswith(".ref"):
                value.zero_()

    def _on_stream(self, exit_layer: int) -> Any:
        def take(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x_BTD = (args[0] if args else kwargs["hidden_states"]).float()
            self._add_features(exit_layer, features(x_BTD, self.shape.epsilon)[:, 1:].flatten(0, 1))

        return take

    def _add_features(self, exit_layer: int, x_NF: torch.Tensor) -> None:
        x_NF = self._about(f"cuts.{exit_layer}", slice(None), x_NF)
        self._features[exit_layer] = x_NF
        if exit_layer == self.shape.exits[0]:
            count = torch.zeros(1, dtype=torch.int64, device=x_NF.device)
            self._add(count, torch.full_like(count, len(x_NF)))
            self.count += int(count.item())
        self._add(self.sums[f"cuts.{exit_layer}.sum"], total(x_NF))
        with bfloat16.products(x_NF.device, False):
            for rows in x_NF.split(_BLOCK):
                self._add(self.sums[f"cuts.{exit_layer}.xx"], gram(rows))

    def _on_product(self, layer: int, half: int) -> Any:
        places = slice(half * self.shape.width, (half + 1) * self.shape.width)

        def take(_product: Any, _args: Any, output: torch.Tensor) -> None:
            y_NK = self._about(f"layers.{layer}", places, output[:, 1:].float().flatten(0, 1))
            self._add(self.sums[f"layers.{layer}.sum"][places], total(y_NK))
            with bfloat16.products(y_NK.device, False):
                for exit_layer in (exit_layer for exit_layer in self.shape.exits if exit_layer < layer):
                    yx_KF = self.sums[f"cuts.{exit_layer}.yx"][layer - exit_layer - 1, places]
                    for y, x in zip(y_NK.split(_BLOCK), self._features[exit_layer].split(_BLOCK), strict=True):
                        self._add(yx_KF, y.T @ x)

        return take

    def _about(self, name: str, places: slice, rows: torch.Tensor) -> torch.Tensor:
        """Rows about their reference row, which is the mean of the first rows ever."""
        reference = self.sums[f"{name}.ref"][places]
        if reference[0].isnan():
            processes.from_first(reference.copy_(rows[:REFERENCE_ROWS].mean(0)))
        return rows - reference.float()

    def _add(self, to: torch.Tensor, value: torch.Tensor) -> None:
        """Add what a batch gives, of each process in turn."""
        for each in processes.in_order(torch.zeros_like(value) if self.idle else value):
            to += each

    def share_references(self) -> None:
        """Give all processes the reference rows of rank 0."""
        for name, value in self.sums.items():
            if name.endswith(".ref"):
                processes.from_first(value)

    def save(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the sums and some facts of them, such as their identity and the batches done, to a safetensors file."""
        from safetensors.torch import save_file

        held = {name: value.cpu().contiguous() for name, value in self.sums.items()}
        stated = {**asdict(self.shape), "count": self.count, "facts": dict(facts), "sha256": _sha256(held)}
        with replaced(path) as made:
            save_file(held, made, {"exits": json.dumps(stated)})


def load(path: Path, device: Any = "cpu") -> tuple[ExitSums, dict[str, Any]]:
    """The sums and the facts that `CutSums.save` wrote.

    Raises:
        CorruptError: the file is missing, damaged, or no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            stated = json.loads(file.metadata()["exits"])
            if stated["layers"] > stated["exits"][0] + 1 + len(file.keys()):
                raise ValueError("it lacks layers")
            shape = ExitShape(**{**{name: stated[name] for name in _SHAPE}, "exits": tuple(stated["exits"])})
            sizes = shape.tensors()
            if {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} != sizes:  # noqa: SIM118
                raise ValueError("its tensors have other names or shapes")
            held = {name: file.get_tensor(name).to(device, torch.float64) for name in sizes}
        if _sha256({name: value.cpu() for name, value in held.items()}) != stated["sha256"]:
            raise ValueError("its content is not what was written")
        made = ExitSums(shape, held, int(stated["count"]))
        facts = dict(stated["facts"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, NblError) as error:
        raise CorruptError(f"{path} holds no sums of exit layers ({error}); run calibrate again") from error
    return made, facts


_SHAPE = ("exits", "layers", "inputs", "width", "epsilon")


def _sha256(held: Mapping[str, torch.Tensor]) -> str:
    return arrays_sha256({name: value.numpy() for name, value in held.items()})


def fit(sums: ExitSums, exit_layer: int, recent_tokens: int) -> dict[int, PredictedKV]:
    """The LMMSE maps of all layers above an exit layer; X'X is factored once.

    Raises:
        NblError: the sums hold NaN or infinity, or the stream at the exit layer does not vary.
    """
    shape = sums.shape
    held = {name: value.cpu() for name, value in sums.sums.items()}
    mean_x = held[f"cuts.{exit_layer}.sum"] / sums.count
    cxx = held[f"cuts.{exit_layer}.xx"] / sums.count - torch.outer(mean_x, mean_x)
    lower = cholesky(cxx, exit_layer, RIDGE)
    found = {}
    for layer in shape.above(exit_layer):
        mean_y = held[f"layers.{layer}.sum"] / sums.count
        cyx = held[f"cuts.{exit_layer}.yx"][layer - exit_layer - 1] / sums.count - torch.outer(mean_y, mean_x)
        if not torch.isfinite(cyx).all():
            raise NblError(f"layer {layer}: its activations hold NaN or infinity; check the checkpoint's weights")
        weight = torch.cholesky_solve(cyx.T, lower).T
        bias = mean_y + held[f"layers.{layer}.ref"] - weight @ (mean_x + held[f"cuts.{exit_layer}.ref"])
        numbers = shape.inputs, exit_layer, recent_tokens, shape.epsilon
        found[layer] = PredictedKV(weight.float().numpy(), bias.float().numpy(), *numbers)
    return found


def maps_of(model: Any, sums: ExitSums, exit_layer: int, recent_tokens: int) -> dict[int, PredictedKV]:
    """The maps of an exit layer for the model that the sums are of: the exact one of the exit layer itself, and the
    fitted ones."""
    return {exit_layer: own_map(model, exit_layer, recent_tokens), **fit(sums, exit_layer, recent_tokens)}
