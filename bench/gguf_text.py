"""Greedy text of a graph with a GGUF file's codes, of llama.cpp on the same file, and of torch on its float weights.

    python bench/gguf_text.py RUN > bench/results/gguf-text-<model>.json

RUN is a finished run on a GGUF file with `--precision gguf`. node-llama-cpp has to be installed (docs/serving.md). For
each of 8 prompts and each pair, the result has the number of equal tokens before the first difference, and the margin
of torch's two best logits there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nbl_export.files import versions
from nbl_export.measure.benchmark import machine
from nbl_export.model.torch_decoder import TorchDecoder
from nbl_export.run.deployed import open_finished
from nbl_export.run.progress import Ui
from nbl_export.run_directory import PACKAGES
from nbl_export.targets.gguf.check import PROMPTS
from nbl_export.targets.gguf.engine import LLAMA_CPP
from nbl_export.targets.onnx.engine import ORT

TOKENS = 64
PAIRS = (("onnx runtime", "llama.cpp"), ("onnx runtime", "torch"), ("llama.cpp", "torch"))


def said_by(opened: Any, ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy tokens of each prompt."""
    with opened as runner:
        if hasattr(runner, "begin"):
            runner.begin(max(map(len, ids)) + TOKENS + 1)
        return [[int(i) for i in runner.greedy(row, TOKENS)] for row in ids]


def margin(model: Any, ids: list[int]) -> float:
    """Gap between torch's two best logits behind these ids."""
    with torch.inference_mode():
        best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def compare(model: Any, prompt: list[int], one: list[int], other: list[int]) -> dict[str, Any]:
    same = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    differs = same < min(len(one), len(other))
    return {"equal": same, "margin": margin(model, [*prompt, *one[:same]]) if differs else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run: Path = parser.parse_args().run
    with open_finished(run, Ui(quiet=True)) as found:
        file, model = found.source.value.gguf, found.model.value
        with LLAMA_CPP.open_runner(file) as runner:
            prompts = [list(runner.encode(text, chat=False)) for text in PROMPTS]
        said = {
            "onnx runtime": said_by(ORT.open_runner(run / "original", None), prompts),
            "llama.cpp": said_by(LLAMA_CPP.open_runner(file), prompts),
            "torch": [TorchDecoder(model).greedy(ids, TOKENS) for ids in prompts],
        }
        rows = [
            {"prompt": text, **{f"{a}, {b}": compare(model, ids, said[a][k], said[b][k]) for a, b in PAIRS}}
            for k, (text, ids) in enumerate(zip(PROMPTS, prompts, strict=True))
        ]
    json.dump(
        {"machine": machine(), "versions": versions(PACKAGES), "model": file.name, "tokens": TOKENS, "rows": rows},
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
