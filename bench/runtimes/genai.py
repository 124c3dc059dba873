"""ONNX Runtime GenAI as its own examples use it: the directory as it is, its own tokenizer and generator.

python genai.py DIR '{"prompt": "...", "chat": true, "new_tokens": 16}'  ->  one line of JSON
"""

from __future__ import annotations

import json
import sys

import onnxruntime_genai as og


def generate(directory: str, asked: dict[str, object]) -> dict[str, object]:
    """Greedy continuation, and the prompt's ids by GenAI's own tokenizer."""
    model = og.Model(directory)
    tokenizer = og.Tokenizer(model)
    text = str(asked["prompt"])
    if asked["chat"]:
        text = tokenizer.apply_chat_template(
            json.dumps([{"role": "user", "content": text}]), add_generation_prompt=True
        )  # fmt: skip
    ids = [int(i) for i in tokenizer.encode(text)]
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + int(str(asked["new_tokens"])), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    tokens: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return {"version": og.__version__, "prompt_ids": ids, "tokens": tokens}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(generate(sys.argv[1], json.loads(sys.argv[2]))) + "\n")
