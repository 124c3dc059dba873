"""How losses that a choice sees rank exit layers and linear layers, beside what tasks lose.

    python bench/ranks.py GGUF RUN DATA EXITS ROWS [LINEAR_RUN] > bench/results/ranks-smollm2.json

RUN is a job with predicted KV, LINEAR_RUN one with linear layers in closed form, and DATA has the tasks' files. EXITS
names exit layers with their numbers of recent tokens, such as 15:64,17:64,17:128, and ROWS is the number of rows of
each text. The sets are these exit layers, and the last 2, 4 and 8 of the linear layers. All run in torch in float32,
with recent keys their own and skipped tokens' keys predicted at every position. A figure is the sum of what the loss of
the judged tokens rises by, in nats, and their number. `long_range` and `gain` are those of long-range tokens
(`text.long_range`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bed import log

from nbl_export.evaluation import length
from nbl_export.evaluation.measure import windows
from nbl_export.methods.checkpoint import load, source
from nbl_export.methods.losses import PartialReplacement
from nbl_export.methods.maps_file import load_maps
from nbl_export.methods.predicted_kv import sums as exits
from nbl_export.methods.sums_file import open_sums
from nbl_export.text import parts
from nbl_export.text.corpus import read_text
from nbl_export.text.long_range import SHORT, contexts, is_long_range
from nbl_export.text.windows import joined, repeated

LINEAR = (2, 4, 8)  # of the last layers
LENGTH, SHOTS = 1024, 8
JUDGED = ("own", "second", "twice")  # texts whose long-range tokens count
Item = tuple[torch.Tensor, torch.Tensor | None]  # token ids, positions that are judged


def sets_of(model: Any, run: Path, named: str, linear: Path | None) -> dict[str, dict[int, Any]]:
    """Name -> maps."""
    sums = open_sums(run / "sums.safetensors")
    calibrated = json.loads((run / "nbl.json").read_text(encoding="utf-8"))["sums"]["collected"]["exits"]
    found: dict[str, dict[int, Any]] = {}
    for exit_layer, recent_tokens in (map(int, pair.split(":")) for pair in named.split(",")):
        found[f"exit layer {exit_layer}, {recent_tokens} recent"] = dict(
            exits.maps_of(model, sums, calibrated, exit_layer, recent_tokens)
        )
    if linear is None:
        return found
    layers = sorted(json.loads((linear / "nbl.json").read_text(encoding="utf-8"))["replaced_layers"])
    held = load_maps(linear / "maps.safetensors", layers)
    for count in LINEAR:
        found[f"linear {count}"] = {i: held[i] for i in layers[-count:]}
    return found


def items_of(tokenizer: Any, run: Path, data: Path, count: int) -> Iterator[tuple[str, Item]]:
    """Texts of the run, then tasks with their answers."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def answered(context: str, answer: str) -> Item:
        before, after = ids(context), ids(answer)
        return torch.tensor(before + after), torch.arange(len(before), len(before) + len(after)) - 1

    rows = {name: joined(parts.read(run / "text.safetensors", f"{name}validation"), LENGTH) for name in ("", "second.")}
    for name, title in (("", "own"), ("second.", "second")):
        yield from ((title, (row, None)) for row in rows[name][:: max(1, len(rows[name]) // count)][:count])
    yield from (("twice", (repeated(row, len(row)).flatten(), None)) for row in rows[""][: max(1, count // 2)])
    for line in _lines(data / "lambada_openai" / "test.jsonl")[: 20 * count]:
        context, word = line["text"].rsplit(" ", 1)
        yield "LAMBADA", answered(context, f" {word}")
    wiki = windows(read_text(str(data / "wiki.valid.raw")), tokenizer, LENGTH, count)
    for test, title in ((length.RETRIEVAL, "keys"), (length.COPYING, "copying")):
        for item in length._items(test, wiki, tokenizer, LENGTH, count):
            if item.ends == (LENGTH,):
                end = len(item.ids) - 1
                yield title, (torch.tensor(item.ids), torch.arange(end - sum(item.counts), end))
    yield from (("WikiText-2", (torch.tensor(row), torch.arange(LENGTH // 2, LENGTH - 1, 2))) for row in wiki)
    for task, split, title in (("arc_easy", "test", "ARC-Easy"), ("piqa", "validation", "PIQA")):
        shown = "".join(f"{q}{a}\n\n" for q, a in map(_question, _lines(data / task / "train.jsonl")[:SHOTS]))
        for line in _lines(data / task / f"{split}.jsonl")[: 5 * count]:
            question, answer = _question(line)
            yield title, answered(shown + question, answer)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _question(row: dict[str, Any]) -> tuple[str, str]:
    if "goal" in row:
        return f"Question: {row['goal']}\nAnswer:", f" {row[('sol1', 'sol2')[row['label']]]}"
    right = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
    return f"Question: {row['question']}\nAnswer:", f" {right}"


@torch.no_grad()
def measure(model: Any, sets: dict[str, dict[int, Any]], items: Iterator[tuple[str, Item]]) -> dict[str, Any]:
    """Set -> group -> sums over its items."""
    original = PartialReplacement(model, {}, "residual")
    partial = {name: PartialReplacement(model, maps, "residual") for name, maps in sets.items()}
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in sets}
    for group, (ids_T, positions) in items:
        run = original.runs(ids_T[None], again=True)
        long_range, begin = None, SHORT - 1
        judged = torch.arange(begin, len(ids_T) - 1, 2) if positions is None else positions
        base_N = original.cross_entropies(run.original[0][judged], ids_T[judged + 1])
        if positions is None:
            index = torch.from_numpy(contexts(begin, len(ids_T) - 1))
            short = original.runs(ids_T[index], again=False).original[:, begin:].flatten(0, 1)[judged - begin]
            gain_N = original.cross_entropies(short, ids_T[judged + 1]) - base_N
            long_range = is_long_range(gain_N)
        for name, mix in partial.items():
            (last,) = run.of(mix).last([tuple(sets[name])])
            rise_N = original.cross_entropies(last[0][judged], ids_T[judged + 1]) - base_N
            record = {"rise": rise_N.sum().item(), "tokens": len(rise_N)}
            if long_range is not None:
                record |= {"long_range": rise_N[long_range].sum().item(), "gain": gain_N[long_range].sum().item()}
            sums = found[name].setdefault(group, dict.fromkeys(record, 0.0))
            sums.update({figure: sums[figure] + value for figure, value in record.items()})
        log(group)
    return found


if __name__ == "__main__":
    gguf, run, data = map(Path, sys.argv[1:4])
    named, count, linear = sys.argv[4], int(sys.argv[5]), Path(sys.argv[6]) if sys.argv[6:] else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = load.materialise(source.resolve(str(gguf)), Path(scratch) / "checkpoint")
        model = load.load_model(folder)
        sets = sets_of(model, run, named, linear)
        found = measure(model, sets, items_of(load.load_tokenizer(folder), run, data, count))
    print(json.dumps({"model": gguf.name, "sets": found}))
