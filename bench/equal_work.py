"""What long prompts lose by exit layers whose skipped tokens get keys in four ways, at equal work, on tasks.

    pip install wonderwords nltk
    python bench/equal_work.py GGUF DATA LONG EXITS ITEMS LENGTHS > bench/results/equal-work-NAME.json

EXITS names exit layers with their numbers of recent tokens, such as 21:64,15:64. A task has ITEMS items, and
RULER's tasks have so many of each length, such as 1024,2048.
DATA has c4/ and wikitext-2-raw/ (`stock_rows.py`). LONG has altqa_4k.jsonl (RUCAIBox/BAMBOO), musique.json
(AdelWang/MIGRES), hotpot.json (hotpot_dev_distractor_v1.json of nakulbh/Meve-framework), and gsm8k_train.jsonl and
gsm8k_test.jsonl (openai/grade-school-math). RULER's tasks come from the generators of lm-evaluation-harness, and code
from the standard library.

    predicted KV   a linear map of the stream at the exit layer, fitted on C4
    own products   each layer's products on that stream (POP, arXiv 2602.03295)
    chosen         skipped tokens have no keys; the last 8 tokens continue, and those to which the last 8 queries attend
                   most below the exit layer (FastKV, arXiv 2502.01068)
    window         skipped tokens have no keys; the first token and the last ones continue

The same number of a prompt's tokens continues in each. Everything else of an item, given by the data, is read behind
the prompt by all layers. A figure is the mean loss of an item's answer in nats, and whether greedy decoding finds it.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import sysconfig
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bed import log
from exit_bed import Layers, Ridge, fit, predicted
from torch.nn.functional import cross_entropy

from nbl_export.methods.checkpoint import load, source
from nbl_export.text.corpus import Corpus, read_text, stdlib_text
from nbl_export.text.retrieval import KINDS, retrieval_rows
from nbl_export.text.windows import token_ids

CALIBRATED, LENGTH, PROMPT = 48, 896, 768  # windows of C4 that fit the maps, tokens of a window and of its prompt
LAST_QUERIES, READ_LAYERS = 8, 5
KEYS = 75
SHOTS = 8
CODE = 1536  # tokens before a line
MOST = 7000  # tokens of a prompt
PASSAGES = "Answer the question by the passages.\n\n{}\n\nQuestion: {}\nAnswer:"


@dataclass(frozen=True)
class Item:
    """Token ids, where the prompt ends, and the positions of the judged tokens."""

    ids_T: torch.Tensor
    prompt: int
    judged_N: torch.Tensor


class Variants:
    """The original and all variants on an item."""

    def __init__(self, layers: Layers, maps: dict[int, Ridge], sets: list[tuple[int, int]]) -> None:
        self._layers, self._maps, self._sets = layers, maps, sets

    @torch.no_grad()
    def __call__(self, item: Item) -> dict[str, tuple[float, int]]:
        """Name -> loss of the answer, and whether it is found."""
        layers, ids_T, prompt = self._layers, item.ids_T, item.prompt
        streams, products = layers.whole(ids_T)
        answer_N = torch.arange(prompt, len(ids_T) - 1)

        def judged(rows_ND: torch.Tensor) -> tuple[float, int]:
            """By rows from the prompt's last one on."""
            logits_NV = layers.logits(rows_ND[item.judged_N - prompt])
            target_N = ids_T[item.judged_N]
            right = bool((logits_NV.argmax(1) == target_N).all())
            return round(cross_entropy(logits_NV, target_N).item(), 5), int(right)

        found = {"original": judged(streams[-1][prompt - 1 :])}
        for exit_layer, recent_tokens in self._sets:
            stream_TD = streams[exit_layer]
            recent_N = torch.cat([torch.tensor([0]), torch.arange(max(1, prompt - recent_tokens), prompt)])
            own = products[exit_layer]
            on_stream = [
                part for n in range(exit_layer, len(layers.blocks)) for part in layers.products(n, stream_TD)[1:]
            ]
            reads = [
                layers.attention([part[:prompt] for part in products[n]], prompt - LAST_QUERIES).sum((0, 1))
                for n in range(exit_layer - READ_LAYERS, exit_layer)
            ]
            score_T = torch.stack(reads).sum(0)
            score_T[-LAST_QUERIES:] = torch.inf
            chosen_N = score_T.topk(min(prompt, recent_tokens + 1)).indices.sort().values
            ways = {
                "predicted KV": (predicted(layers, self._maps[exit_layer], exit_layer, stream_TD, own), recent_N, True),
                "own products": (layers.caches(on_stream), recent_N, True),
                "chosen": (layers.caches(on_stream), chosen_N, False),
                "window": (layers.caches(on_stream), recent_N, False),
            }
            for name, (caches, places_N, keys) in ways.items():
                held_T = torch.full((len(ids_T),), keys)
                last = layers.above(stream_TD[places_N], places_N, exit_layer, caches, held_T)[-1:]
                behind = last
                if len(answer_N):
                    rows = layers.above(stream_TD[answer_N], answer_N, exit_layer, caches, held_T)
                    behind = torch.cat([last, rows])
                found[f"{name}, {exit_layer}:{recent_tokens}"] = judged(behind)
        return found


