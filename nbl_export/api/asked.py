"""The options of the main job as a type, for type checkers; `options.options` says what they mean.

`python docs/usage.py` writes this file from the options record.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TypedDict

__all__ = ["Options"]

Path = str | PathLike[str]


class Options(TypedDict, total=False):
    """Options of the main job, all optional: the same names, defaults and rules as on the command line.

    A number may be given where the command line takes text (layers=8), and a list for several (layers=[7, 9]).
    """

    destination: str | None
    engine: str
    provider: str
    precision: str
    decoder_source: str
    layers: str | int | Sequence[int] | None
    max_perplexity_increase: str | float | None
    kv_budget: str | None
    cut: str | int
    near: int | None
    fit: str
    kind: str
    select: str | None
    maps: str
    tap: str
    distill_minutes: float | None
    distill_steps: int | None
    distill_tokens: int
    lora_rank: int
    label_weight: float
    calibration: Path | Sequence[Path]
    calibration_tokens: int
    context: int
    compute_dtype: str
    device: str
    seed: int
    max_seq_len: int | None
    max_batch: int | None
    prefill_chunk: int | None
    logits: str | None
    builder_option: str | Sequence[str]
    quantized_model: Path | None
    depths: int | Sequence[int]
    repetitions: int | None
    prompt_tokens: int | Sequence[int]
    generate_tokens: int | None
    threads: int | Sequence[int] | None
    batches: int | Sequence[int]
