"""What vLLM's prefix cache keeps of a model with an exit layer, so that an answer does not depend on other requests.

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

__all__ = ["ExitManager", "ExitSpec", "keep_predicted"]


@dataclass(frozen=True, kw_only=True)
class ExitSpec(FullAttentionSpec):
    """The cache of a layer in a model with an exit layer.

    Attributes:
        recent_tokens: W.
    """

    recent_tokens: int

    @classmethod
    def of(cls, stock: Any, recent_tokens: int) -> ExitSpec:
        """The cache that a stock layer asks for."""
        return cls(
            **{field.name: getattr(stock, field.name) for field in fields(FullAttentionSpec)},
            recent_tokens=recent_tokens,
        )

    @classmethod
    def merge(cls, specs: list[Any]) -> ExitSpec:
        """The cache of a group of layers."""
        return cls.of(FullAttentionSpec.merge(specs), specs[0].recent_tokens)


class ExitManager(FullAttentionManager):
    """Blocks of a model with an exit layer."""

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any) -> Any:
        """Blocks of other prompts up to W tokens before the end; `max_length` is all tokens but one."""
        skipped = max(0, max_length + 1 - kwargs["kv_cache_spec"].recent_tokens)
        return super().find_longest_cache_hit(block_hashes, skipped, *args, **kwargs)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Keep a request's full blocks of predicted KV."""
        skipped = max(0, request.num_prompt_tokens - self.kv_cache_spec.recent_tokens)
        super().cache_blocks(request, min(num_tokens, skipped), *args, **kwargs)


def keep_predicted(attention: Any, recent_tokens: int) -> None:
    """Let an attention layer ask for a cache that keeps predicted KV only."""
    stock = attention.get_kv_cache_spec
    attention.get_kv_cache_spec = lambda vllm_config: ExitSpec.of(stock(vllm_config), recent_tokens)


# A process that unpickles a `CutSpec` imports this module. vLLM registers its own only if there are none.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(ExitSpec, ExitManager, uniform_type_base_spec=FullAttentionSpec)
