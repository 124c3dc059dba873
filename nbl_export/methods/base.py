"""What a layer does with the sequence, besides or instead of attention: the protocols `Mixer`, `Kind` and `Builder`.

    Kind     the registration: moments ─► fit ─► Mixer;  tensors of a file ─► Mixer
    Mixer    one fitted layer: emits itself into a graph, is a torch module, has tensors and work, and says

             reads         which rows of which streams (`rows`)
             gives         a port: the block's output, or keys and values for the layer's own attention
             holds_cache   whether the layer's cache stays between steps

    Builder  what a mixer may put into a graph: one implementer each for ONNX, OpenVINO and NumPy (`apply`)

A new kind is one file of this package and its name in `nbl_export.methods`. Other packages ask a mixer what they
need to know, and never for its class. Values of a builder are [B, T, width]: batch, tokens of this step, numbers of
a token. Importing this package loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.methods.rows import Reads
from nbl_export.records.plan import LayerScore

if TYPE_CHECKING:
    from nbl_export.methods.lmmse import Moments

__all__ = [
    "OWN",
    "Builder",
    "Kind",
    "Mixer",
    "NumpyMixers",
    "Port",
    "Stored",
    "Streams",
    "TokenWork",
    "apply",
    "cacheless",
    "tapped",
]

Value = Any  # a value of the graph that a builder makes
OWN = None  # the layer's own input at its tap, among streams
Streams = Mapping[int | None, Value]  # a stream that a mixer reads (`Read.stream`) -> its value [B, T, D]


class Port(Enum):
    """Where a mixer's value enters a layer's attention block.

    OUTPUT: what the block adds to the residual stream, [B, T, D]. The layer's attention leaves.
    KEYS, VALUES: of the layer's own attention, before rotary, [B, T, heads x head size].
    """

    OUTPUT = "output"
    KEYS = "keys"
    VALUES = "values"


@dataclass(frozen=True)
class TokenWork:
    """What one row of a stream costs.

    Attributes:
        multiply_adds: of this row alone.
        elements: of the matrices that are read, once for all rows of a step.
    """

    multiply_adds: int
    elements: int


class Builder(Protocol):
    """What a mixer may put into a graph, at one layer. `name` is unique in the layer and names node and constant."""

    def matmul(self, x: Value, matrix: np.ndarray, name: str) -> Value:
        """x M' for a matrix [O, I]: the last dimension I becomes O."""

    def add(self, x: Value, vector: np.ndarray, name: str) -> Value:
        """The sum of a value and a vector [width]."""


class Mixer(Protocol):
    """One fitted layer: values of the streams that it reads, [B, T, D] each, to the values of its ports."""

    @property
    def kind(self) -> str:
        """Name of its kind."""

    @property
    def reads(self) -> Reads:
        """The streams that it reads, and which rows; its own input at the tap comes first."""

    @property
    def gives(self) -> tuple[Port, ...]:
        """The ports of the layer that its values enter."""

    @property
    def holds_cache(self) -> bool:
        """Whether the layer's attention and its cache of keys and values stay."""

    @property
    def size(self) -> int:
        """D: the width of its input and output."""

    def tensors(self) -> dict[str, np.ndarray]:
        """All its numbers in float32, by name, as `Kind.from_tensors` takes them."""

    def product(self) -> np.ndarray | None:
        """The matrix W [D, D] if it computes x W' and nothing else, as some file formats need; otherwise None."""

    def emit(self, build: Builder, streams: Streams) -> Mapping[Port, Value]:
        """The values of its ports, from the operators of a builder. No value: nothing is added there."""

    def module(self, multiplier: float = 1.0) -> Any:
        """A torch module in place of a self-attention module of transformers (`methods.modules.MixerModule`).

        Args:
            multiplier: the layer's factor of attention's output. A mixer includes it, so the module's output is
                divided by it.
        """

    def work(self) -> tuple[TokenWork, ...]:
        """What one row of each of `reads` costs."""


