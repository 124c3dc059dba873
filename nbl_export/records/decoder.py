"""Sizes of a decoder; inputs and outputs of its graph."""

from __future__ import annotations

from dataclasses import dataclass

from nbl_export.records.from_json import require

__all__ = ["HYBRID", "MOST_LAYERS", "MOST_POSITIONS", "MOST_SIZE", "DecoderSpec", "GraphContract", "TensorInfo"]


MOST_LAYERS = 1024  # real decoders have at most a few hundred
MOST_POSITIONS = 1 << 24  # real decoders have at most ten million
MOST_SIZE = 1 << 24  # vocabularies, the largest sizes, have a few hundred thousand
HYBRID = (  # why hybrid models are not supported
    "only about a quarter of the layers of a hybrid model are attention, so replacing them gains about 1% of a prompt"
)


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes of a decoder, under the same names for all architectures.

    sliding_window: of the layers that have a window. full_layers: layers that see all tokens despite `sliding_window`.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "full_layers", tuple(self.full_layers))  # JSON has no tuples
        require(1 <= self.num_layers <= MOST_LAYERS, f"a decoder has 1 to {MOST_LAYERS} layers")
        require(self.max_positions <= MOST_POSITIONS, f"a decoder has at most {MOST_POSITIONS:,} positions")
        sizes = (self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, self.vocab_size)
        require(min(*sizes, self.max_positions) >= 1, "the sizes of a decoder are at least 1")
        require(max(sizes) <= MOST_SIZE, f"the sizes of a decoder are at most {MOST_SIZE:,}")
        require(self.num_heads % self.num_kv_heads == 0, "query heads are a multiple of key/value heads")

    @property
    def projections(self) -> int:
        """Elements of one attention's matrices: of queries, keys, values, and what comes out."""
        return self.hidden_size * 2 * (self.num_heads + self.num_kv_heads) * self.head_dim

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token attends to in a layer, itself included; None for all."""
        return None if layer in self.full_layers else self.sliding_window

    def cache_bytes_per_token(self, kept_layers: int, itemsize: int) -> int:
        """Cache bytes of one token of one sequence: kept layers x 2 (key, value) x Hkv x head x itemsize."""
        return kept_layers * 2 * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class TensorInfo:
    """Name, element type (ONNX spelling, lower case) and dimensions (int, or the name of a symbol)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphContract:
    """Inputs and outputs of a decoder graph, and the layers that keep a cache."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    cache_layers: tuple[int, ...]

    @property
    def logits(self) -> str:
        """ "last" if logits are [B, 1, V], for each row's last token; "all" if logits are [B, T, V]."""
        shape = next((o.shape for o in self.outputs if o.name == "logits"), ())
        return "last" if len(shape) == 3 and shape[1] == 1 else "all"

    def cache_bytes_per_token(self, head_dim: int) -> int:
        """Cache bytes of one token of one sequence, from the shapes of the cache inputs.

        head_dim is the last dimension if the exporter gives a symbol, as the GenAI builder does.

        Raises:
            ValueError: a stated head size differs from head_dim, or the number of heads is not fixed.
        """
        total = 0
        for info in self.inputs:
            if not info.name.startswith("past_key_values."):
                continue
            heads = info.shape[1]
            stated = info.shape[3]
            require(isinstance(heads, int), f"{info.name} has no fixed number of heads")
            require(not isinstance(stated, int) or stated == head_dim, f"{info.name} has head size {stated}")
            total += int(heads) * head_dim * ITEMSIZE[info.dtype]
        return total


ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
