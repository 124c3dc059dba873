"""The child's side of bench/peers: one decoder, one request a line in, one answer a line out. Standard library only.

    argv[1]   {"model": path, "precision": ..., "threads": 2, "capacity": 2048}
    child     {"ready": facts}                                 or {"error": why} and the end
    driver    {"kind": "pp" | "tg", "tokens": T, "ids": [d + T token ids]}
    child     {"ns": duration}                                 or {"error": why}
    driver    {"kind": "say", "tokens": T, "ids": [...]}
    child     {"ids": [T greedy token ids]}

d tokens are brought into the cache untimed; pp runs T more as one chunk, tg runs T steps of one token. Both end when
the logits of the last token are there.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Decoder", "serve"]


class Decoder:
    """What a peer has to offer; the clock is here, so that it is the same for all.

    `facts`: versions, weight_bits (of the matrices, nominal), bits_per_weight (with scales), logits ("last" or "all"
    positions of a prefill), decode ("given tokens" or "greedy").
    """

    facts: dict[str, Any]

    def start(self, ids: Sequence[int], limits: int) -> None:
        """Forget the sequence, run ids into the cache, have room for `room` tokens more."""
        raise NotImplementedError

    def append(self, ids: Sequence[int]) -> None:
        """Run ids as one chunk."""
        raise NotImplementedError

    def best(self) -> int:
        """The likeliest next token."""
        raise NotImplementedError

    def time(self, kind: str, depth_ids: Sequence[int], ids: Sequence[int]) -> int:
        """Nanoseconds of one test."""
        self.start(depth_ids, len(ids))
        chunks = [ids] if kind == "pp" else [[i] for i in ids]
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter_ns()
            for chunk in chunks:
                self.append(chunk)
            return time.perf_counter_ns() - start
        finally:
            gc.enable()

    def say(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Greedy continuation."""
        self.start([], len(ids) + tokens)
        self.append(ids)
        found = [self.best()]
        while len(found) < tokens:
            self.append(found[-1:])
            found.append(self.best())
        return found


def serve(load: Callable[[dict[str, Any]], Decoder]) -> None:
    """Load the decoder that argv[1] describes and answer until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print does not belong among the answers

    def answer(**value: Any) -> None:
        out.write(json.dumps(value) + "\n")

    try:
        start = time.perf_counter()
        decoder = load(json.loads(sys.argv[1]))
        answer(ready={**decoder.facts, "load_seconds": round(time.perf_counter() - start, 3)})
    except Exception as error:  # whatever a foreign library raises is the reason why it is absent
        answer(error=_short(error))
        return
    for line in sys.stdin:
        try:
            answer(**_answer(decoder, json.loads(line)))
        except Exception as error:
            answer(error=_short(error))


def _answer(decoder: Decoder, request: dict[str, Any]) -> dict[str, Any]:
    tokens, ids = request["tokens"], request["ids"]
    if request["kind"] == "say":
        return {"ids": decoder.say(ids, tokens)}
    depth = len(ids) - tokens
    return {"ns": decoder.time(request["kind"], ids[:depth], ids[depth:])}


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else '...' + text[-400:]}"
