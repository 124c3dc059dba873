"""optimum-onnx's ORTModelForCausalLM, run by the Python of an environment of its own (it needs transformers 4).

python optimum_onnx.py DIR '{"prompt": "...", "chat": true, "new_tokens": 16}'  ->  one line of JSON
"""

from __future__ import annotations

import importlib.metadata
import json
import sys

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def generate(directory: str, asked: dict[str, object]) -> dict[str, object]:
    """Greedy continuation by `generate`, and the prompt's ids by transformers' tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = ORTModelForCausalLM.from_pretrained(directory, provider="CPUExecutionProvider")
    text = str(asked["prompt"])
    if asked["chat"]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )  # fmt: skip
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=not asked["chat"])
    out = model.generate(**prompt, max_new_tokens=int(str(asked["new_tokens"])), do_sample=False)
    ids = prompt["input_ids"][0].tolist()
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("optimum-onnx", "transformers", "onnxruntime")
    ]
    return {"version": ", ".join(versions), "prompt_ids": ids, "tokens": out[0, len(ids) :].tolist()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(generate(sys.argv[1], json.loads(sys.argv[2]))) + "\n")