class Kind(Protocol):
    """A kind of mixer: how it is calibrated, fitted, judged and read from a file. Torch is loaded by these methods.

    A kind derives from this class, whose defaults are those of a layer that reads its own token and is not trained.
    """

    @property
    def name(self) -> str:
        """As plan, nbl.json and maps.safetensors name it."""

    @property
    def holds_cache(self) -> bool:
        """Whether a layer of this kind holds the cache of its attention."""
        return False

    def fit(self, moments: Moments, layer: int, *, bias: bool = True) -> Mixer:
        """The best mixer of this kind for a layer, by second moments of its input and of attention's output.

        Args:
            bias: False if the format to be written stores no bias; a kind without a bias ignores it.

        Raises:
            NblError: the moments hold NaN or infinity, or x does not vary.
        """

    def score(self, moments: Moments, layer: int, *, bias: bool = True) -> LayerScore:
        """How well the best linear function of the input can replace a layer's attention."""
        from nbl_export.methods import lmmse

        return lmmse.score(moments, layer, bias=bias)

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> Mixer:
        """The mixer of these `Mixer.tensors`.

        Raises:
            KeyError: a tensor is missing.
            ValueError: shapes contradict each other.
        """

    def blank(self, size: int, multiplier: float = 1.0, like: Mixer | None = None) -> Any:
        """The torch module of a mixer, whose numbers are loaded later.

        Args:
            like: for a kind whose module follows from more than the size, a mixer of its shapes; no number is read.
        """

    def from_module(self, state: Mapping[str, np.ndarray], size: int) -> Mixer:
        """The mixer of the `state_dict` of a module of this kind; errors as in `from_tensors`."""
        return self.from_tensors(state)

    def trained(self, mixer: Mixer, rank: int, generator: Any) -> Any:
        """What distillation trains, with a delta of some rank (as `modules.TrainedLinear`); None: it is not trained."""
        return None


def cacheless(mixers: Mapping[int, Mixer]) -> tuple[int, ...]:
    """Layers whose mixer does not hold the cache of their attention, ascending."""
    return tuple(layer for layer, mixer in sorted(mixers.items()) if not mixer.holds_cache)


Stored = Mapping[str, np.ndarray]  # matrices and vectors that a graph holds of a mixer, by the names of `emit`


def apply(
    mixer: Mixer, streams: Mapping[int | None, np.ndarray], stored: Stored | None = None
) -> dict[Port, np.ndarray]:
    """The values of a mixer's ports, in NumPy and float32.

    Args:
        streams: values [B, T, D] of the streams that it reads.
        stored: used instead of the mixer's own numbers.
    """
    build = _Arrays(stored or {})
    found = mixer.emit(build, {stream: value.astype(np.float32) for stream, value in streams.items()})
    nothing = {Port.OUTPUT: np.zeros(streams[OWN].shape, np.float32)} if mixer.gives == (Port.OUTPUT,) else {}
    return {**nothing, **found}


class NumpyMixers:
    """Mixers of some layers in NumPy, which read their own input and give the block's output.

    Args:
        mixers: by layer.
        stored: by layer, see `apply`.
    """

    def __init__(self, mixers: Mapping[int, Mixer], stored: Mapping[int, Stored] | None = None) -> None:
        self.mixers = mixers
        self.stored = stored or {}
        self.layers = tuple(sorted(mixers))

    def __call__(self, layer: int, x_BTD: np.ndarray) -> np.ndarray:
        """The output of a layer's mixer in float32."""
        return apply(self.mixers[layer], {OWN: x_BTD}, self.stored.get(layer))[Port.OUTPUT]


class _Arrays:
    """The builder whose values are arrays."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored

    def matmul(self, x: np.ndarray, matrix: np.ndarray, name: str) -> np.ndarray:
        product: np.ndarray = x @ self._stored.get(name, matrix).T
        return product

    def add(self, x: np.ndarray, vector: np.ndarray, name: str) -> np.ndarray:
        return x + self._stored.get(name, vector)


def tapped(block: Any, tap: str) -> Value:
    """The value that the map of a block acts on; a block has `layer`, `residual` and `normed`, of any graph form.

    Raises:
        RefusalError: the tap is "normed" and the block has no normed input.
    """
    if tap == "residual":
        return block.residual
    if block.normed is None:
        raise RefusalError(
            block.layer,
            "its attention does not multiply one normed value first, which tap normed needs; use tap residual",
        )
    return block.normed
