"""An exit layer below a layer that copies: retrieval items refuse it, and ordinary text does not see it.

The planted decoder has three layers. Its weights are set by hand, and its stream has five parts.

    layer 0   nothing
    layer 1   two heads: the token before, and the second token before ─► parts of the stream
    layer 2   copies the token that once followed the last two tokens  ─► logits

A map at an exit layer knows a token and the one before. So exit layer 1 loses the second one, by which layer 2 finds an
answer; exit layer 2 is exact.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nbl_export.methods.base import ChoiceInputs, Limit
from nbl_export.methods.linear.order import quiet
from nbl_export.methods.losses import PartialReplacement
from nbl_export.methods.predicted_kv.candidates import ExitCandidates, Exits
from nbl_export.methods.predicted_kv.method import PredictedKVMethod
from nbl_export.methods.predicted_kv.sums import ExitSums
from nbl_export.methods.sums_file import open_sums
from nbl_export.records.inputs import Lazy
from nbl_export.text.retrieval import SHORTEST, retrieval_rows
from nbl_export.text.windows import selection_texts

PART, HEAD = 64, 256  # numbers of a part of the stream, and of a head
TOKEN, BEFORE, SECOND, COPIED = (slice(k * PART, (k + 1) * PART) for k in range(4))
STREAM = 4 * PART + 2  # the last but one is constant, the last is zero
SLOW = HEAD // 4  # pairs of a head from here on hardly turn with the position
PERIOD = 32  # of ordinary text, which repeats what is near
RECENT = 64
OWN, OTHER, ITEMS = "own", "other", "retrieval: sentences"


class Words:
    """A tokenizer whose tokens are the words of sentences, half of a place each, and all before a place."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        pieces = re.findall(r"\w+ keeps the \w+ \w+| in |\w{4}|\W+", text)
        return {"input_ids": [self.known.setdefault(piece, len(self.known)) for piece in pieces]}


def planted(vocab: int) -> Any:
    """The decoder, whose tokens are random directions."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=STREAM,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HEAD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
        rms_norm_eps=1e-6,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.nn.functional.normalize(torch.randn(vocab, PART, generator=torch.Generator().manual_seed(0)), dim=1)
    turns = 1e9 ** (-torch.arange(SLOW) / (HEAD // 2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight[:, -2] = 1.0
        model.model.embed_tokens.weight[:, TOKEN] = tokens
        model.lm_head.weight[:, COPIED] = tokens
        _, first, second = (layer.self_attn for layer in model.model.layers)
        for head, part in enumerate((BEFORE, SECOND)):  # a peak of rotary embedding one and two tokens before
            row = head * HEAD
            first.k_proj.weight[row : row + SLOW, -2] = 15.0
            first.q_proj.weight[row : row + SLOW, -2] = torch.cos((head + 1) * turns)
            first.q_proj.weight[row + HEAD // 2 : row + HEAD // 2 + SLOW, -2] = -torch.sin((head + 1) * turns)
            first.v_proj.weight[row : row + PART, TOKEN] = torch.eye(PART)
            first.o_proj.weight[part, row : row + PART] = torch.eye(PART) * (2 / STREAM) ** 0.5
        for row, asked, known in ((SLOW, TOKEN, BEFORE), (SLOW + HEAD // 2, BEFORE, SECOND)):
            second.q_proj.weight[row : row + PART, asked] = torch.eye(PART) * 5.0
            second.k_proj.weight[row : row + PART, known] = torch.eye(PART)
        second.v_proj.weight[:PART, TOKEN] = torch.eye(PART)
        second.o_proj.weight[COPIED, :PART] = torch.eye(PART) / 2
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The decoder, its sums of both exit layers, and texts."""
    words = Words()
    items = {
        use: retrieval_rows(words, "sentences", count, SHORTEST, use, 1 << 20)
        for use, count in (("selection", 1), ("validation", 4))
    }
    vocab = len(words.known)
    model = planted(vocab)
    rng = np.random.default_rng(1)
    folder: Path = tmp_path_factory.mktemp("sums") / "sums"
    with ExitSums(model, (1, 2)) as sums:
        for rows_WT in torch.from_numpy(rng.integers(0, vocab, (16, SHORTEST))).split(4):
            sums.begin(rows_WT)
            sums.add(rows_WT)
        sums.meet()
        sums.save(folder, {"identity": {"batches": 4}, "done": 4})
    periods = {name: rng.permutation(vocab)[:PERIOD] for name in (OWN, OTHER)}
    texts = [(name, torch.from_numpy(np.tile(ids, (4, SHORTEST // PERIOD)))) for name, ids in periods.items()]
    return SimpleNamespace(model=model, sums=open_sums(folder), items=items, texts=texts)


def chosen(world: SimpleNamespace, *uses: str) -> tuple[int, dict[str, Any]]:
    """The exit layer and the facts of a choice, with retrieval items of these uses."""
    items = {use: [(ITEMS, world.items[use])] if use in uses else [] for use in ("selection", "validation")}
    inputs = ChoiceInputs(
        num_layers=3,
        candidates=ExitCandidates((1, 2), (RECENT,), False, Exits((1, 2), SHORTEST)),
        limit=Limit(0.05, None),
        trains=Lazy(None, lambda: False),
        sums=Lazy(None, lambda: world.sums),
        model=Lazy(None, lambda: world.model),
        partial=Lazy(None, lambda: lambda maps, tap: PartialReplacement(world.model, maps, tap)),
        selection=Lazy(None, lambda: selection_texts(world.texts, SHORTEST)),
        validation=Lazy(None, lambda: world.texts),
        selection_items=Lazy(None, lambda: items["selection"]),
        validation_items=Lazy(None, lambda: items["validation"]),
        saved=Lazy(None, lambda: lambda maps, tokens: float(len(maps))),
        speedup=Lazy(None, lambda: lambda maps: SimpleNamespace(prefill=1.0 + len(maps), decode=1.0)),
        setting=Lazy(None, dict),
    )
    choice = PredictedKVMethod().choose(inputs, quiet, lambda _line: None, {})
    return min(choice.maps), choice.facts


def test_ordinary_text_does_not_see_that_a_layer_which_copies_is_skipped(world: SimpleNamespace) -> None:
    """Nor do passages that occur twice: what they ask for stands near too."""
    exit_layer, facts = chosen(world)
    (tested,) = facts["goal"]["path"]
    assert exit_layer == 1 and tested["within"] and tested["retrieval"] == []
    assert tested["long_range"] == []
    assert all(row["perplexity_original"] < 5 for row in tested["quality_losses"])


@pytest.mark.parametrize("uses", [("validation",), ("selection",), ("selection", "validation")])
def test_retrieval_items_refuse_an_exit_layer_below_a_layer_that_copies(
    uses: tuple[str, ...], world: SimpleNamespace
) -> None:
    exit_layer, facts = chosen(world, *uses)
    assert exit_layer == 2
    tested, *failed = facts["goal"]["path"]
    lowest = facts["curve"]["points"][-1]
    assert lowest["replaced_layers"] == [1, 2] and max(lowest["increases"]) < 0.01
    if "selection" in uses:
        assert lowest["long_range"] > 0.3 and not failed
    else:
        ((row,),) = (step["retrieval"] for step in failed)
        assert row["text"] == ITEMS and row["lost_interval"][0] > 0.1
    if "validation" in uses:
        (row,) = tested["retrieval"]
        assert row["tokens"] == 4 * 12 and row["perplexity_original"] < 2
        assert row["lost"] == pytest.approx(0.0, abs=1e-3)
