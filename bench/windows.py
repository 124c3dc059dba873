"""Loss of windows and of linear maps on long texts: each layer alone, and the best k layers together.

    python bench/windows.py --layers 18-29 --windows 4 --out bench/results/windows-smollm2.json

Windows (`nbl_export.mixers.window`) have the weights of their own layer. Maps are fitted to the calibration text of the
other figures. The k layers of a set are those that cost least alone, by the mean KL over both texts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from bed import TOKENS, log

LENGTH, CONTEXT, HELD = 2048, 512, 8192


def main() -> None:
    """Write the losses of every set of both kinds."""
    from nbl_export.files import versions
    from nbl_export.options.goals import parse_layers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", required=True)
    parser.add_argument("--together", default="", help="sets of all named layers, such as 24-29,26-29")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4, help="of 2,048 tokens, of each text")
    parser.add_argument("--most", type=int, default=8, help="layers of the largest set")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="to calibrate linear maps on")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    bed = LongBed(asked.model, asked.data, asked.windows, asked.tokens)
    layers = list(parse_layers(asked.layers, bed.count))
    mixers = {"window": bed.windows(layers, asked.window), "linear": bed.maps(layers)}
    alone = {f"{kind} {i}": (kind, (i,)) for kind in mixers for i in layers}
    found = bed.losses(mixers, alone)
    sets = {}
    for kind, k in itertools.product(mixers, range(2, asked.most + 1)):
        order = sorted(layers, key=lambda i: sum(row["kl"] for row in found[f"{kind} {i}"].values()))
        sets[f"{kind} best {k}"] = (kind, tuple(sorted(order[:k])))
    given = [tuple(parse_layers(part, bed.count)) for part in asked.together.split(",") if part]
    sets |= {f"{kind} {s[0]}-{s[-1]}": (kind, s) for kind in mixers for s in given}
    found |= bed.losses(mixers, sets)
    rows = [
        {"set": name, "kind": kind, "layers": list(chosen), "texts": found[name]}
        for name, (kind, chosen) in (alone | sets).items()
    ]
    facts = {
        "model": Path(asked.model).name,
        "window": asked.window,
        "length": LENGTH,
        "windows": asked.windows,
        "calibration_tokens": asked.tokens,
        "narrow": bed.narrow,
    }
    asked.out.write_text(json.dumps({**facts, "versions": versions(), "rows": rows}, indent=1) + "\n")


class LongBed:
    """Model, long windows of two texts, and mixers of both kinds."""

    def __init__(self, model: str, data: Path, windows: int, tokens: int) -> None:
        import torch

        from nbl_export.model import bfloat16, memory
        from nbl_export.model.checkpoint import load
        from nbl_export.model.checkpoint import source as checkpoint_source
        from nbl_export.text import corpus

        memory.keep_freed_memory()
        with tempfile.TemporaryDirectory() as scratch:
            directory = load.materialise(checkpoint_source.resolve(model), Path(scratch) / "checkpoint")
            self.model, self.tokenizer = load.load_model(directory), load.load_tokenizer(directory)
        self.count, self.tokens = len(self.model.get_decoder().layers), tokens
        self.narrow = bfloat16.fast(self.model.device)  # as nbl-export chooses layers
        self.calibration = corpus.read_text(str(data / "c4" / "c4_demo.json"))
        wiki = (data / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")
        rest = [i for d in self.calibration.documents for i in self._ids(d)][TOKENS + HELD :]
        self.texts = {}
        for name, ids in (("c4 rest", rest), ("wikitext-2 valid", self._ids(wiki))):
            rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)
            self.texts[name] = rows[torch.linspace(0, len(rows) - 1, min(windows, len(rows))).long()]

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return found

    def windows(self, layers: Sequence[int], tokens: int) -> dict[int, Any]:
        from nbl_export.model.windows import window_layers

        return dict(window_layers(self.model, layers, tokens, "normed"))

    def maps(self, layers: Sequence[int]) -> dict[int, Any]:
        """Linear maps, fitted to the calibration text."""
        from nbl_export.calibrate import collect
        from nbl_export.mixers.linear import LINEAR
        from nbl_export.text.windows import pack

        started = time.monotonic()
        ids, _ = pack(self.calibration, self.tokenizer, self.tokens, CONTEXT, HELD)
        moments = collect.collect(self.model, ids, lambda *_: None, ("normed",), narrow=self.narrow)["normed"]
        log(f"moments: {time.monotonic() - started:.0f} s")
        return {i: LINEAR.fit(moments[i], i) for i in layers}

    def losses(
        self, mixers: Mapping[str, Mapping[int, Any]], sets: Mapping[str, tuple[str, Collection[int]]]
    ) -> dict[str, dict[str, dict[str, float]]]:
        """Name of a set -> text -> KL and the relative increase of perplexity."""
        from nbl_export.model.mixes import Loss
        from nbl_export.model.switched import SwitchedModel

        models = {kind: SwitchedModel(self.model, own, "normed", narrow=self.narrow) for kind, own in mixers.items()}
        totals = {name: dict.fromkeys(self.texts, Loss()) for name in sets}
        for text, rows in self.texts.items():
            for number, ids in enumerate(rows, 1):
                started = time.monotonic()
                lowest = {min(chosen) for _, chosen in sets.values()}
                original, seen = next(iter(models.values())).run((), ids_BT=ids[None], watch=lowest)
                for name, (kind, chosen) in sets.items():
                    first = min(chosen)
                    last = models[kind].run(chosen, entering_BTD=seen[first], first=first)[0]
                    totals[name][text] += models[kind].losses(ids, original[0], {name: last[0]})[name]
                log(f"{text}, window {number}: {time.monotonic() - started:.0f} s")
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, by_text in totals.items():
            found[name] = {}
            for text, loss in by_text.items():
                before, after = loss.perplexities
                found[name][text] = {"kl": loss.kl, "original": before, "increase": after / before - 1}
            log(f"{name}: " + ", ".join(f"{t} {100 * v['increase']:+.2f}%" for t, v in found[name].items()))
        return found


if __name__ == "__main__":
    main()
