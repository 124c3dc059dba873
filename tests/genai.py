"""ONNX Runtime GenAI's own generator on a folder, for tests of batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["said_in_a_batch"]


def said_in_a_batch(directory: Path, prompts: Sequence[Sequence[int]], new_tokens: int, pad: int) -> list[list[int]]:
    """Greedy tokens of each prompt, from one batch that is padded on the right as GenAI pads it."""
    import onnxruntime_genai as og

    model, widest = og.Model(str(directory)), max(map(len, prompts))
    params, longest = og.GeneratorParams(model), widest + new_tokens
    params.set_search_options(max_length=longest, min_length=longest, do_sample=False, batch_size=len(prompts))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([[*p, *[pad] * (widest - len(p))] for p in prompts], np.int32))
    said = []
    for _ in range(new_tokens):
        generator.generate_next_token()
        said.append(generator.get_next_tokens())
    return np.transpose(said).tolist()
