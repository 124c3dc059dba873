"""Windows in ONNX graphs: every mix with attention and linear layers, against torch, and through GenAI."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import graph_caches
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.session import open_session
from nbl_export.mixers.base import Mixer, Running, StateSpec
from nbl_export.mixers.window import Window
from nbl_export.mixers.windowed import WindowShape, attend
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.windows import window_layers
from nbl_export.rewrite import rewrite
from nbl_export.rewrite.builder import GraphBuilder, ValidTokens
from nbl_export.rewrite.window import state_dims
from nbl_export.targets import exporter_of
from nbl_export.verify.ladder import greedy
from tests.genai import said_in_a_batch
from tests.tiny import HEAD_DIM, KV_HEADS, random_map
from tests.verifying import verify_tiny

from ..contracts import contract_of
from .test_toy_kind import CLOSE, LENGTHS, PAD, STEPS, ids, padded, torch_logits, worst_of_batch

W = 2  # so that of 12 tokens, not all enter three windows
MIXES = ("aww", "awl", "law", "waw", "wla", "lwa", "awa")


def chosen_of(checkpoint: Path, mix: tuple[str, ...], tap: str = "residual", tokens: int = W) -> dict[int, Mixer]:
    """a: attention stays; w: a window; l: a linear layer."""
    windows = window_layers(load_model(checkpoint), [i for i, kind in enumerate(mix) if kind == "w"], tokens, tap)
    return {i: windows[i] if kind == "w" else random_map(i) for i, kind in enumerate(mix) if kind != "a"}


def rewritten(exported: Path, out: Path, chosen: dict[int, Mixer], tap: str = "residual") -> Path:
    exporter_of("genai").linearize(exported, out, chosen, tap)
    return out


@pytest.mark.parametrize(
    ("name", "mix"), [*(("llama", mix) for mix in MIXES), ("qwen2", "aww"), ("qwen2", "wal"), ("llama3", "aww")]
)
def test_graph_computes_what_torch_computes(
    checkpoint: Any, exported: Any, tmp_path: Path, name: str, mix: str
) -> None:
    """Mixes, also with biases: a padded batch, cached steps, the caches, and the graph of one token at its end."""
    chosen = chosen_of(checkpoint(name), tuple(mix))
    out = rewritten(exported(name), tmp_path / "nbl", chosen)
    right = torch_logits(checkpoint(name), chosen)
    decoder = OnnxDecoder(out, HEAD_DIM)
    assert worst_of_batch(decoder, right) < CLOSE
    assert decoder.contract.state_layers == tuple(i for i, kind in enumerate(mix) if kind == "w")
    exporter_of("genai").keep_last_token(out)
    assert worst_of_last(OnnxDecoder(out, HEAD_DIM), right) < CLOSE


def worst_of_last(decoder: Any, right: list[np.ndarray]) -> float:
    """Largest difference of the last token's logits: a padded batch and single steps, then one row in chunks."""
    decoder.begin(2)
    found = decoder.step(*padded())
    assert found.shape[1] == 1
    worst = [np.abs(found[k, 0] - right[k][n - 1]).max() for k, n in enumerate(LENGTHS)]
    for step in range(STEPS):
        found = decoder.step(np.array([[ids()[k, n + step]] for k, n in enumerate(LENGTHS)]))
        worst += [np.abs(found[k, 0] - right[k][n + step]).max() for k, n in enumerate(LENGTHS)]
    text = ids()[:1]
    for cuts in ((1,), (4, 5), (2, 10), (9, 11)):
        decoder.begin(1)
        for start, end in zip((0, *cuts), (*cuts, text.shape[1]), strict=True):
            found = decoder.step(text[:, start:end])
            worst.append(np.abs(found[0, 0] - right[0][end - 1]).max())
    return float(max(worst))


