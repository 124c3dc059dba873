"""Restores attention settings that exporters lose, from the checkpoint's configuration.

    windows   GroupQueryAttention(local_window_size=-1)        the window of that layer; none if it sees all tokens
    scale     GroupQueryAttention(scale)                       query_pre_attn_scalar ** -0.5
    tables    GroupQueryAttention(..., cos, sin)               the tables of transformers' own rotary embedding
    root      Gather(embeddings) -- Mul(33.94)                 sqrt(hidden size), not rounded; of a lookup in codes too

The GenAI builder 0.18 loses the windows of Mistral and Phi-3, and linear and yarn scaling. It rounds the root to two
decimals. It turns the windows of Gemma and Qwen2 into ring caches (sliding_window_cache), which only GenAI can begin
with an empty cache. mobius 0.1 loses Qwen2's window, Gemma 3's scale and one of Gemma 3's tables. It writes the root in
half precision, and an attribute unknown to ONNX Runtime if the rotary size is not the head size.

A window counts the token itself, as in transformers. Graphs of other operators do not change: the comparison of the
original with torch (its own check) shows their faults.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.files import read_json
from nbl_export.graph.emitter import register
from nbl_export.graph.files import read_graph
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE
from nbl_export.model.architectures import ARCHITECTURES, windows_of
from nbl_export.model.checkpoint.pretrained import config_of

__all__ = ["restore_attention"]

_LAYER = re.compile(r"^past_key_values\.(\d+)\.key$")
_PAST_KEY = 3  # inputs of GroupQueryAttention
_COS = 7
_SIN = 8
_SHARED = (".cos_cache", ".sin_cache")  # end the names of tables that mobius' graphs look positions up in
_ROUNDING = {4: 1e-3, 2: 1e-2}  # by bytes of an element: equal tables differ by less, other tables by more
_RECENT = 1e-2  # relative distance of a rounded root
_BY_LENGTH = ("longrope", "dynamic")  # tables that depend on the length of the sequence


def restore_attention(checkpoint: Path, out: Path) -> None:
    """Repair model.onnx and genai_config.json of a directory; files without faults keep their bytes."""
    config = config_of(checkpoint)
    model = read_graph(out / GRAPH_FILE)
    nodes = _attention_by_layer(model.graph)
    windows = windows_of(config)
    scalar = ARCHITECTURES[config.model_type].score_scalar
    scale = None if scalar is None else float(getattr(config, scalar)) ** -0.5  # None is (head size) ** -0.5
    changed = [_set_window(node, windows[layer]) for layer, node in nodes.items()]
    changed += [_set_scale(node, scale) for node in nodes.values() if scale is not None]
    changed += [_drop_rotary_size(node) for node in nodes.values()]
    if ARCHITECTURES[config.model_type].embedding_root:
        changed.append(_restore_root(model.graph, math.sqrt(config.hidden_size)))
    changed += _restore_tables(model.graph, nodes, config)
    if any(changed):
        ir.save(model, out / GRAPH_FILE)
    if any(windows):
        _forget_window(out / GENAI_CONFIG)


def _attention_by_layer(graph: ir.Graph) -> dict[int, ir.Node]:
    found = {}
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            past = node.inputs[_PAST_KEY]
            if past is not None and (match := _LAYER.match(past.name or "")):
                found[int(match[1])] = node
    return found


def _set_window(node: ir.Node, window: int | None) -> bool:
    ring = node.attributes.pop("sliding_window_cache", None) is not None
    if node.attributes.get_int("local_window_size", -1) == (window or -1):
        return ring
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window or -1)
    return True


def _drop_rotary_size(node: ir.Node) -> bool:
    return node.attributes.pop("rotary_embedding_dim", None) is not None


def _set_scale(node: ir.Node, scale: float) -> bool:
    if math.isclose(node.attributes.get_float("scale", 0.0), scale, rel_tol=1e-6):
        return False
    node.attributes["scale"] = ir.AttrFloat32("scale", scale)
    return True


def _restore_root(graph: ir.Graph, root: float) -> bool:
    """Replace the factor behind the embeddings by that of transformers; returns whether the graph changed."""
    for node in (n for rows in _embeddings(graph) for n in rows.consumers() if n.op_type == "Mul"):
        for index, value in enumerate(node.inputs):
            given = None if value is None else ir.convenience.get_const_tensor(value)
            if given is None or given.size != 1:
                continue
            array = np.full(given.shape.numpy(), root, given.numpy().dtype)
            number = given.numpy().item()
            exact = array.item()
            if number != exact and math.isclose(number, exact, rel_tol=_RECENT):
                node.replace_input_with(index, register(graph, ir.tensor(array, name="nbl.embedding_root")))
                return True
    return False


def _embeddings(graph: ir.Graph) -> Iterator[ir.Value]:
    """Rows looked up by the token ids, and their first columns if a table in codes has whole blocks only."""
    ids = next(v for v in graph.inputs if v.name == "input_ids")
    for lookup in (n for n in ids.consumers() if n.op_type in ("Gather", "GatherBlockQuantized")):
        yield (rows := lookup.outputs[0])
        yield from (n.outputs[0] for n in rows.consumers() if n.op_type == "Slice")


def _forget_window(path: Path) -> None:
    """Remove the window from the runtime's settings: GenAI would keep caches of two windows and stop behind them."""
    settings = read_json(path)
    if settings["model"]["decoder"].pop("sliding_window", None) is not None:
        path.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _restore_tables(graph: ir.Graph, nodes: dict[int, ir.Node], config: Any) -> list[bool]:
    """Replace each table that a layer reads and that differs from transformers' table; one True for each change."""
    right: dict[str | None, tuple[np.ndarray, np.ndarray] | None] = {}
    done: dict[tuple[str, str | None], ir.Value] = {}
    changed = [] if nodes else [_restore_shared(graph, config)]
    for layer, node in nodes.items():
        kind = config.layer_types[layer] if _differ_by_kind(config) else None
        for index in (_COS, _SIN):
            table = node.inputs[index] if len(node.inputs) > index else None
            if table is None or table.const_value is None:
                continue
            if kind not in right:
                right[kind] = _tables(config, kind)
            exact = (right[kind] or (None, None))[index - _COS]
            if exact is None or not _differs(table, exact):
                continue
            key = (str(table.name), kind)
            given = table.const_value.numpy()
            if key not in done:
                done[key] = register(graph, ir.tensor(exact.astype(given.dtype), name=f"{table.name}.{kind or 'all'}"))
            node.replace_input_with(index, done[key])
            changed.append(True)
    unread = [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]
    for name in unread if any(changed) else ():
        del graph.initializers[name]
    return changed