class Tasks:
    """Items by task."""

    def __init__(self, tokenizer: Any, data: Path, long: Path, count: int, lengths: list[int], vocab: int) -> None:
        self._tokenizer, self._data, self._long, self._count, self._vocab = tokenizer, data, long, count, vocab
        self._lengths = lengths
        c4 = read_text(str(data / "c4" / "c4_demo.json"))
        self.calibration = self._windows(c4, CALIBRATED)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _windows(self, corpus: Corpus, count: int) -> torch.Tensor:
        ids = token_ids(corpus, self._tokenizer, count * LENGTH, self._vocab)
        return torch.tensor(ids[: count * LENGTH]).view(-1, LENGTH)

    def _item(self, prompt: str, answer: str) -> Item:
        before, after = self._ids(prompt)[-MOST:], self._ids(answer)
        ids_T = torch.tensor(before + after)
        return Item(ids_T, len(before), torch.arange(len(before), len(ids_T)))

    def all(self) -> Iterator[tuple[str, list[Item]]]:
        """Each task's items."""
        wiki = read_text(str(self._data / "wikitext-2-raw" / "wiki.valid.raw"))
        for title, corpus in (("WikiText-2", wiki), ("documentation", stdlib_text())):
            rows = self._windows(corpus, 4 * self._count)[::4]
            yield title, [Item(row, PROMPT, torch.arange(PROMPT, LENGTH)) for row in rows]
        for kind in KINDS:
            rows = retrieval_rows(self._tokenizer, kind, self._count, 1024, "equal work", self._vocab)
            places = [answers.nonzero()[:, 0] for _, answers in rows]
            yield f"items: {kind}", [Item(row[0], int(p[0]), p) for row, p in zip(rows, places, strict=True)]
        strings: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
            "KV retrieval": self._keys, "HotpotQA": self._hotpot, "MuSiQue": self._musique, "AltQA": self._altqa,
            "GSM8K": self._gsm8k, "code": self._code,
        }  # fmt: skip
        for title, make in strings.items():
            made = make()
            yield title, [self._item(*next(made)) for _ in range(self._count)]
        for title, make_ruler in (("NIAH multikey", _niah), ("VT", _vt), ("CWE", _cwe)):
            for length in self._lengths:
                pairs = make_ruler(self._tokenizer, length, self._count)
                yield f"{title}, {length}", [self._item(*pair) for pair in pairs]

    def _keys(self) -> Iterator[tuple[str, str]]:
        draw = random.Random(0)
        for place in range(self._count):
            pairs = [[str(uuid.UUID(int=draw.getrandbits(128), version=4)) for _ in "kv"] for _ in range(KEYS)]
            key, value = pairs[(place * KEYS // self._count + 3) % KEYS]
            told = ",\n ".join(f'"{k}": "{v}"' for k, v in pairs)
            yield (
                "Extract the value corresponding to the specified key in the JSON object below.\n\n"
                f'JSON data:\n{{{told}}}\n\nKey: "{key}"\nCorresponding value: "', value,
            )  # fmt: skip

    def _hotpot(self) -> Iterator[tuple[str, str]]:
        for row in json.loads((self._long / "hotpot.json").read_text(encoding="utf-8")):
            named = zip(row["context"]["title"], row["context"]["sentences"], strict=True)
            passages = "\n\n".join(f"{title}: {''.join(sentences)}" for title, sentences in named)
            yield PASSAGES.format(passages, row["question"]), f" {row['answer']}"

    def _musique(self) -> Iterator[tuple[str, str]]:
        for row in _lines(self._long / "musique.json"):
            passages = "\n\n".join(f"{p['title']}: {p['paragraph_text']}" for p in row["paragraphs"])
            yield PASSAGES.format(passages, row["question"]), f" {row['answer']}"

    def _altqa(self) -> Iterator[tuple[str, str]]:
        for row in _lines(self._long / "altqa_4k.jsonl"):
            yield f"{row['content'].rstrip()}\nAnswer:", f" {row['answer']}"

    def _gsm8k(self) -> Iterator[tuple[str, str]]:
        shots = "".join(
            f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
            for row in _lines(self._long / "gsm8k_train.jsonl")[:SHOTS]
        )
        for row in _lines(self._long / "gsm8k_test.jsonl"):
            yield f"{shots}Question: {row['question']}\nAnswer:", f" {row['answer'].split('####')[0].strip()}"

    def _code(self) -> Iterator[tuple[str, str]]:
        draw = random.Random(0)
        for path in draw.sample(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), 10 * self._count):
            lines = path.read_text(encoding="utf-8").splitlines()
            places = [
                n for n, line in enumerate(lines) if n > 150 and len(line.strip()) > 20 and line.strip()[0] != "#"
            ]
            if places:
                place = draw.choice(places)
                before = self._tokenizer.decode(self._ids("\n".join(lines[:place]) + "\n")[-CODE:])
                indent = len(lines[place]) - len(lines[place].lstrip())
                yield before + lines[place][:indent], lines[place][indent:]


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _niah(tokenizer: Any, length: int, count: int) -> list[tuple[str, str]]:
    from lm_eval.tasks.ruler import niah_utils, prepare_niah

    rows = prepare_niah.generate_samples(
        prepare_niah.get_haystack(type_haystack="needle"), tokenizer, max_seq_length=length, type_haystack="needle",
        type_needle_k="words", type_needle_v="numbers", template=niah_utils.TEMPLATE, num_samples=count,
    )  # fmt: skip
    return [(f"{row['input']} {row['gen_prefix']}", f" {row['outputs'][0]}") for row in rows]


def _vt(tokenizer: Any, length: int, count: int) -> list[tuple[str, str]]:
    from lm_eval.tasks.ruler import vt_utils

    shot = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)[0]
    rows = vt_utils.sys_vartrack_w_noise_random(tokenizer, count, length, icl_example=shot)
    return [(f"{row['input']} {row['gen_prefix']}", f" {' '.join(row['outputs'])}") for row in rows]


