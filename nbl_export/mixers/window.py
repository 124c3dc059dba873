"""Attention limited to the last W tokens and the first token, with the layer's own weights or these trained further.

    x -- norm -- qkv' -- + bias -- softmax over the W rows up to its own and the first row of the text -- o' --

The first token draws much of the attention that a head does not need elsewhere ("attention sink"; Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks", ICLR 2024). So it stays in sight. As there, rotary positions
count within what is seen: distances to the last W tokens are true, and the first token is never farther than W tokens.
A text of at most W + 1 tokens gives what the layer's attention gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.mixers.base import OWN, Builder, Kind, Mixer, Port, StateSpec, Streams, TokenWork, Value, WindowShape
from nbl_export.mixers.rows import Read, Reads, Rows
from nbl_export.records.from_json import require

if TYPE_CHECKING:
    from nbl_export.mixers.lmmse import Moments

__all__ = ["WINDOW", "Window"]


@dataclass(frozen=True)
class Window:
    """Attention of a layer over W tokens and the first one, float32.

    Attributes:
        shape: W, heads, and the factor of scores.
        qkv: the products that give queries, keys and values, in this order, [Q + 2 K, D].
        bias: of `qkv`, [Q + 2 K].
        output: the product behind attention, [D, Q].
        frequencies: rotary frequencies of pairs (i, i + P), [P]; the last numbers of a head are not rotated.
        norm: weight of the norm in front, [D]; None if x is normed.
        epsilon: of that norm.
    """

    shape: WindowShape
    qkv: np.ndarray
    bias: np.ndarray
    output: np.ndarray
    frequencies: np.ndarray
    norm: np.ndarray | None = None
    epsilon: float = 1e-6
    kind = "window"
    gives = (Port.OUTPUT,)

    def __post_init__(self) -> None:
        shape = self.shape
        require(shape.tokens >= 1, "a window has at least one token")
        require(shape.heads % shape.kv_heads == 0, "query heads share key heads evenly")
        wide = shape.query_width + 2 * shape.key_width
        require(self.qkv.shape == (wide, len(self.output)), "the matrix of queries, keys and values has a wrong shape")
        require(self.bias.shape == (wide,), "the bias of queries, keys and values has a wrong shape")
        require(self.output.shape == (self.size, shape.query_width), "the output matrix has a wrong shape")
        require(2 * len(self.frequencies) <= shape.head_size, "there are more rotary frequencies than pairs")
        require(self.norm is None or self.norm.shape == (self.size,), "the norm has a wrong shape")

    @property
    def size(self) -> int:
        return len(self.output)

    @property
    def reads(self) -> Reads:
        return (Read(rows=Rows.WINDOW, tokens=self.shape.tokens),)

    @property
    def holds(self) -> StateSpec:
        """The first row, then the last W rows: keys, values, and a mark of rows that hold a token."""
        return StateSpec(self.shape.tokens + 1, 2 * self.shape.key_width + 1, masked=False)

    def tensors(self) -> dict[str, np.ndarray]:
        """The matrices, the bias, the norm if there is one, and the shape as numbers."""
        sizes = np.array([*dataclasses.astuple(self.shape), self.epsilon], np.float32)
        norm = {} if self.norm is None else {"norm": self.norm}
        matrices = {"qkv": self.qkv, "output": self.output}
        return {**matrices, "bias": self.bias, "frequencies": self.frequencies, "sizes": sizes, **norm}

    def product(self) -> None:
        return None

    def as_product(self, moments: Moments, layer: int) -> None:
        return None

    def emit(self, build: Builder, streams: Streams) -> dict[Port, Value]:
        x = streams[OWN]
        if self.norm is not None:
            x = build.norm(x, self.norm, self.epsilon, "norm")
        qkv = build.matmul(x, self.qkv, "qkv")
        if self.bias.any():
            qkv = build.add(qkv, self.bias, "bias")
        seen = build.window(qkv, self.shape, self.frequencies, self.holds, "window")
        return {Port.OUTPUT: build.matmul(seen, self.output, "output")}

    def module(self, multiplier: float = 1.0) -> Any:
        import torch

        from nbl_export.mixers.window_module import WindowModule

        made, numbers = WindowModule(self, multiplier), self.tensors()
        made.load_state_dict({name: torch.from_numpy(numbers[name]) for name in made.state_dict()})
        return made

    def work(self) -> tuple[TokenWork, ...]:
        elements = self.qkv.size + self.output.size
        scores = 2 * (self.shape.tokens + 1) * self.shape.query_width
        return (TokenWork(elements + scores, elements),)


class _Window(Kind):
    """Windows are made of a layer's own attention (`model.windows`), so moments fit none."""

    name = "window"
    fitted = False

    def fit(self, moments: Moments, layer: int, *, bias: bool = True) -> Mixer:
        raise NblError(f"layer {layer}: a window is not fitted; it takes the weights of the layer's own attention")

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> Window:
        tokens, heads, kv_heads, head_size, scale, epsilon = tensors["sizes"].tolist()
        shape = WindowShape(int(tokens), int(heads), int(kv_heads), int(head_size), scale)
        qkv, bias, output, frequencies = (tensors[name] for name in ("qkv", "bias", "output", "frequencies"))
        return Window(shape, qkv, bias, output, frequencies, tensors.get("norm"), epsilon)

    def trained(self, mixer: Mixer, rank: int, generator: Any) -> Any:
        from nbl_export.mixers.window_module import TrainedWindow

        return TrainedWindow(mixer, rank, generator)

    def blank(self, size: int, multiplier: float = 1.0, like: Mixer | None = None) -> Any:
        from nbl_export.mixers.window_module import WindowModule

        return WindowModule(like, multiplier)

    def from_module(self, state: Mapping[str, np.ndarray], size: int, like: Mixer | None = None) -> Window:
        assert isinstance(like, Window)
        norm = None if like.norm is None else state["norm"]
        return dataclasses.replace(like, qkv=state["qkv"], bias=state["bias"], output=state["output"], norm=norm)


WINDOW = _Window()