def _restore_shared(graph: ir.Graph, config: Any) -> bool:
    """The same for the tables that all layers look positions up in, in a graph of other operators."""
    found = [(name, value) for name, value in graph.initializers.items() if name.endswith(_SHARED)]
    wanted = _tables(config, None) if found and not _differ_by_kind(config) else None
    changed = False
    for name, value in found if wanted else ():
        exact = wanted[_SHARED.index("." + name.rpartition(".")[2])] if wanted else None
        if exact is not None and _differs(value, exact):
            given = value.const_value
            value.const_value = ir.tensor(exact.astype(given.numpy().dtype if given else np.float32), name=name)
            changed = True
    return changed


def _differs(value: ir.Value, exact: np.ndarray) -> bool:
    assert value.const_value is not None
    given = value.const_value.numpy()
    same = given.shape == exact.shape
    return not same or np.abs(given.astype(np.float32) - exact).max() >= _ROUNDING[given.itemsize]


def _differ_by_kind(config: Any) -> bool:
    return set(config.rope_parameters or ()) >= {"full_attention", "sliding_attention"}


def _tables(config: Any, kind: str | None) -> tuple[np.ndarray, np.ndarray] | None:
    """cos and sin [positions, rotary size / 2] of transformers; None if they depend on the length of a sequence."""
    import torch
    import transformers

    parameters = config.rope_parameters if kind is None else config.rope_parameters[kind]
    if parameters.get("rope_type") in _BY_LENGTH:
        return None
    classes = ARCHITECTURES[config.model_type].classes
    module = sys.modules[getattr(transformers, f"{classes}ForCausalLM").__module__]
    rotary = getattr(module, f"{classes}RotaryEmbedding")(config)
    positions = torch.arange(config.max_position_embeddings)[None]
    chosen = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
    with torch.inference_mode():
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions, **chosen)
    half = cos.shape[-1] // 2
    size = half if torch.equal(cos[..., :half], cos[..., half:]) else 2 * half  # GPT-OSS: each angle once
    return cos[0, :, :size].numpy(), sin[0, :, :size].numpy()
