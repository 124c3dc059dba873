"""transformers on torch, eager or through torch.compile, from a checkpoint directory.

Eager: a growing cache, the library's default attention. Compiled: one graph for prefill, which makes its own cache,
and one for a decode step on a static cache just large enough; weights frozen, so that inductor packs them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from protocol import Decoder, serve

_BITS = {"fp32": 32, "bf16": 16}


class Eager(Decoder):
    def __init__(self, config: dict[str, Any]) -> None:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(config["threads"])
        torch.set_grad_enabled(False)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config["precision"]]
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(config["model"], dtype=dtype, local_files_only=True).eval()
        self._torch, self._transformers = torch, transformers
        self._cache: Any = None
        self._logits: Any = None
        self.facts = {
            "weight_bits": _BITS[config["precision"]],
            "bits_per_weight": float(_BITS[config["precision"]]),
            "logits": "last",
            "decode": "given tokens",
            "attention": self._model.config._attn_implementation,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def start(self, ids: Sequence[int], limits: int) -> None:
        self._cache = self._transformers.DynamicCache(config=self._model.config)
        if ids:
            self.append(ids)

    def append(self, ids: Sequence[int]) -> None:
        self._logits = self._forward(self._tensor(ids), self._cache)

    def best(self) -> int:
        return int(self._logits[0, -1].argmax())

    def _tensor(self, ids: Sequence[int]) -> Any:
        return self._torch.tensor([list(ids)])

    def _forward(self, ids: Any, cache: Any, **where: Any) -> Any:
        return self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **where).logits


class Compiled(Eager):
    def __init__(self, config: dict[str, Any]) -> None:
        os.environ["TORCHINDUCTOR_FREEZING"] = "1"
        super().__init__(config)
        self._prefill = self._torch.compile(self._fresh, dynamic=False)
        self._step = self._torch.compile(self._forward_at, dynamic=False)
        self._length = 0
        self._static: dict[int, Any] = {}
        self.facts["compile"] = "inductor, static shapes, frozen weights"

    def start(self, ids: Sequence[int], limits: int) -> None:
        self._length = 0
        self._cache = None
        if not ids:
            return
        capacity = len(ids) + limits
        if capacity not in self._static:
            self._static[capacity] = self._transformers.StaticCache(self._model.config, max_cache_len=capacity)
        self._cache = self._static[capacity]
        self._cache.reset()
        self._logits = self._forward_at(self._tensor(ids), self._cache, self._positions(len(ids)))
        self._length = len(ids)

    def append(self, ids: Sequence[int]) -> None:
        if self._cache is None:
            self._logits, _ = self._prefill(self._tensor(ids))
        else:
            if len(ids) > 1:
                raise ValueError("a chunk after cached tokens is not measured for torch.compile")
            self._logits = self._step(self._tensor(ids), self._cache, self._positions(1))
        self._length += len(ids)

    def say(self, ids: Sequence[int], tokens: int) -> list[int]:
        self.start(ids, tokens)
        found = [self.best()]
        while len(found) < tokens:
            self.append(found[-1:])
            found.append(self.best())
        return found

    def _positions(self, count: int) -> Any:
        return self._torch.arange(self._length, self._length + count)[None]

    def _fresh(self, ids: Any) -> Any:
        out = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return out.logits, out.past_key_values

    def _forward_at(self, ids: Any, cache: Any, position_ids: Any) -> Any:
        return self._forward(ids, cache, position_ids=position_ids)


def load(config: dict[str, Any]) -> Decoder:
    return (Compiled if config["variant"] == "compile" else Eager)(config)


if __name__ == "__main__":
    serve(load)
