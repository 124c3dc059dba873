"""Sizes of a model, from its config.json or the head of its GGUF file alone: no weight is read, and no library loads.

`load.read_spec` reads sizes by transformers, which takes seconds and needs the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.graph.gguf_header import read_header
from nbl_export.methods.checkpoint.source import (
    check_architecture,
    checked_config,
    gguf_config,
    gguf_of,
    hub_config,
    is_hub_id,
    refuse_graph,
)
from nbl_export.model.architectures import ARCHITECTURES, mlp_of
from nbl_export.model.checkpoint.pretrained import read_config
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.mlp import MlpSpec
from nbl_export.trust.contained import check_folder, check_inside, refuse_special
from nbl_export.trust.model_settings import CONFIG_BYTES, read_object

__all__ = ["Shape", "read_shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        decoder: its sizes; windows of attention are left out.
        mlp: sizes of the MLPs.
        tied: the head is the embedding.
        is_gguf: the model is a GGUF file.
        maps_tap: tap of the maps of an NBL checkpoint; "" for another model.
        kinds: of the replaced layers of an NBL checkpoint.
    """

    decoder: DecoderSpec
    mlp: MlpSpec
    tied: bool
    is_gguf: bool = False
    maps_tap: str = ""
    kinds: tuple[str, ...] = ()

    @property
    def layer_parameters(self) -> int:
        """Elements of the matrices of a layer."""
        return self.decoder.projections + self.mlp.elements(self.decoder.hidden_size)

    @property
    def parameters_of_layers(self) -> int:
        """Elements of the matrices of all layers."""
        return self.decoder.num_layers * self.layer_parameters

    @property
    def head_parameters(self) -> int:
        """Elements of the head, and of the embedding."""
        return self.decoder.hidden_size * self.decoder.vocab_size

    @property
    def parameters(self) -> int:
        """Elements of all matrices."""
        return self.parameters_of_layers + self.head_parameters * (1 if self.tied else 2)


def read_shape(model: str | Path) -> Shape:
    """Sizes of a config.json, a checkpoint directory, a GGUF file or a model of the hub.

    Raises:
        NblError: there is no such model, its architecture is not supported, or it does not state its sizes.
    """
    path = Path(model).expanduser()
    if not path.exists() and is_hub_id(str(model)):
        return _of_config(read_object(hub_config(str(model)), CONFIG_BYTES), Path(model, "config.json"))
    if not path.exists():
        raise NblError(f"no model at {model}: give a hub id, a checkpoint directory, a config.json or a .gguf file")
    if path.is_dir():
        check_folder(path)
    else:
        refuse_special(path)
        check_inside(path, path.parent)
    refuse_graph(path)
    gguf = gguf_of(path)
    if gguf is not None:
        return _of_gguf(gguf)
    if path.is_dir():
        return _of_config(read_config(path), path / "config.json")
    if path.suffix != ".json":
        raise NblError(f"{path} is not a model: give a config.json, a checkpoint directory or a .gguf file")
    return _of_config(read_object(path, CONFIG_BYTES), path)


def _of_config(config: dict[str, Any], path: Path) -> Shape:
    config, replaced = checked_config(config, path)
    record = ARCHITECTURES[config["model_type"]]
    heads = config.get("num_attention_heads")
    found = {
        "num_hidden_layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        record.mlp_key: config.get(record.mlp_key),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim"),
        "vocab_size": config.get("vocab_size"),
        "max_position_embeddings": config.get("max_position_embeddings"),
    }
    tied = config.get("tie_word_embeddings", record.tied)
    maps = {"maps_tap": replaced.tap, "kinds": replaced.kinds} if replaced else {}
    return _shape(config, found, path, bool(tied), **maps)


def _of_gguf(path: Path) -> Shape:
    header = read_header(path)
    config = gguf_config(header)
    check_architecture(config, path)
    heads = header.get("attention.head_count")
    found = {
        "block_count": header.get("block_count"),
        "embedding_length": header.get("embedding_length"),
        "feed_forward_length": header.get("feed_forward_length"),
        "attention.head_count": heads,
        "attention.head_count_kv": header.get("attention.head_count_kv") or heads,
        "attention.key_length": header.get("attention.key_length"),
        "tensor token_embd.weight": header.shapes.get("token_embd.weight", (None,))[0],
        "context_length": header.get("context_length"),
    }
    return _shape(config, found, path, "output.weight" not in header.shapes, is_gguf=True)


def _shape(config: Mapping[str, Any], found: Mapping[str, Any], path: Path, tied: bool, **more: Any) -> Shape:
    """The shape of sizes in their order: layers, hidden size, MLP, heads, heads of keys, head, words, positions.

    The size of a head may be missing.

    Args:
        config: the content of config.json, or what a GGUF file states of it.
    """
    for place, (name, value) in enumerate(found.items()):
        is_size = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not is_size and not (place == _HEAD and value is None):
            raise NblError(f"{path} has no usable {name}, a size that an estimate needs; fetch the model again")
    layers, hidden, _, heads, kv_heads, head, words, positions = found.values()
    try:
        mlp = mlp_of(config)
        decoder = DecoderSpec(
            str(config["model_type"]),
            layers,
            hidden,
            heads,
            kv_heads,
            head or max(1, hidden // heads),
            words,
            positions,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise NblError(f"{path} has sizes of no decoder ({error}); fetch the model again") from error
    return Shape(decoder, mlp, tied, **more)


_HEAD = 5  # place of the size of a head
