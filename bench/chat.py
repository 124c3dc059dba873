"""How far distilled maps take a chat model from its own answers: KL, perplexity and agreement, answer tokens alone.

    python bench/chat.py MODEL DATA NAME=MAPS.safetensors [NAME=...] [--chats 96] > bench/results/chat-<model>.json

The goals of DATA/piqa/valid.jsonl, evenly spread, are asked through the chat template; the original answers each by
sampling at temperature 1 (seeded), at most 160 tokens. Then every set of maps reads the same conversations. Judged are
the tokens of the answers, not those of the template. What no web text shows is seen here: whether maps that were
trained to expect web text have unlearned to answer. Files are what `quality.py ladder --keep` or a run directory
leaves; their layers and their tap are in them. Standard errors are over conversations, those of the differences from
the first set of the same conversations.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

BATCH, ANSWER = 32, 160


def asked(data: Path, tokenizer: Any, count: int) -> list[list[int]]:
    """Prompts as token ids, up to where the assistant answers."""
    lines = (data / "piqa" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    goals = [json.loads(lines[int(k)])["goal"] for k in torch.linspace(0, len(lines) - 1, count)]
    turns = [[{"role": "user", "content": goal}] for goal in goals]
    return [tokenizer.apply_chat_template(t, add_generation_prompt=True, return_dict=False) for t in turns]


def answered(model: Any, prompts: list[list[int]], end: int) -> list[list[int]]:
    """An answer to each, up to and with its end token."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=ANSWER, eos_token_id=end, pad_token_id=end
    )
    answers = []
    torch.manual_seed(0)
    for k in range(0, len(prompts), BATCH):
        batch = prompts[k : k + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[end] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        said = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
        answers += [row[: row.index(end) + 1] if end in row else row for row in said]
        print(f"answers: {len(answers)} of {len(prompts)}", file=sys.stderr, flush=True)
    return answers


def log_probabilities(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Of every token of the vocabulary at each place of the answer, [A, V]."""
    logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), -1)


def judge(model: Any, changed: dict[str, Any], chats: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Sums over the answer of every conversation, [chats, 4]: KL, loss of the original, loss, agreement."""
    sums = {name: torch.zeros(len(chats), 4, dtype=torch.float64) for name in changed}
    for k, (prompt, answer) in enumerate(chats):
        at = torch.arange(len(answer)), torch.tensor(answer)
        old = log_probabilities(model, prompt, answer)
        for name, other in changed.items():
            new = log_probabilities(other, prompt, answer)
            kl = (old.exp() * (old - new)).sum(-1)
            same = old.argmax(-1) == new.argmax(-1)
            sums[name][k] = torch.tensor([float(x.double().sum()) for x in (kl, -old[at], -new[at], same)])
    return sums


def means(sums: torch.Tensor, lengths: torch.Tensor) -> dict[str, Any]:
    """Over answer tokens, with standard errors over conversations: of a ratio of sums, by each one's residual."""
    mean = sums.sum(0) / lengths.sum()
    error = ((sums - mean * lengths[:, None]).square().sum(0)).sqrt() / lengths.sum()
    names = ("kl", "original_loss", "loss", "top1")
    return {name: {"value": float(v), "stderr": float(e)} for name, v, e in zip(names, mean, error, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("maps", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--chats", type=int, default=96)
    options = parser.parse_args()
    from nbl_export import checkpoint
    from nbl_export.artifacts import versions
    from nbl_export.linearize import linearize
    from nbl_export.plan import load_maps, maps_in

    with tempfile.TemporaryDirectory() as scratch:
        directory = checkpoint.materialise(checkpoint.resolve(options.model), Path(scratch) / "checkpoint")
        model, tokenizer = checkpoint.load_model(directory), checkpoint.load_tokenizer(directory)
    rows: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for name, _, file in (m.partition("=") for m in options.maps):
        layers, tap = maps_in(Path(file))
        models[name] = linearize(copy.deepcopy(model), load_maps(Path(file), layers), tap or "residual")
        rows[name] = {"layers": layers, "tap": tap}
    with torch.inference_mode():
        prompts = asked(options.data, tokenizer, options.chats)
        answers = answered(model, prompts, tokenizer.eos_token_id)
        chats = list(zip(prompts, answers, strict=True))
        sums = judge(model, models, chats)
    lengths = torch.tensor([len(answer) for answer in answers], dtype=torch.float64)
    first = next(iter(sums))
    for name, found in sums.items():
        rows[name] |= means(found, lengths)
        if name != first:  # of the same conversations
            rows[name][f"minus {first}"] = means(found - sums[first], lengths)
    about = {"chats": len(chats), "answer_tokens": sum(map(len, answers)), "sample": tokenizer.decode(answers[0])}
    print(json.dumps({**about, "versions": versions(("torch", "transformers")), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