@pytest.mark.parametrize(
    ("shape", "pairs"),
    [
        (WindowShape(1, 4, 2, 8, 0.3), 4),
        (WindowShape(2, 3, 3, 8, 0.4), 3),  # the last numbers of a head are not rotated
        (WindowShape(5, 6, 2, 8, 0.35), 4),
        (WindowShape(16, 2, 1, 6, 0.5), 2),
    ],
    ids=str,
)
def test_nodes_of_a_window_compute_what_numpy_computes(shape: WindowShape, pairs: int) -> None:
    """In chunks of several lengths and in single steps, with the state behind each."""
    frequencies = 0.3 ** np.arange(pairs)
    session, (batch, count) = window_alone(shape, frequencies), (2, 20)
    qkv = np.random.default_rng(0).normal(0, 1, (batch, count, shape.query_width + 2 * shape.key_width))
    qkv = qkv.astype(np.float32)
    for cuts in ((count,), (1,) * count, (3, 1, 9, 1, 6)):
        past = np.zeros((batch, *state_dims(shape)), np.float32)
        rows, end = np.zeros((batch, shape.tokens + 1, 2 * shape.key_width + 1), np.float32), 0
        for length in cuts:
            start, end = end, end + length
            right, rows = attend(qkv[:, start:end], rows, shape, frequencies)
            feeds = {"input_ids": np.ones((batch, length), np.int64), "attention_mask": np.ones((batch, end), np.int64)}
            names = ["heads", "present.0.recurrent_state"]
            held = {"past_key_values.0.recurrent_state": past, "past_key_values.0.conv_state": past[:, :1, :1, 0]}
            found, past = session.run(names, {**feeds, **held, "qkv": qkv[:, start:end]})
            assert np.abs(found - right).max() < 1e-5
            known = rows[..., -1:] * rows[..., :-1]
            assert np.abs(past.swapaxes(1, 2).reshape(known.shape) * rows[..., -1:] - known).max() < 1e-6


def window_alone(shape: WindowShape, frequencies: np.ndarray) -> Any:
    """A session of a graph that has one window and nothing else."""
    kinds = {"input_ids": ir.DataType.INT64, "attention_mask": ir.DataType.INT64, "qkv": ir.DataType.FLOAT}
    inputs = [ir.Value(name=name, type=ir.TensorType(kind)) for name, kind in kinds.items()]
    given = ir.node("Identity", inputs[2:], name="given")
    graph = ir.Graph(inputs, (), nodes=[given], opset_imports={"": 22}, name="window")
    build = GraphBuilder(graph, 0, kinds["qkv"], inputs[2].shape, ValidTokens(graph, kinds["qkv"]))
    spec = StateSpec(shape.tokens + 1, 2 * shape.key_width + 1)
    heads = build.window(given.outputs[0], shape, frequencies, spec, "window")
    heads.name = "heads"
    graph.extend(build.nodes)
    graph.outputs.append(heads)
    return open_session(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())


