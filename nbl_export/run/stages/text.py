"""The text stage: both texts of a job are read, tokenised and split once; every later stage reads the rows.

    --calibration ─► documents ─┐
    second text ────────────────┴─► token ids ─► text.safetensors (`text.parts`), hashes in nbl.json

A job that goes on reads the file, and neither the sources nor the hub.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.records.inputs import Lazy
from nbl_export.run.job import Job
from nbl_export.run.stages.common import StageContext
from nbl_export.run_directory import TEXT_FILE
from nbl_export.text.corpus import Corpus, stdlib_text
from nbl_export.text.retrieval import RECIPE, row_length
from nbl_export.text.windows import DIVISION

__all__ = ["TextInputs", "declare", "run"]


@dataclass(frozen=True)
class TextInputs:
    """What the rows follow from.

    Attributes:
        fingerprint: of the model, whose tokenizer reads the text.
        sources: see `text.mixture.identify`.
        distill_tokens: of the text that maps are trained on; always split, so that another fit reads no text again.
        division: see `text.windows`. recipe: see `text.retrieval`.
        item_length: tokens of a row of retrieval items; 0 if there are none.
        documents: the calibration text.
        second: the text that nobody calibrates on.
    """

    fingerprint: str
    sources: list[Any]
    calibration_tokens: int
    context: int
    distill_tokens: int
    division: list[Any]
    recipe: list[Any]
    item_length: int
    vocab_size: int
    documents: Lazy[Corpus]
    second: Lazy[Corpus]
    tokenizer: Lazy[Any]


def declare(job: Job) -> TextInputs:
    """The inputs of the stage."""
    options = job.options
    return TextInputs(
        fingerprint=job.fingerprint,
        sources=job.sources,
        calibration_tokens=options.calibration_tokens,
        context=options.context,
        distill_tokens=options.distill_tokens,
        division=DIVISION,
        recipe=RECIPE,
        item_length=row_length(options.context, job.decoder.max_positions),
        vocab_size=job.decoder.vocab_size,
        documents=job.documents,
        second=Lazy(None, stdlib_text),
        tokenizer=job.tokenizer,
    )


def run(inputs: TextInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write text.safetensors; returns names, hashes and sizes for the manifest."""
    from nbl_export.text import parts
    from nbl_export.text.retrieval import retrieval_parts

    text = inputs.documents.value
    second = inputs.second.value
    context = inputs.context
    rows = parts.split_rows(
        text, inputs.tokenizer.value, inputs.calibration_tokens, context, inputs.distill_tokens, inputs.vocab_size
    )
    if second.sha256 != text.sha256:
        rows |= parts.split_second(second, inputs.tokenizer.value, context, inputs.vocab_size)
    rows |= retrieval_parts(inputs.tokenizer.value, inputs.item_length, inputs.vocab_size)
    hashes = parts.save(rows, out / TEXT_FILE)
    inputs.documents.forget()
    facts = {
        "name": text.name,
        "sha256": text.sha256,
        "mix": [dataclasses.asdict(part) for part in text.parts],
        "tokens": int(rows["windows"].numel()),
        "context": context,
        "second": second.name,
        "parts": hashes,
    }
    return {"text": facts}
