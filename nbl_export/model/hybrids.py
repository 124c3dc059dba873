"""Layers without attention in hybrid decoders, and what one of them takes without its MLP.

    layer_types    full_attention   conv   full_attention   linear_attention   ...
                   a plan's layers  `----- other layers: never calibrated, scored or replaced

Such a layer holds a state of constant size: the last inputs of its convolution, and a matrix a head if it is recurrent.
Functions read a configuration: that of transformers, or the content of config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nbl_export.errors import NblError

__all__ = ["GATED_DELTA", "SHORT_CONVOLUTION", "UNSUPPORTED", "Others", "Sizes", "beyond_attention", "layer_types"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one layer, by the names of `records.decoder.DecoderSpec`."""

    other_elements: int
    other_multiply_adds: int
    other_output: int
    other_state: int


@dataclass(frozen=True)
class Others:
    """The layers of an architecture that have no attention.

    Attributes:
        kind: their name in layer_types.
        sizes: configuration -> the sizes of one of them.
    """

    kind: str
    sizes: Callable[[Mapping[str, Any]], Sizes]

    def layers(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """These layers, ascending."""
        return tuple(i for i, kind in enumerate(layer_types(config)) if kind == self.kind)

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Their fields of `records.decoder.DecoderSpec`; empty if every layer has attention."""
        layers = self.layers(config)
        return {"others": layers, **asdict(self.sizes(config))} if layers else {}


def layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kind of each layer.

    Raises:
        NblError: the configuration does not say it.
    """
    kinds, count = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is None and config.get("full_attn_idxs") is not None:
        full = config["full_attn_idxs"]
        kinds = ["full_attention" if i in full else "conv" for i in range(count)]
    if kinds is None and config.get("full_attention_interval") is not None:
        every = config["full_attention_interval"]
        kinds = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    if not isinstance(kinds, (list, tuple)) or len(kinds) != count:
        raise NblError(f"the configuration of this {config['model_type']} has no layer_types for its {count} layers")
    return tuple(map(str, kinds))


def _short_convolution(config: Mapping[str, Any]) -> Sizes:
    """in_proj [3D, D], a depthwise convolution, out_proj [D, D]."""
    size, length = config["hidden_size"], config["conv_L_cache"]
    elements = 4 * size * size + size * length
    return Sizes(elements, elements, size * size, size * (length - 1))


def _gated_delta(config: Mapping[str, Any]) -> Sizes:
    """Projections of keys, values, gate and rates, a depthwise convolution, and a matrix [dk, dv] a head.

    A token reads the matrix by its key, changes it, and reads it by its query: three products of dk dv.
    """
    size, length = config["hidden_size"], config["linear_conv_kernel_dim"]
    key, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
    heads, keys = config["linear_num_value_heads"], config["linear_num_key_heads"] * key
    values, width = heads * value, 2 * keys + heads * value
    elements = size * (width + values + 2 * heads) + width * length + values * size
    held = heads * key * value
    return Sizes(elements, elements + 3 * held, values * size, width * (length - 1) + held)


_NO_MAMBA = "its Mamba layers are not passed through, and the GenAI builder (0.18) makes none"
# model_type of a hybrid that is not supported -> why
UNSUPPORTED = {
    "falcon_h1": "attention and a Mamba block run side by side in its layers, and no addition joins attention alone",
    **dict.fromkeys(("bamba", "jamba", "nemotron_h", "zamba2"), _NO_MAMBA),
}


def beyond_attention(config: Mapping[str, Any]) -> str:
    """Why a Granite 4.0 is not supported; empty for one that has attention in every layer, and no experts."""
    kinds = config.get("layer_types") or ("mamba",)  # transformers' default, as are the two below
    if not set(kinds) <= {"attention", "full_attention"}:
        return _NO_MAMBA
    if config.get("num_local_experts", 8) != 0:
        return "it has experts, and the GenAI builder (0.18) makes its shared MLP alone"
    rotated = config.get("position_embedding_type") == "rope"
    return "" if rotated else "its attention has no rotation, and the GenAI builder (0.18) rotates"


SHORT_CONVOLUTION = Others("conv", _short_convolution)
GATED_DELTA = Others("linear_attention", _gated_delta)
