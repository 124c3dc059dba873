"""Converts a torch decoder to an OpenVINO model whose caches are inputs and outputs.

    input_ids [B, T], attention_mask [B, K], position_ids [B, T], past_key_values.i.{key,value} [B, Hkv, P, head]
        └─► logits [B, T, V], present.i.{key,value} [B, Hkv, P + T, head]         K = P + T

OpenVINO's own front end converts the traced module. transformers builds masks for torch's arithmetic, so this module
builds them, from positions and the attention mask; a layer with a sliding window gets a mask with the window. The
caches hold all tokens.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from nbl_export.errors import NblError
from nbl_export.model.architectures import windows_of

__all__ = ["LOWEST", "convert"]

LOWEST = torch.finfo(torch.float16).min  # of a masked score: bfloat16 and float16 hold it
_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask")  # as transformers' decoders call them
_PAST = "past_key_values."
_PRESENT = "present."


class _Caches:
    """Caches as transformers' layers update them: new keys and values behind the old.

    Args:
        pasts: by the ends of their names, such as 0.key.
    """

    is_compileable = False

    def __init__(self, pasts: Mapping[str, torch.Tensor]) -> None:
        self.held = dict(pasts)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        both = {f"{layer}.key": keys, f"{layer}.value": values}
        self.held |= {name: torch.cat([self.held[name], new], dim=-2) for name, new in both.items()}
        return tuple(self.held[name] for name in both)

    def get_seq_length(self, *_: Any) -> int:
        return int(next(iter(self.held.values())).shape[-2])

    def __len__(self) -> int:
        return len(self.held) // 2


def _names_of(config: Any) -> list[str]:
    """The ends of the names of all caches."""
    return [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]


class _Step(nn.Module):
    """One step of a decoder, with flat caches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        arguments = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in arguments else "past_key_values"
        self._window = next(filter(None, windows_of(model.config)), None)
        self._names = _names_of(model.config)

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *pasts: Any) -> Any:
        caches = _Caches(dict(zip(self._names, pasts, strict=True)))
        masks = _masks(input_ids, attention_mask, position_ids, self._window)
        with _given(self.model, masks):
            out = self.model(
                input_ids=input_ids,
                attention_mask=masks[0],
                position_ids=position_ids,
                use_cache=True,
                **{self._cache_name: caches},
            )
        return (out.logits, *caches.held.values())


def _masks(ids_BT: Any, mask_BK: Any, position_BT: Any, window: int | None) -> tuple[Any, Any]:
    """Additive masks [B, 1, T, K]: of all tokens up to a token, and of those in its window, itself included."""
    new = ids_BT.shape[1]
    total = mask_BK.shape[1]
    columns = torch.arange(total)
    own = torch.arange(new) + (total - new)
    seen = (columns[None, :] <= own[:, None])[None, None] & (mask_BK != 0)[:, None, None, :]
    full = torch.where(seen, 0.0, LOWEST)
    if window is None:
        return full, full
    place_BK = torch.cumsum(mask_BK, 1) - 1  # padding does not count as distance
    near = place_BK[:, None, None, :] > (position_BT - window)[:, None, :, None]
    return full, torch.where(seen & near, 0.0, LOWEST)


@contextlib.contextmanager
def _given(model: Any, masks: tuple[Any, Any]) -> Iterator[None]:
    """Within: the decoder's own module makes these masks instead of its own."""
    module = sys.modules[type(model.get_decoder()).__module__]
    made = {name: mask for name, mask in zip(_MASKS, masks, strict=True) if hasattr(module, name)}
    with contextlib.ExitStack() as stack:
        for name, mask in made.items():
            stack.enter_context(mock.patch.object(module, name, lambda *_, mask=mask, **__: mask))
        yield