def _cwe(tokenizer: Any, length: int, count: int) -> list[tuple[str, str]]:
    from lm_eval.tasks.ruler import cwe_utils

    rows = cwe_utils.sys_word_pair_random(count, length, tokenizer)
    numbered = (" ".join(f"{n + 1}. {word}" for n, word in enumerate(row["outputs"])) for row in rows)
    return [(f"{row['input']} {row['gen_prefix']}", f" {answer}") for row, answer in zip(rows, numbered, strict=True)]


def main(gguf: str, data: Path, long: Path, named: str, count: int, lengths: list[int]) -> None:
    sets = [(int(layer), int(tokens)) for layer, tokens in (pair.split(":") for pair in named.split(","))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = load.materialise(source.resolve(gguf), Path(scratch) / "checkpoint")
        model, tokenizer = load.load_model(folder), load.load_tokenizer(folder)
    layers = Layers(model)
    tasks = Tasks(tokenizer, data, long, count, lengths, model.config.vocab_size)
    with torch.no_grad():
        maps = fit(layers, tasks.calibration, sorted({layer for layer, _ in sets}))
    variants = Variants(layers, maps, sets)
    found: dict[str, Any] = {}
    random.seed(0)  # of RULER's generators
    np.random.seed(0)
    with contextlib.redirect_stdout(sys.stderr):  # generators print
        for title, items in tasks.all():
            found[title] = [{"tokens": item.prompt, **variants(item)} for item in items]
            log(title)
            for name in found[title][0]:
                if name != "tokens":
                    losses, right = (sum(row[name][k] for row in found[title]) / len(items) for k in (0, 1))
                    log(f"  {name:28} {losses:.3f}  {right:.0%}")
    print(json.dumps({"model": Path(gguf).name, "threads": torch.get_num_threads(), "tasks": found}))


if __name__ == "__main__":
    main(
        sys.argv[1],
        Path(sys.argv[2]),
        Path(sys.argv[3]),
        sys.argv[4],
        int(sys.argv[5]),
        [*map(int, sys.argv[6].split(","))],
    )
