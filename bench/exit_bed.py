"""A decoder with its keys and values in the open, and closed-form maps of exit layers, for experiments on them.

Decoders are of Llama's or Qwen2's layers, in torch in float32, one sequence at a time. Letters of shapes: T tokens of a
sequence, N rows that continue, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nbl_export.methods.predicted_kv.module import features

__all__ = ["Caches", "Layers", "Ridge", "fit", "predicted", "read_by"]

Caches = list[tuple[torch.Tensor, torch.Tensor]]  # rotated keys and values [H, T, head size] of each layer
_POSITIONS = 8192
_EPSILON = 1e-6
_RIDGE = 1e-3  # of the mean of the diagonal


class Layers:
    """The layers of a causal LM of transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.blocks = self.decoder.layers
        self.size = self.blocks[0].self_attn.head_dim
        self._tables = tuple(t[0] for t in self.decoder.rotary_emb(torch.zeros(1), torch.arange(_POSITIONS)[None]))

    def split(self, x_TK: torch.Tensor) -> torch.Tensor:
        """[H, T, head size]."""
        return x_TK.view(len(x_TK), -1, self.size).transpose(0, 1)

    def rotate(self, x_HTD: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        cosines, sines = (table[places][None] for table in self._tables)
        return apply_rotary_pos_emb(x_HTD[None], x_HTD[None], cosines, sines)[0][0]

    def products(self, layer: int, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [T, .], before rotary embedding, of the stream that enters a layer."""
        normed = self.blocks[layer].input_layernorm(x_TD)
        q, k, v = (getattr(self.blocks[layer].self_attn, f"{name}_proj")(normed) for name in "qkv")
        return q, k, v

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """Of the stream behind the last layer."""
        return self.model.lm_head(self.decoder.norm(x_ND))

    def whole(self, ids_T: torch.Tensor) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, ...]]]:
        """Streams that enter each layer, the one behind the last, and each layer's products, of a whole sequence."""
        places = torch.arange(len(ids_T))
        streams = [self.decoder.embed_tokens(ids_T)]
        products = []
        for layer in range(len(self.blocks)):
            q, k, v = self.products(layer, streams[-1])
            products.append((q, k, v))
            query, key = (self.rotate(self.split(x), places)[None] for x in (q, k))
            read = scaled_dot_product_attention(query, key, self.split(v)[None], is_causal=True, enable_gqa=True)[0]
            streams.append(self._behind(layer, streams[-1], read))
        return streams, products

    def above(
        self, x_ND: torch.Tensor, places_N: torch.Tensor, exit_layer: int, caches: Caches, held_T: Any = None
    ) -> Any:
        """Rows through the layers from an exit layer up; their own keys and values go into the caches.

        Args:
            x_ND: their stream at the exit layer. places_N: their positions, ascending.
            held_T: which positions have keys; None for all.
        """
        end = int(places_N[-1]) + 1
        seen_NT = torch.arange(end)[None] <= places_N[:, None]
        if held_T is not None:
            held_T[places_N] = True
            seen_NT &= held_T[:end]
        for layer, (keys, values) in enumerate(caches, exit_layer):
            q, k, v = self.products(layer, x_ND)
            keys[:, places_N] = self.rotate(self.split(k), places_N)
            values[:, places_N] = self.split(v)
            query = self.rotate(self.split(q), places_N)[None]
            key, value = keys[None, :, :end], values[None, :, :end]
            read = scaled_dot_product_attention(query, key, value, seen_NT, enable_gqa=True)[0]
            x_ND = self._behind(layer, x_ND, read)
        return x_ND

    def attention(self, products: Sequence[torch.Tensor], first: int = 0) -> torch.Tensor:
        """Attention [H, T - first, T] of the queries from position `first` on, by a layer's products."""
        places = torch.arange(len(products[0]))
        q = self.rotate(self.split(products[0]), places)[:, first:]
        k = self.rotate(self.split(products[1]), places)
        k = k.repeat_interleave(len(q) // len(k), 0)
        scores = q @ k.mT / self.size**0.5
        return scores.masked_fill(places > places[first:, None], -torch.inf).softmax(2)

    def caches(self, keys_values: Sequence[torch.Tensor]) -> Caches:
        """Caches of keys and values [T, .] by turns, before rotary embedding."""
        places = torch.arange(len(keys_values[0]))
        pairs = zip(keys_values[::2], keys_values[1::2], strict=True)
        return [(self.rotate(self.split(k), places).clone(), self.split(v).clone()) for k, v in pairs]

    def _behind(self, layer: int, x_ND: torch.Tensor, read_HND: torch.Tensor) -> torch.Tensor:
        block = self.blocks[layer]
        x_ND = x_ND + block.self_attn.o_proj(read_HND.transpose(0, 1).flatten(1))
        return x_ND + block.mlp(block.post_attention_layernorm(x_ND))


class Ridge:
    """A linear map with a bias in closed form, from sums."""

    def __init__(self) -> None:
        self._xx: Any = 0.0
        self._xy: Any = 0.0
        self._weight: Any = None

    def add(self, x_NF: torch.Tensor, y_NK: torch.Tensor) -> None:
        x_NF = _with_one(x_NF)
        self._xx = self._xx + (x_NF.T @ x_NF).double()
        self._xy = self._xy + (x_NF.T @ y_NK).double()

    def __call__(self, x_NF: torch.Tensor) -> torch.Tensor:
        if self._weight is None:
            ridge = self._xx.diagonal().mean() * _RIDGE * torch.eye(len(self._xx))
            self._weight = torch.linalg.solve(self._xx + ridge, self._xy).float()
        return _with_one(x_NF) @ self._weight


def _with_one(x_NF: torch.Tensor) -> torch.Tensor:
    return torch.cat([x_NF, torch.ones(len(x_NF), 1)], 1)


def read_by(stream_TD: torch.Tensor) -> torch.Tensor:
    """What the maps of an exit layer read, [T, 2 D]."""
    return features(stream_TD[None], _EPSILON)[0]


def fit(layers: Layers, rows_WT: torch.Tensor, exits: Sequence[int]) -> dict[int, Ridge]:
    """Maps to the keys and values of all layers above each exit layer."""
    found = {exit_layer: Ridge() for exit_layer in exits}
    for ids_T in rows_WT:
        streams, products = layers.whole(ids_T)
        for exit_layer, ridge in found.items():
            y_TK = torch.cat([part for given in products[exit_layer + 1 :] for part in given[1:]], 1)
            ridge.add(read_by(streams[exit_layer])[1:], y_TK[1:])
    return found


def predicted(layers: Layers, ridge: Ridge, exit_layer: int, stream_TD: torch.Tensor, own: Sequence[Any]) -> Caches:
    """Caches of the layers from an exit layer up, predicted at all positions.

    Args:
        own: products of the exit layer itself, which are exact.
    """
    given = ridge(read_by(stream_TD)).split(own[1].shape[1], 1)
    return layers.caches([*own[1:], *given])
