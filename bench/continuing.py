"""What an exit layer loses by who continues above it: chosen once for a prompt, or while decoding.

    python bench/continuing.py GGUF DATA EXIT WINDOWS > bench/results/continuing-NAME.json

A prompt of 768 tokens stops at the exit layer, but for the first token, the last W and S chosen ones. The next 128
tokens, given by the text, are read by all layers, one by one: their losses count. Of retrieval items, answers count.
DATA has c4/, on which all maps are fitted, and wikitext-2-raw/ (`stock_rows.py`).

    oracle          the largest attention that a token receives from the next 128 tokens, below the exit layer
    last queries    the largest one from the last 32 tokens of the prompt
    linear          a ridge map of the stream at the exit layer to the logarithm of the next tokens' attention
    linear, read    the same, of the stream and of the attention received within the prompt, by layer and head
    expected        expected attention by moments of the prompt's queries (arXiv 2510.00636)
    repair k        each decode step lets the k tokens that its query reads most below the exit layer continue with it;
                    their own keys and values replace predicted ones

A figure is the mean loss of a quarter of the next tokens, or of the answers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bed import log
from exit_bed import Caches, Layers, Ridge, fit, predicted, read_by
from torch.nn.functional import cross_entropy

from nbl_export.methods.checkpoint import load, source
from nbl_export.text.corpus import read_text, stdlib_text
from nbl_export.text.retrieval import retrieval_rows
from nbl_export.text.windows import token_ids

PROMPT, ANSWER = 768, 128
LENGTH = PROMPT + ANSWER
READ_LAYERS = 5  # below the exit layer, whose attention chooses
LAST_QUERIES = 32
FAR = 16  # distance of a query in the prompt whose attention is an input of a score
CALIBRATED = 48  # windows of C4
PLAIN = (64, 128, 256)  # W
RECENT, CHOSEN = 64, 64  # W and S
REPAIRS = (4, 8, 16)
LEAST = 1e-7  # attention


@dataclass(frozen=True)
class Window:
    """Token ids, where the prompt ends, and which of the next tokens are judged."""

    ids_T: torch.Tensor
    prompt: int
    judged_N: torch.Tensor


class Scores:
    """Who is worth continuing, of the tokens of a prompt."""

    def __init__(self, layers: Layers, exit_layer: int) -> None:
        self._layers, self._exit_layer = layers, exit_layer
        self._by = range(exit_layer - READ_LAYERS, exit_layer)
        self._linear, self._read = Ridge(), Ridge()

    def attention(self, products: Any) -> torch.Tensor:
        """[layers x heads, T, T] below the exit layer."""
        return torch.cat([self._layers.attention(products[layer]) for layer in self._by])

    def learn(self, ids_T: torch.Tensor) -> None:
        """Add a window to the sums of the linear scores."""
        streams, products = self._layers.whole(ids_T)
        maps_HTT = self.attention(products)
        target = maps_HTT[:, PROMPT:, :PROMPT].mean((0, 1)).clamp(min=LEAST).log()[:, None]
        places = slice(1, PROMPT - RECENT)
        for ridge, x in zip((self._linear, self._read), self._inputs(streams, maps_HTT, PROMPT), strict=True):
            ridge.add(x[places], target[places])

    def of(self, streams: Any, products: Any, maps_HTT: torch.Tensor, prompt: int) -> dict[str, torch.Tensor]:
        """Scores [prompt] by name."""
        stream, with_read = self._inputs(streams, maps_HTT, prompt)
        return {
            "oracle": maps_HTT[:, prompt:, :prompt].amax((0, 1)),
            "last queries": maps_HTT[:, prompt - LAST_QUERIES : prompt, :prompt].amax((0, 1)),
            "linear": self._linear(stream)[:, 0],
            "linear, read": self._read(with_read)[:, 0],
            "expected": self._expected(products, prompt),
        }

    def _inputs(self, streams: Any, maps_HTT: torch.Tensor, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
        stream = read_by(streams[self._exit_layer][:prompt])
        last = maps_HTT[:, prompt - LAST_QUERIES : prompt, :prompt].mean(1)
        far = maps_HTT[:, :prompt, :prompt].tril(-FAR).sum(1) / (prompt - torch.arange(prompt)).clamp(min=FAR)
        return stream, torch.cat([stream, torch.cat([last, far]).T.clamp(min=LEAST).log()], 1)

    def _expected(self, products: Any, prompt: int) -> torch.Tensor:
        """Expected attention: queries are Gaussian, and rotated by the mean of their coming positions."""
        size = self._layers.size
        coming = torch.arange(prompt, prompt + ANSWER)
        basis = torch.eye(size)[:, None].expand(size, ANSWER, size)
        turn = self._layers.rotate(basis, coming).mean(1)  # q @ turn is the mean of the rotated query
        found = []
        for layer in self._by:
            q, k, v = (self._layers.split(rows[:prompt]) for rows in products[layer])
            k = self._layers.rotate(k, torch.arange(prompt)).repeat_interleave(len(q) // len(k), 0)
            mean = (q.mean(1) @ turn)[:, :, None]
            spread = turn.T @ torch.stack([head.T.cov() for head in q]) @ turn
            scores = (k @ mean)[..., 0] / size**0.5 + ((k @ spread) * k).sum(2) / (2 * size)
            norms = v.norm(dim=2).repeat_interleave(len(q) // len(v), 0)
            found.append(scores.softmax(1) * norms / norms.mean(1, keepdim=True))
        return torch.cat(found).mean(0)


class Judge:
    """Losses of one window by who continues."""

    def __init__(self, layers: Layers, exit_layer: int, fitted: Ridge, scores: Scores, window: Window) -> None:
        self._layers, self._exit_layer, self._window = layers, exit_layer, window
        self._streams, products = layers.whole(window.ids_T)
        self._stream = self._streams[exit_layer]
        self._maps_HTT = scores.attention(products)
        self._scores = scores.of(self._streams, products, self._maps_HTT, window.prompt)
        self._caches = predicted(layers, fitted, exit_layer, self._stream, products[exit_layer])

    def all(self) -> dict[str, list[float]]:
        """Losses by name."""
        prompt = self._window.prompt
        found = {"original": self._losses(self._streams[-1][prompt - 1 : -1])}
        nobody = torch.arange(0)
        for recent in PLAIN:
            found[f"W {recent}"] = self._answered(recent, nobody)
        chosen = {n: score[1 : prompt - RECENT].topk(CHOSEN).indices + 1 for n, score in self._scores.items()}
        for name, places_N in chosen.items():
            found[name] = self._answered(RECENT, places_N)
        for k in REPAIRS:
            found[f"repair {k}"] = self._repaired(nobody, k)
        found["last queries, repair 8"] = self._repaired(chosen["last queries"], 8)
        return found

    def _losses(self, rows_ND: torch.Tensor) -> list[float]:
        goal = self._window.ids_T[self._window.prompt :]
        each: list[float] = cross_entropy(self._layers.logits(rows_ND), goal, reduction="none")[
            self._window.judged_N
        ].tolist()
        return each

    def _run(self, places_N: torch.Tensor, caches: Caches) -> torch.Tensor:
        rows: torch.Tensor = self._layers.above(self._stream[places_N], places_N, self._exit_layer, caches)
        return rows

    def _served(self, recent: int, chosen_N: torch.Tensor) -> tuple[torch.Tensor, Caches]:
        """The last token's row, and caches behind the prompt."""
        prompt = self._window.prompt
        places_N = torch.cat([torch.tensor([0]), chosen_N, torch.arange(prompt - recent, prompt)]).unique()
        caches = [(k.clone(), v.clone()) for k, v in self._caches]
        return self._run(places_N, caches)[-1:], caches

    def _next(self) -> torch.Tensor:
        return torch.arange(self._window.prompt, len(self._window.ids_T) - 1)

    def _answered(self, recent: int, chosen_N: torch.Tensor) -> list[float]:
        last, caches = self._served(recent, chosen_N)
        return self._losses(torch.cat([last, self._run(self._next(), caches)]))

    def _repaired(self, chosen_N: torch.Tensor, k: int) -> list[float]:
        last, caches = self._served(RECENT, chosen_N)
        prompt = self._window.prompt
        own_T = torch.zeros(prompt, dtype=torch.bool)
        own_T[0] = own_T[chosen_N] = own_T[prompt - RECENT :] = True
        reads_TT = self._maps_HTT.amax(0)
        rows = [last]
        for place in self._next().tolist():
            some = reads_TT[place, :prompt].masked_fill(own_T, -1).topk(k).indices.sort().values
            own_T[some] = True
            rows.append(self._run(torch.cat([some, torch.tensor([place])]), caches)[-1:])
        return self._losses(torch.cat(rows))


