"""The original graph with edited caches computes what torch computes whose caches are edited by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nbl_export.errors import RefusalError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.methods.base import changed
from nbl_export.methods.checkpoint.load import load_model, read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.predicted_kv.reference import PredictedKVDecoder, Rotary, onnx_reference
from nbl_export.targets import exporter_of
from tests.exits import CLOSE, apart, chunks_of, predicted_maps, torch_logits
from tests.tiny import HEAD_DIM, KV_HEADS, cases, made_by

W = 4
KEYS = KV_HEADS * HEAD_DIM
# of one sequence: a prompt that stops, short steps, and further chunks that stop behind a cache
CHUNKS = (13, 1, W + 1, W + 2, 9, 1)


@pytest.mark.parametrize(
    ("architecture", "exit_layer"),
    cases(
        [("llama", 2), ("llama", 0), ("phi4-mini", 1), *((name, 1) for name in made_by("genai") if name != "hunyuan")]
    ),
)
def test_logits_are_those_of_torch(
    architecture: str, exit_layer: int, checkpoint: Callable[[str], Path], exported: Callable[..., Path]
) -> None:
    spec = read_spec(resolve(str(checkpoint(architecture))))
    maps = predicted_maps(exit_layer, W, spec.num_kv_heads * spec.head_dim)
    chunks = chunks_of(CHUNKS)
    right = torch_logits(load_model(checkpoint(architecture)), maps, chunks)
    decoder = onnx_reference(exported(architecture), spec.head_dim, maps)
    decoder.begin(1)
    assert max(apart(decoder.step(ids)[0], logits) for ids, logits in zip(chunks, right, strict=True)) < CLOSE


def opened(exported: Callable[..., Path]) -> PredictedKVDecoder:
    return onnx_reference(exported("llama"), HEAD_DIM, predicted_maps(1, W, KEYS))


def padded(chunks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([chunk.shape[1] for chunk in chunks])
    valid = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = np.zeros(valid.shape, np.int64)
    for row, chunk in enumerate(chunks):
        ids[row, : chunk.shape[1]] = chunk
    return ids, valid


def test_a_batch_is_its_sequences_alone(exported: Callable[..., Path]) -> None:
    decoder, chunks, steps = opened(exported), chunks_of((12, 7)), chunks_of((1, 1), 1)
    decoder.begin(2)
    found = decoder.step(*padded(chunks)), decoder.step(np.concatenate(steps))
    for row, (chunk, step) in enumerate(zip(chunks, steps, strict=True)):
        decoder.begin(1)
        for together, alone in zip(found, (decoder.step(chunk)[0], decoder.step(step)[0]), strict=True):
            np.testing.assert_array_equal(together[row, : len(alone)], alone)


def test_the_maps_are_those_that_the_graph_stores(exported: Callable[..., Path]) -> None:
    """An engine opens the reference of a plan with an exit layer."""
    maps, other, (ids,) = predicted_maps(1, W, KEYS), predicted_maps(1, W, KEYS), chunks_of((12,))
    other[1].weight[:KEYS] /= 2
    found = []
    for running in ({**maps, 1: changed(maps[1], {"weight": other[1].weight})}, other, maps):
        decoder = exporter_of("genai").open_reference(exported("llama"), HEAD_DIM, running, "residual", exact=True)
        decoder.begin(1)
        found.append(decoder.step(ids)[0])
    assert apart(found[0], found[1]) < CLOSE < 100 * CLOSE < apart(found[0], found[2])


def test_one_short_row_lets_a_whole_batch_continue(exported: Callable[..., Path]) -> None:
    decoder, original = opened(exported), OnnxDecoder(exported("llama"), HEAD_DIM)
    for chunk, shorter in zip(chunks_of((W + 1, 15)), (W + 1, 15), strict=True):
        ids, valid = padded([chunk, *chunks_of((W + 1,), 3)])
        for one in (decoder, original):
            one.begin(2)
        found, right = decoder.step(ids, valid), original.step(ids, valid)
        assert apart(found[0, :shorter], right[0, :shorter]) < CLOSE


def test_logits_of_a_graph_with_an_exit_layer_stand_at_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = OnnxDecoder(Path(), 0, session=SimpleNamespace(get_inputs=list, get_outputs=list))
    decoder.begin(2)
    given = np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1)
    monkeypatch.setattr(decoder, "run", lambda *_: {"logits": given})
    ids, valid = padded(chunks_of((6, 4)))
    nan = np.nan
    np.testing.assert_array_equal(
        decoder.step(ids, valid)[..., 0], [[1, nan, nan, nan, 2, 3], [4, nan, 5, 6, nan, nan]]
    )
    np.testing.assert_array_equal(decoder.step(ids[:, :3]), given)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_embedding_is_that_of_transformers(interleaved: bool) -> None:
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as neighbours
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 2, 5, 8)).astype(np.float32))
    angles = np.arange(20)[:, None] * np.array([1.0, 0.3, 0.07])
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    tables = [torch.from_numpy(np.concatenate([table[7:12]] * 2, 1))[None] for table in (cos, sin)]
    width = 6
    right = x.clone()
    right[..., :width] = (neighbours if interleaved else halves)(x[..., :width], x[..., :width], *tables)[0]
    np.testing.assert_allclose(Rotary(cos, sin, interleaved)(x.numpy(), 7), right.numpy(), atol=1e-6)


def test_a_choice_of_rotary_tables_is_refused(exported: Callable[..., Path]) -> None:
    with pytest.raises(RefusalError, match="tables of its rotary embedding"):
        onnx_reference(exported("phi3-long"), HEAD_DIM, predicted_maps(1, W, KEYS))
