"""ONNX Runtime alone: numpy, a session and a token loop, as someone would write it who knows only the graph's names.

python plain_ort.py DIR '{"ids": [...], "new_tokens": 16}'  ->  one line of JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def generate(directory: Path, ids: list[int], new_tokens: int) -> list[int]:
    """Greedy continuation; caches are whatever inputs the graph has, so gaps in their ids do not matter."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(directory / "model.onnx", options, providers=["CPUExecutionProvider"])
    pasts = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    outputs = ["logits", *(i.name.replace("past_key_values", "present") for i in pasts)]
    caches = [np.zeros((1, i.shape[1], 0, _width(directory)), _TYPES[i.type]) for i in pasts]
    known = {i.name for i in session.get_inputs()}
    chunk, length, made = ids, 0, []
    for _ in range(new_tokens):
        length += len(chunk)
        feed = {
            "input_ids": np.array([chunk], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length - len(chunk), length)[None],
            **{i.name: cache for i, cache in zip(pasts, caches, strict=True)},
        }
        logits, *caches = session.run(outputs, {name: value for name, value in feed.items() if name in known})
        chunk = [int(logits[0, -1].argmax())]
        made += chunk
    return made


def _width(directory: Path) -> int:
    return int(json.loads((directory / "genai_config.json").read_text("utf-8"))["model"]["decoder"]["head_size"])


if __name__ == "__main__":
    asked = json.loads(sys.argv[2])
    tokens = generate(Path(sys.argv[1]), asked["ids"], asked["new_tokens"])
    sys.stdout.write(json.dumps({"version": onnxruntime.__version__, "tokens": tokens}) + "\n")