def texts_of(tokenizer: Any, data: Path, count: int, vocab: int) -> tuple[torch.Tensor, dict[str, list[Window]]]:
    """Windows of calibration, and judged ones by text."""

    def rows_of(corpus: Any, rows: int) -> torch.Tensor:
        ids = token_ids(corpus, tokenizer, rows * LENGTH, vocab)
        return torch.tensor(ids[: rows * LENGTH]).view(-1, LENGTH)

    c4 = rows_of(read_text(str(data / "c4" / "c4_demo.json")), CALIBRATED + count)
    wiki = rows_of(read_text(str(data / "wikitext-2-raw" / "wiki.valid.raw")), 4 * count)[::4]
    texts = {"C4": c4[CALIBRATED:], "WikiText-2": wiki, "documentation": rows_of(stdlib_text(), 4 * count)[::4]}
    texts["copying"] = wiki[:, : LENGTH // 2].repeat(1, 2)
    found = {title: [Window(row, PROMPT, torch.arange(ANSWER)) for row in rows] for title, rows in texts.items()}
    for kind in ("pairs", "variables"):
        first, later = [], []
        for row, answers in retrieval_rows(tokenizer, kind, count, LENGTH, "continuing", vocab):
            places = answers.nonzero()[:, 0]
            begin = int(places[0])
            end = int((places.diff() > 1).nonzero()[0, 0]) + 1  # of the first answer
            first.append(Window(row[: int(places[end - 1]) + 1], begin, places[:end] - begin))
            later.append(Window(row, begin, places[end:] - begin))
        found |= {f"{kind}, first answer": first, f"{kind}, later answers": later}
    return c4[:CALIBRATED], found


def quarters(losses: list[float]) -> list[float]:
    """Means of the quarters of the next tokens, or of all answers."""
    size = ANSWER // 4 if len(losses) == ANSWER else len(losses)
    return [round(sum(losses[n : n + size]) / size, 4) for n in range(0, len(losses), size)]


@torch.no_grad()
def main(gguf: str, data: Path, exit_layer: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = load.materialise(source.resolve(gguf), Path(scratch) / "checkpoint")
        model, tokenizer = load.load_model(folder), load.load_tokenizer(folder)
    layers = Layers(model)
    calibration, texts = texts_of(tokenizer, data, count, model.config.vocab_size)
    fitted = fit(layers, calibration, [exit_layer])[exit_layer]
    scores = Scores(layers, exit_layer)
    for ids_T in calibration:
        scores.learn(ids_T)
    log("fitted")
    found: dict[str, list[dict[str, list[float]]]] = {}
    for title, windows in texts.items():
        found[title] = []
        for window in windows:
            judged = Judge(layers, exit_layer, fitted, scores, window).all()
            found[title].append({name: quarters(losses) for name, losses in judged.items()})
        log(title)
        for name in found[title][0]:
            rise = torch.tensor([w[name] for w in found[title]]) - torch.tensor([w["original"] for w in found[title]])
            error = rise.mean(1).std() / len(rise) ** 0.5
            log(f"  {name:24} {rise.mean():.3f} +- {error:.3f}  {[round(q, 3) for q in rise.mean(0).tolist()]}")
    print(json.dumps({"model": Path(gguf).name, "exit_layer": exit_layer, "windows": found}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
