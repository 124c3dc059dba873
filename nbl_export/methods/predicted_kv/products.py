"""The products of an attention module of transformers that give keys and values, and the module's own code around them.

    x --- q_proj ------------------------------+
    x --- k_proj --- (norm) --- (rotary) ------+-- attention function --- o_proj --- y
    x --- v_proj ------------------------------+        of AttentionInterface

Keys and values are what the products give. So the module's own code norms and rotates predicted ones, whatever its
architecture does there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.model.architectures import architecture_of

__all__ = ["KeyValueProducts", "attention_by", "epsilon_of", "norm_of", "taken_keys"]

_NAME = "nbl_export"  # among the attention functions of transformers
_OLMO_EPSILON = 1e-5


@dataclass(frozen=True)
class KeyValueProducts:
    """The products of one attention module.

    Attributes:
        modules: of keys and of values; twice the same if one product gives queries, keys and values.
        places: of keys and of values [K] in the outputs of these modules.
        queries: the product of queries alone, if there is one.
        width: K.
    """

    modules: tuple[Any, Any]
    places: tuple[slice, slice]
    queries: Any
    width: int

    @classmethod
    def of(cls, attention: Any, config: Any, layer: int) -> KeyValueProducts:
        """Raises NblError: the module has no such products."""
        fused = getattr(attention, architecture_of(config).fused_qkv or "", None)
        if fused is not None:
            width = attention.num_key_value_heads * attention.head_dim
            first = fused.out_features - 2 * width
            places = slice(first, first + width), slice(first + width, None)
            return cls((fused, fused), places, None, width)
        keys, values = (getattr(attention, name, None) for name in ("k_proj", "v_proj"))
        if keys is None or values is None or keys.out_features != values.out_features:
            raise NblError(f"layer {layer}: its keys cannot be predicted: it has no products of keys and of values")
        return cls((keys, values), (slice(None), slice(None)), attention.q_proj, keys.out_features)

    def hooks(self, take: Callable[[int, torch.Tensor], None]) -> list[Any]:
        """Hooks that give keys (half 0) and values (half 1) [B, T, K] of each step to `take`."""

        def hook(half: int) -> Any:
            return lambda _product, _args, output: take(half, output[..., self.places[half]])

        return [module.register_forward_hook(hook(half)) for half, module in enumerate(self.modules)]

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrix [2 K, D] and the bias [2 K] of keys and values, in float32."""
        pairs = tuple(zip(self.modules, self.places, strict=True))
        weight = torch.cat([module.weight[place].float() for module, place in pairs])
        return weight, torch.cat([_bias(module)[place] for module, place in pairs])

    @contextlib.contextmanager
    def giving(self, keys_BTK: torch.Tensor, values_BTK: torch.Tensor) -> Iterator[None]:
        """The products give these keys and values, and queries of zeros."""
        rows = (keys_BTK, values_BTK)
        if self.queries is None:
            zeros = keys_BTK.new_zeros(*keys_BTK.shape[:2], self.places[0].start)
            given = {self.modules[0]: torch.cat([zeros, *rows], 2)}
        else:
            zeros = keys_BTK.new_zeros(*keys_BTK.shape[:2], self.queries.out_features)
            given = {self.queries: zeros, **dict(zip(self.modules, rows, strict=True))}
        for module, value in given.items():
            module.forward = lambda _x, value=value: value
        try:
            yield
        finally:
            for module in given:
                del module.forward


def _bias(product: Any) -> torch.Tensor:
    return product.weight.new_zeros(product.out_features).float() if product.bias is None else product.bias.float()


@contextlib.contextmanager
def attention_by(config: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Attention modules of a configuration call this function (transformers' AttentionInterface)."""
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, function)
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


class _Taken(Exception):
    """What reached the attention function."""


def taken_keys(
    attention: Any, products: KeyValueProducts, rows: tuple[torch.Tensor, torch.Tensor], given: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, heads, T, head size] as the module attends to them, and as it puts them into a cache.

    Args:
        rows: what the products give, [B, T, K] each. given: arguments of the module's forward for these rows.
    """

    def take(_module: Any, _query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
        raise _Taken(key, value)

    with products.giving(*rows), attention_by(attention.config, take):
        try:
            type(attention).forward(attention, rows[0], **given)
        except _Taken as taken:
            keys, values = taken.args
            return keys, values
    raise NblError(f"{type(attention).__name__} does not call transformers' attention functions")


def norm_of(layer: Any, config: Any) -> Any:
    """The norm before a layer's attention, or behind it if none stands before."""
    record = architecture_of(config)
    return getattr(layer, record.norm_before or record.norm_after or "")


def epsilon_of(norm: Any) -> float:
    """The epsilon of a norm; OLMo's states none (transformers, modeling_olmo.py)."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", _OLMO_EPSILON)))
