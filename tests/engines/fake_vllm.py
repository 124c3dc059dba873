"""A vLLM whose Llama is made of the modules of transformers, joined as vLLM joins them.

    layer    hidden, residual = input_layernorm(hidden, residual);  hidden = self_attn(positions, hidden)
             hidden, residual = post_attention_layernorm(hidden, residual);  hidden = mlp(hidden)

As in vLLM 0.32 (model_executor/models/llama.py), a norm adds the residual before it scales. The first layer has none.
It has one rank and no scheduler: what it says of `nbl_export.targets.checkpoint.vllm` is what a forward computes.
Attention has blocks of keys and values if a test asks for steps (`Blocks`), and no cache else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

__all__ = ["Blocks", "ColumnParallelLinear", "Llama", "PPMissingLayer", "ReplicatedLinear", "Spec", "install",
           "vllm_config"]  # fmt: skip

_BLOCK = 4  # tokens
_MISTRAL = {"t_cond": None}  # its layers are called with this
_CONTEXT = SimpleNamespace(attn_metadata=None, slot_mapping={})


class _Linear(nn.Linear):
    """As vLLM's, gives the bias apart unless it is told not to; keeps what it was made with."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, return_bias: bool = True, **settings: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.return_bias, self.settings = return_bias, settings

    def forward(self, hidden: torch.Tensor) -> Any:
        found = super().forward(hidden)
        return (found, None) if self.return_bias else found


class ReplicatedLinear(_Linear):
    pass


class ColumnParallelLinear(_Linear):
    pass


class PPMissingLayer(nn.Identity):
    """In place of a layer of another pipeline stage."""


class _Norm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return self.norm(hidden)
        residual = hidden + residual
        return self.norm(residual), residual


class _Attention(nn.Module):
    def __init__(self, attention: nn.Module, rotary: nn.Module, name: str, context: dict[str, Any]) -> None:
        super().__init__()
        self.theirs, self.rotary = attention, rotary
        self.attn = _Attn(name, attention)
        self.total_num_kv_heads = self.attn.num_kv_heads
        context[name] = self.attn

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if _CONTEXT.attn_metadata is None:
            embeddings = self.rotary(hidden_states, positions[None])
            found: torch.Tensor = self.theirs(hidden_states, position_embeddings=embeddings, attention_mask=None)[0]
            return found
        queries, keys, values = (
            getattr(self.theirs, f"{name}_proj")(hidden_states) for name in ("q", "k", "v")
        )  # fmt: skip
        queries, keys = self.rotary_emb(positions, queries, keys)
        return self.theirs.o_proj(self.attn(queries, keys, values))

    def rotary_emb(self, positions: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor | None) -> Any:
        cos, sin = self.rotary(queries, positions[None])
        turn = sys.modules[type(self.theirs).__module__].apply_rotary_pos_emb

        def rotated(rows: torch.Tensor) -> torch.Tensor:
            heads = rows.unflatten(-1, (-1, self.attn.head_size)).transpose(0, 1)[None]
            found: torch.Tensor = turn(heads, heads, cos, sin)[0][0].transpose(0, 1).flatten(1)
            return found

        return rotated(queries), None if keys is None else rotated(keys)