def convert(model: Any) -> Any:
    """The OpenVINO model of a torch decoder, with named inputs and outputs and dynamic batch and tokens."""
    import openvino

    config = model.config
    _check_rotary(config)
    _trace_experts(config)
    _compute_in_float32(model)
    batch = 2
    new = 3
    past = 5
    heads = config.num_key_value_heads
    names = _names_of(config)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    pasts = [torch.zeros(batch, heads, past, size) for _ in names]
    inputs: Mapping[str, torch.Tensor] = {
        "input_ids": torch.zeros(batch, new, dtype=torch.int64),
        "attention_mask": torch.ones(batch, new + past, dtype=torch.int64),
        "position_ids": torch.arange(past, past + new).repeat(batch, 1),
    }
    with torch.no_grad():
        found = openvino.convert_model(_Step(model).eval(), example_input=(*inputs.values(), *pasts))
    for port, name in zip(found.inputs, [*inputs, *(_PAST + name for name in names)], strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        kind = openvino.Type.i64 if name in inputs else openvino.Type.f32
        port.get_node().set_element_type(kind)
        dims = [-1, -1] if name in inputs else [-1, heads, -1, size]
        port.get_node().set_partial_shape(openvino.PartialShape(dims))
    for port, name in zip(found.outputs, ["logits", *(_PRESENT + name for name in names)], strict=True):
        port.get_tensor().set_names({name})
    found.validate_nodes_and_infer_types()
    _fold_sizes(found)
    return found


def _compute_in_float32(model: Any) -> None:
    """Have matrices of 16 bits stay as they are and be converted behind their constants. Vectors become float32.

    OpenVINO's patch, which optimum-intel uses too, makes constants of the mapped file's memory.
    """
    from openvino.frontend.pytorch import patch_model

    if model.dtype == torch.float32:
        return
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data = module.bias.data.float()
    getattr(patch_model, "__make_16bit_traceable")(model)


def _trace_experts(config: Any) -> None:
    """Have layers with experts computed by products that can be traced: every expert, times its share of the token."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_EVERY_EXPERT, _every_expert)
    config._experts_implementation = _EVERY_EXPERT


_EVERY_EXPERT = "nbl-every-expert"


def _every_expert(experts: Any, x_TD: Any, chosen_TK: Any, share_TK: Any) -> Any:
    """The output of transformers' experts, without a choice that depends on the tokens."""
    share_TE = x_TD.new_zeros(x_TD.shape[0], experts.num_experts).scatter(1, chosen_TK, share_TK.to(x_TD.dtype))
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _expert_product(experts, first, x_TD.expand(experts.num_experts, *x_TD.shape))
    outer = _expert_product(
        experts, "down_proj", experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    )
    return (outer * share_TE.T[..., None]).sum(0)


def _expert_product(experts: Any, name: str, x_ETK: Any) -> Any:
    weight = getattr(experts, name)
    out = torch.bmm(x_ETK, weight if experts.is_transposed else weight.transpose(1, 2))
    return out + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else out


def _check_rotary(config: Any) -> None:
    """Refuse rotary embeddings that change with the length of the sequence: a trace has one table.

    Raises:
        NblError: the type is longrope.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "longrope" in (rope.get("rope_type"), rope.get("type")):
        raise NblError(
            "rotary embeddings of type 'longrope' change at a sequence length, and a traced graph has one table; "
            "use --engine ort"
        )


def _fold_sizes(model: Any) -> None:
    """Turn sizes that follow from fixed dimensions into constants, such as the width of half a gated MLP."""
    from openvino import opset13 as ops
    from openvino.passes import ConstantFolding, Manager

    for node in model.get_ordered_ops():
        source = node.input_value(0).get_node() if node.get_type_name() == "Gather" else None
        if source is None or source.get_type_name() != "ShapeOf":
            continue
        place = node.input_value(1).get_node()
        dims = source.get_input_partial_shape(0)
        if place.get_type_name() != "Constant" or dims.rank.is_dynamic:
            continue
        found = [dims[int(k)] for k in np.atleast_1d(place.get_data()).ravel()]
        if all(dim.is_static for dim in found):
            sizes = np.array([dim.get_length() for dim in found]).reshape(place.get_output_shape(0))
            kind = node.get_output_element_type(0)
            known = ops.constant(sizes.astype(kind.to_dtype()))
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(known.output(0))
    folding = Manager()
    folding.register_pass(ConstantFolding())
    folding.run_passes(model)
