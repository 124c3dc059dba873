"""What vLLM's prefix cache keeps of a model with a cut, so that an answer does not depend on other requests.

    tokens of a prompt    0 .. P-W-1                           P-W .. P-1       behind the prompt
    upper layers hold     the first one's keys, predicted      own keys         own keys
    other prompts read    yes, up to W tokens before their end no               no

Keys of a token are its own near the end of a prompt, and predicted in a longer prompt. A block with own keys is not
kept, and the last W tokens of a prompt are always computed. vLLM asks the class of a layer's cache for both.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

__all__ = ["CutManager", "CutSpec", "keep_predicted"]


@dataclass(frozen=True, kw_only=True)
class CutSpec(FullAttentionSpec):
    """The cache of a layer in a model with a cut.

    Attributes:
        near: W.
    """

    near: int

    @classmethod
    def of(cls, stock: Any, near: int) -> CutSpec:
        """The cache that a stock layer asks for."""
        return cls(**{field.name: getattr(stock, field.name) for field in fields(FullAttentionSpec)}, near=near)

    @classmethod
    def merge(cls, specs: list[Any]) -> CutSpec:
        """The cache of a group of layers."""
        return cls.of(FullAttentionSpec.merge(specs), specs[0].near)


class CutManager(FullAttentionManager):
    """Blocks of a model with a cut."""

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any) -> Any:
        """Blocks of other prompts up to W tokens before the end; `max_length` is all tokens but one."""
        far = max(0, max_length + 1 - kwargs["kv_cache_spec"].near)
        return super().find_longest_cache_hit(block_hashes, far, *args, **kwargs)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Keep a request's full blocks of predicted keys."""
        far = max(0, request.num_prompt_tokens - self.kv_cache_spec.near)
        super().cache_blocks(request, min(num_tokens, far), *args, **kwargs)


def keep_predicted(attention: Any, near: int) -> None:
    """Let an attention layer ask for a cache that keeps predicted keys only."""
    stock = attention.get_kv_cache_spec
    attention.get_kv_cache_spec = lambda vllm_config: CutSpec.of(stock(vllm_config), near)


# A process that unpickles a `CutSpec` imports this module. vLLM registers its own only if there are none.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(CutSpec, CutManager, uniform_type_base_spec=FullAttentionSpec)
