"""Would a draft pay that shares all with its target: the first k layers, one affine map, the final norm, the head?

    python bench/bridge.py MODEL DATA > bench/results/bridge-<model>.json

The map takes the residual stream behind layer k - 1 to the residual stream in front of the final norm. It is the least
squares map on 65,536 tokens of the default text. A round proposes up to K tokens and goes on behind the first one that
the model itself would not say. The draft sees the model's own caches, so rounds can be counted on a finished answer.

A step reads its weights once, whatever the number of tokens, as on a machine whose memory is the limit. The first k
layers of proposed tokens are not computed again, but for the last token. So a round costs K (k l + d + h) + L l + h,
where l, d and h are the weights of a layer, of the map and of the head. Plain decoding costs L l + h a token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bed import Bed, log

DEPTHS, WIDTHS = (4, 8, 12, 16), (1, 2, 3, 4, 6)
EACH, NEW_TOKENS, MOST_PROMPT = 4, 96, 256


def streams(model: Any, ids_BT: Any, depths: Sequence[int]) -> tuple[dict[int, Any], Any]:
    """The residual stream in front of layers `depths`, and in front of the final norm; [B T, D] each."""
    import torch

    decoder, seen = model.get_decoder(), {}

    def keep(name: int) -> Any:
        return lambda _module, given: seen.__setitem__(name, given[0].flatten(0, -2).float())

    hooks = [decoder.layers[k].register_forward_pre_hook(keep(k)) for k in depths]
    hooks.append(decoder.norm.register_forward_pre_hook(keep(-1)))
    with torch.inference_mode():
        decoder(input_ids=ids_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {k: seen[k] for k in depths}, seen[-1]


def bridges(bed: Bed) -> dict[int, Any]:
    """The least squares map of each depth."""
    from nbl_export.calibrate.sums import Accumulator
    from nbl_export.plan import lmmse

    sums = {k: Accumulator(bed.spec.hidden_size) for k in DEPTHS}
    for done, rows in enumerate(bed.windows.split(4)):
        early, last = streams(bed.model, rows, DEPTHS)
        for k, stream in early.items():
            sums[k].update(stream, last.clone())
        if done % 8 == 0:
            log(f"calibrated {4 * (done + 1)} of {len(bed.windows)} windows")
    return {k: lmmse.fit(one.sums().moments(), k) for k, one in sums.items()}


def answers(bed: Bed) -> dict[str, list[tuple[list[int], int]]]:
    """Kind of prompt -> token ids of prompt and greedy answer, and the prompt's length."""
    import torch

    from nbl_export.text.prompts import prompts

    found: dict[str, list[tuple[list[int], int]]] = {}
    for prompt in prompts(EACH):
        if prompt.chat:
            turn = [{"role": "user", "content": prompt.text}]
            text = bed.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        else:
            text = prompt.text
        ids = bed.tokenizer(text, add_special_tokens=not prompt.chat)["input_ids"][-MOST_PROMPT:]
        with torch.inference_mode():
            said = bed.model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        found.setdefault(prompt.kind, []).append((said, len(ids)))
        log(f"{prompt.kind}: {len(said) - len(ids)} tokens")
    return found


def agreements(bed: Bed, maps: dict[int, Any], said: list[int], start: int) -> dict[int, list[bool]]:
    """Depth -> for each token of an answer, whether the draft proposes it behind the tokens before."""
    import torch

    from nbl_export.model.head import logits_of

    early, _ = streams(bed.model, torch.tensor([said]), DEPTHS)
    found = {}
    for k, stream in early.items():
        weight, bias = (torch.from_numpy(t).float() for t in (maps[k].weight, maps[k].bias))
        with torch.inference_mode():
            last = bed.model.get_decoder().norm(stream[start - 1 : -1] @ weight.T + bias)
            found[k] = (logits_of(bed.model, last).argmax(-1) == torch.tensor(said[start:])).tolist()
    return found


def tokens_per_round(agreed: Sequence[bool], width: int) -> tuple[int, int]:
    """Tokens and rounds of an answer. A round has its accepted tokens and one that the model adds."""
    at = rounds = 0
    while at < len(agreed):
        accepted = 0
        while accepted < width and at + accepted < len(agreed) and agreed[at + accepted]:
            accepted += 1
        at += accepted + 1
        rounds += 1
    return min(at, len(agreed)), rounds


def costs(bed: Bed) -> tuple[int, int, int]:
    """Weights of a layer, of the map and of the head."""
    layer = sum(p.numel() for p in bed.model.get_decoder().layers[0].parameters())
    size = bed.spec.hidden_size
    return layer, size * size + size, bed.spec.vocab_size * size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    options = parser.parse_args()
    from nbl_export.files import versions
    from nbl_export.measure.benchmark import machine

    bed = Bed(options.model, options.data, "default", 1, taps=())
    layer, bridge, head = costs(bed)
    maps, said, count = bridges(bed), answers(bed), bed.spec.num_layers
    rows = []
    for kind, texts in said.items():
        agreed = [agreements(bed, maps, ids, start) for ids, start in texts]
        for k in DEPTHS:
            flat = [a for one in agreed for a in one[k]]
            row: dict[str, Any] = {"kind": kind, "layers": k, "agreed": sum(flat) / len(flat), "widths": {}}
            for width in WIDTHS:
                pairs = [tokens_per_round(one[k], width) for one in agreed]
                tokens = sum(t for t, _ in pairs) / sum(r for _, r in pairs)
                cost = width * (k * layer + bridge + head) + count * layer + head
                row["widths"][width] = {"tokens_per_round": tokens, "speed": tokens * (count * layer + head) / cost}
            rows.append(row)
            log(f"{kind}, {k} layers: {row}")
    about = {"machine": machine(), "versions": versions(("torch", "transformers")), "calibration": bed.text}
    sizes = {"layers": count, "layer": layer, "bridge": bridge, "head": head}
    print(json.dumps({**about, "weights": sizes, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