def test_chunks(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    """One row in chunks; the normed tap."""
    chosen = chosen_of(checkpoint("llama"), ("a", "w", "w"), "normed", 5)
    decoder = OnnxDecoder(rewritten(exported("llama"), tmp_path / "nbl", chosen, "normed"), HEAD_DIM)
    (right, _), text = torch_logits(checkpoint("llama"), chosen, "normed"), ids()[:1]
    for cuts in ((2,), (4, 5), (1, 2, 9)):
        decoder.begin(1)
        bounds = zip((0, *cuts), (*cuts, text.shape[1]), strict=True)
        found = np.concatenate([decoder.step(text[:, start:end])[0] for start, end in bounds])
        assert np.abs(found - right[: len(found)]).max() < CLOSE


def test_the_state_has_a_row_for_the_first_token_and_each_of_the_window(
    checkpoint: Any, exported: Any, tmp_path: Path
) -> None:
    out = rewritten(exported("llama"), tmp_path / "nbl", chosen_of(checkpoint("llama"), ("a", "w", "a")))
    contract = contract_of(ir.load(out / "model.onnx"))
    states = {i.name: i.shape[1:] for i in contract.inputs if i.name.endswith("_state")}
    rows = (2 * KV_HEADS, W + 1, HEAD_DIM)
    assert states == {"past_key_values.1.conv_state": (1, 1), "past_key_values.1.recurrent_state": rows}
    assert contract.cache_layers == (0, 2)


@pytest.mark.parametrize(
    ("name", "source", "precision", "mix"),
    [
        ("llama", "genai", "int8", "wal"),
        ("llama", "mobius", "fp16", "aww"),
        ("qwen2", "genai", "int4", "aww"),
        ("granite", "genai", "fp32", "lwa"),
    ],
)
def test_verification_passes(
    checkpoint: Any, exported: Any, tmp_path: Path, name: str, source: str, precision: str, mix: str
) -> None:
    """The whole ladder, with greedy text of GenAI, and with a table of tokens below the first window."""
    chosen, original = chosen_of(checkpoint(name), tuple(mix)), exported(name, source, precision)
    results = verify_tiny(
        checkpoint(name), source, precision, tmp_path, tuple(chosen), "residual", chosen.__getitem__, original
    )
    assert [r for r in results if not r.passed] == []
    assert {"structure", "original", "nbl", "text", "last_token"} <= {r.check for r in results}


@pytest.mark.parametrize(("branch", "heads"), [("_One", "Keys"), ("_Chunk", "Turned")])
def test_verification_sees_a_wrong_distance(
    checkpoint: Any, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branch: str, heads: str
) -> None:
    """Planted: keys, or queries, stand one place further."""
    from nbl_export.rewrite import window

    turned = window._Branch.turned

    def further(self: Any, value: Any, place: int, number: int, title: str) -> Any:
        return turned(self, value, place + (title == heads), number, title)

    monkeypatch.setattr(getattr(window, branch), "turned", further)
    chosen, original = chosen_of(checkpoint("llama"), ("a", "w", "a")), exported("llama")
    results = verify_tiny(
        checkpoint("llama"), "genai", "fp32", tmp_path, (1,), "residual", chosen.__getitem__, original, prompts=False
    )
    assert {"nbl"} <= {r.check for r in results if not r.passed}


def test_verification_sees_other_weights(
    checkpoint: Any, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the graph has the norm of another layer."""
    import dataclasses

    chosen = chosen_of(checkpoint("llama"), ("a", "w", "w"))
    one = chosen[1]
    assert isinstance(one, Window) and one.norm is not None
    wrong = dataclasses.replace(one, norm=one.norm * 1.01)
    emit = Window.emit

    def swap(self: Window, build: Any, streams: Any) -> Any:
        return emit(wrong if self is one and isinstance(build, GraphBuilder) else self, build, streams)

    monkeypatch.setattr(Window, "emit", swap)
    results = verify_tiny(
        checkpoint("llama"), "genai", "fp32", tmp_path, (1, 2), "residual", chosen.__getitem__, exported("llama"),
        prompts=False,
    )  # fmt: skip
    failed = [r for r in results if not r.passed]
    assert any(r.check == "structure" and "layer 1's norm is not the fitted one" in r.detail for r in failed)


def test_genai_runs_prompts_of_two_lengths(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    """A batch, padded on the right as GenAI pads it, says what each prompt says alone; the tail is pruned."""
    out = rewritten(exported("llama"), tmp_path / "nbl", chosen_of(checkpoint("llama"), ("a", "w", "w")))
    prompts = [ids()[k, :n].tolist() for k, n in enumerate(LENGTHS)]
    right = [greedy(OnnxDecoder(out, HEAD_DIM), prompt, STEPS)[0] for prompt in prompts]
    exporter_of("genai").keep_last_token(out)
    assert said_in_a_batch(out, prompts, STEPS, PAD) == [list(tokens) for tokens in right]


def test_mixers_in_numpy_between_parts_of_the_original(checkpoint: Any, exported: Any) -> None:
    chosen = chosen_of(checkpoint("llama"), ("a", "w", "w"))
    mapped = exporter_of("genai").open_mixed(exported("llama"), HEAD_DIM, Running(chosen), "residual", exact=True)
    assert worst_of_batch(mapped, torch_logits(checkpoint("llama"), chosen)) < CLOSE


def test_windows_of_two_sizes_are_refused(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    model = load_model(checkpoint("llama"))
    both = {**window_layers(model, [1], 4, "residual"), **window_layers(model, [2], 5, "residual")}
    with pytest.raises(RefusalError, match="states of several sizes"):
        rewrite(exported("llama"), tmp_path / "nbl", both)


def test_graph_of_mobius(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    chosen, out = chosen_of(checkpoint("qwen2"), ("w", "a", "w")), tmp_path / "nbl"
    exporter_of("mobius").linearize(exported("qwen2", "mobius"), out, chosen)
    right = torch_logits(checkpoint("qwen2"), chosen)
    assert worst_of_batch(OnnxDecoder(out, HEAD_DIM), right) < CLOSE
    exporter_of("mobius").keep_last_token(out)
    assert worst_of_last(OnnxDecoder(out, HEAD_DIM), right) < CLOSE


def test_padding_behind_a_cache_and_in_front_of_a_text(checkpoint: Any, given_graph: Any, tmp_path: Path) -> None:
    """A graph of plain operators: a padded chunk behind 4 tokens; then texts that end together, in steps of one."""
    chosen, out = chosen_of(checkpoint("llama"), ("a", "w", "w")), tmp_path / "nbl"
    rewrite(given_graph("torchscript"), out, chosen)
    right = torch_logits(checkpoint("llama"), chosen)
    exporter_of("genai").keep_last_token(out)
    sides = graph_caches(ir.load(out / "model.onnx").graph).values()
    caches = {str(a.name): str(b.name) for pasts, presents in sides for a, b in zip(pasts, presents, strict=True)}
    decoder, text = OnnxDecoder(out, HEAD_DIM, caches=caches), ids()
    decoder.begin(2)
    decoder.step(text[:, :4])
    valid = (np.arange(8) < np.array([8, 2])[:, None]).astype(np.int64)
    found = [decoder.step(text[:, 4:12] * valid, valid), decoder.step(text[[[0], [1]], [[12], [6]]])]
    for logits, ends in zip(found, ((11, 5), (12, 6)), strict=True):
        assert max(np.abs(logits[k, 0] - right[k][end]).max() for k, end in enumerate(ends)) < CLOSE
    decoder.begin(2)
    for place in range(9):
        valid = np.array([[1], [place >= 3]], np.int64)
        logits = decoder.step(text[[[0], [1]], [[place], [max(place - 3, 0)]]] * valid, valid)
        away = [np.abs(logits[k, 0] - right[k][place - 3 * k]).max() for k in range(2) if valid[k]]
        assert max(away) < CLOSE


@pytest.mark.parametrize("mix", ["aww", "awl", "law"])
def test_few_rows_reach_the_windows_at_the_top(checkpoint: Any, exported: Any, tmp_path: Path, mix: str) -> None:
    """Rows behind each MLP in a prefill of 18 tokens, and equal states with and without pruning."""
    out = rewritten(exported("llama"), tmp_path / "nbl", chosen_of(checkpoint("llama"), tuple(mix)))
    text, held = ids()[:1], []
    for name in ("model.onnx", "shown.onnx"):
        if name == "shown.onnx":
            exporter_of("genai").keep_last_token(out)
            model = ir.load(out / "model.onnx")
            products = [node for node in model.graph if str(node.name).endswith("mlp/down_proj/MatMul")]
            model.graph.outputs.extend(node.outputs[0] for node in products)
            ir.save(model, out / name)
        decoder = OnnxDecoder(out, HEAD_DIM, file=name)
        decoder.begin(1)
        decoder.step(text[:, :1])
        if name == "shown.onnx":
            names = [str(node.outputs[0].name) for node in products]
            run = decoder.session.run
            feeds = mock.Mock(side_effect=run)
            decoder.session = SimpleNamespace(run=feeds)
            decoder.begin(1)
            decoder.step(text)
            rows = [value.shape[1] for value in run(names, feeds.call_args.args[1])]
        decoder.begin(1)
        decoder.step(text)
        held.append({n: v for n, v in decoder._past.items() if n.endswith("recurrent_state")})
    enters = {"aww": [2 * W, W + 1, 1], "awl": [W + 1, 1, 1], "law": [18, W + 1, 1]}
    assert rows == enters[mix]
    assert held[0].keys() == held[1].keys() and held[0]
    for state, value in held[0].items():
        assert np.abs(value - held[1][state]).max() < CLOSE