class _Attn:
    """Attention with blocks of keys and values, as its metadata and slots say."""

    def __init__(self, name: str, theirs: Any) -> None:
        self.layer_name, self.impl = name, self
        self.head_size, self._groups, self._scale = theirs.head_dim, theirs.num_key_value_groups, theirs.scaling
        self.num_kv_heads = theirs.k_proj.out_features // self.head_size
        self.attn_backend: Any = _Backend
        self.kv_cache = torch.full((64, _BLOCK, 2, self.num_kv_heads, self.head_size), torch.nan)

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        return Spec()

    def do_kv_cache_update(
        self, layer: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        cache.flatten(0, 1)[slots] = torch.stack([keys, values], 1)

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        step = _CONTEXT.attn_metadata[self.layer_name]
        queries, keys, values = (part.unflatten(-1, (-1, self.head_size)) for part in (queries, keys, values))
        self.do_kv_cache_update(self, keys, values, self.kv_cache, _CONTEXT.slot_mapping[self.layer_name])
        found = []
        for row, (begin, end) in enumerate(zip(step.query_start_loc, step.query_start_loc[1:], strict=False)):
            seen, count = int(step.seq_lens[row]), int(end - begin)
            held = self.kv_cache[step.block_table_tensor[row]].flatten(0, 1)[:seen].repeat_interleave(self._groups, 2)
            mask = torch.ones(count, seen, dtype=torch.bool).tril(seen - count)
            found.append(nn.functional.scaled_dot_product_attention(
                queries[begin:end].transpose(0, 1), *held.permute(1, 2, 0, 3), attn_mask=mask, scale=self._scale
            ))  # fmt: skip
        return torch.cat(found, 1).transpose(0, 1).flatten(1)


class _Builder:
    kv_cache_spec = SimpleNamespace(block_size=_BLOCK)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        return SimpleNamespace(**vars(common_attn_metadata))


class _Backend:
    @staticmethod
    def get_builder_cls() -> Any:
        return _Builder


@dataclass
class _Common:
    """vLLM's `CommonAttentionMetadata`."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    rswa_prefix_lens: torch.Tensor | None
    num_reqs: int = 0
    num_actual_tokens: int = 0
    max_query_len: int = 0
    max_seq_len: int = 0
    positions: torch.Tensor | None = None
    is_prefilling: torch.Tensor | None = None
    seq_lens_cpu_upper_bound: torch.Tensor | None = None
    _num_computed_tokens_cache: torch.Tensor | None = None
    _token_to_req_indices_cache: torch.Tensor | None = None


class Blocks:
    """Runs steps of a model as vLLM's scheduler orders them."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def step(self, parts: Sequence[tuple[torch.Tensor, int, int, list[int]]]) -> list[torch.Tensor]:
        """Logits of each request's rows.

        Args:
            parts: token ids of a request's rows, the position of the first, tokens of the prompt, and its blocks.
        """
        counts = [len(ids) for ids, *_ in parts]
        places = [torch.arange(start, start + len(ids)) for ids, start, *_ in parts]
        table = torch.tensor([blocks for *_, blocks in parts])
        slots = [table[r][at // _BLOCK] * _BLOCK + at % _BLOCK for r, at in enumerate(places)]
        bounds = torch.tensor([0, *counts]).cumsum(0)
        seen = torch.tensor([int(at[-1]) + 1 for at in places])
        prompts = torch.tensor([prompt for _, _, prompt, _ in parts])
        common = _Common(bounds, bounds, seen, table, torch.cat(slots), prompts)
        steps = {attn.layer_name: attn.attn_backend.get_builder_cls()().build(0, common) for attn in self._attentions()}
        _CONTEXT.attn_metadata, _CONTEXT.slot_mapping = steps, dict.fromkeys(steps, common.slot_mapping)
        try:
            with torch.inference_mode():
                logits = self._model(torch.cat([ids for ids, *_ in parts]), torch.cat(places))
        finally:
            _CONTEXT.attn_metadata = None
        return list(logits.split(counts))

    def _attentions(self) -> list[_Attn]:
        return [layer.self_attn.attn for layer in self._model.model.layers]


class _Layer(nn.Module):
    def __init__(self, theirs: Any, attention: _Attention) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, theirs.mlp
        self.input_layernorm = _Norm(theirs.input_layernorm)
        self.post_attention_layernorm = _Norm(theirs.post_attention_layernorm)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None, t_cond: None = None
    ) -> Any:  # fmt: skip
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions=positions, hidden_states=hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Llama(nn.Module):
    """`LlamaForCausalLM` of one rank; layers that the configuration calls elsewhere are missing."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.theirs, context = vllm_config.theirs, vllm_config.compilation_config.static_forward_context
        inner, name = self.theirs.model, f"{prefix}.model" if prefix else "model"
        self.model, self.norm = nn.Module(), _Norm(inner.norm)
        self.model.layers = nn.ModuleList(
            PPMissingLayer() if i in vllm_config.elsewhere else _Layer(
                layer,
                _Attention(layer.self_attn, inner.rotary_emb, f"{name}.layers.{i}.self_attn.attn", context),
            )
            for i, layer in enumerate(inner.layers)
        )  # fmt: skip

    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        apart = positions is not None  # rows of several requests
        hidden, residual = self.theirs.model.embed_tokens(ids if apart else ids[None]), None
        for layer in self.model.layers:
            hidden, residual = layer(positions if apart else torch.arange(len(ids)), hidden, residual, **_MISTRAL)
        found: torch.Tensor = self.theirs.lm_head(self.norm(hidden, residual)[0])
        return found

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own, loaded = dict(self.named_parameters()), set()
        with torch.no_grad():
            for name, value in weights:
                own[name].copy_(value)
                loaded.add(name)
        return loaded


def vllm_config(
    theirs: Any, *, elsewhere: Iterable[int] = (), pipeline_parallel_size: int = 1, cudagraph: str = "NONE",
    method: str | None = None, **settings: Any,
) -> Any:  # fmt: skip
    """What vLLM hands to a model. `theirs`: the model of transformers. `settings` are of config.json."""
    defaults: dict[str, Any] = {"model_type": "nbl-llama", "nbl_tap": "residual", "nbl_parallel": "replicated"}
    defaults |= dict.fromkeys(("nbl_kinds", "nbl_exit"))
    facts = {name: getattr(theirs.config, name) for name in ("hidden_size", "max_position_embeddings")}
    facts["num_hidden_layers"] = len(theirs.model.layers)
    return SimpleNamespace(
        theirs=theirs, elsewhere=set(elsewhere), quant_config="as asked",
        model_config=SimpleNamespace(hf_config=SimpleNamespace(**{**facts, **defaults, **settings})),
        compilation_config=SimpleNamespace(static_forward_context={}, cudagraph_mode=SimpleNamespace(name=cudagraph)),
        parallel_config=SimpleNamespace(pipeline_parallel_size=pipeline_parallel_size), kv_transfer_config=None,
        speculative_config=None if method is None else SimpleNamespace(method=method),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spec:
    block_size: int = _BLOCK


class _Manager:
    """Says what it was asked for."""

    def __init__(self, kv_cache_spec: Any) -> None:
        self.kv_cache_spec = kv_cache_spec

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, max_length: int, **_others: Any) -> int:
        return max_length

    def cache_blocks(self, request: Any, num_tokens: int, **_others: Any) -> None:
        request.kept = num_tokens


class _Registry:
    @staticmethod
    def _ensure_registered() -> None:
        pass

    @staticmethod
    def register(spec: Any, manager: Any, uniform_type_base_spec: Any) -> None:
        pass


def _with_builder(name: str, backend: Any, builder: Any) -> Any:
    return type(name, (backend,), {"get_builder_cls": staticmethod(lambda: builder)})


def install(patch: pytest.MonkeyPatch) -> None:
    """Make `import vllm` find this, with the names that `nbl_export.targets.checkpoint.vllm.models` imports."""
    stock = ("llama", "mistral", "phi3", "qwen2", "qwen3")
    content: dict[str, dict[str, Any]] = {
        "vllm.distributed": {"get_tensor_model_parallel_rank": int, "get_tensor_model_parallel_world_size": lambda: 1},
        "vllm.forward_context": {"get_forward_context": lambda: _CONTEXT}, "vllm.v1": {}, "vllm.v1.attention": {},
        "vllm.v1.core": {}, "vllm.v1.core.single_type_kv_cache_manager": {"FullAttentionManager": _Manager},
        "vllm.v1.kv_cache_interface": {"FullAttentionSpec": Spec},
        "vllm.v1.kv_cache_spec_registry": {"KVCacheSpecRegistry": _Registry},
        "vllm.v1.attention.backend": {"subclass_attention_backend": _with_builder},
        "vllm": {}, "vllm.config": {"VllmConfig": object}, "vllm.model_executor": {},
        "vllm.model_executor.layers": {}, "vllm.model_executor.models": {},
        "vllm.model_executor.layers.linear": {
            "ColumnParallelLinear": ColumnParallelLinear, "ReplicatedLinear": ReplicatedLinear
        },
        "vllm.model_executor.models.utils": {"PPMissingLayer": PPMissingLayer},
        **{f"vllm.model_executor.models.{name}": {f"{name.capitalize()}ForCausalLM": Llama} for name in stock},
    }  # fmt: skip
    for name, names in content.items():
        module = ModuleType(name)
        vars(module).update(names)
        patch.setitem(sys.modules, name, module)
