"""Windows in IRs of OpenVINO: mixes with attention and linear layers, against torch, and through OpenVINO GenAI."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import NblError
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE
from nbl_export.mixers.base import Mixer, Running
from nbl_export.mixers.window import Window
from nbl_export.targets.checks import judge_maps, stored_maps
from nbl_export.targets.openvino.check import check_ir_pruned, held_ir_maps
from nbl_export.targets.openvino.engine import OPENVINO
from nbl_export.targets.openvino.ir.files import read_ir, stored_matrices
from nbl_export.targets.openvino.rewrite import window
from nbl_export.targets.openvino.session import IrDecoder, OpenVinoRunner
from nbl_export.verify.ladder import greedy
from tests.tiny import HEAD_DIM
from tests.verifying import verify_tiny

from .test_toy_kind import CLOSE, LENGTHS, STEPS, ids, torch_logits, worst_of_batch
from .test_window_graph import W, chosen_of, worst_of_last


@pytest.fixture
def made(checkpoint: Any, exported: Any, tmp_path: Path) -> Callable[..., tuple[Path, dict[int, Mixer]]]:
    """(architecture, mix) -> an IR with the logits of all tokens and one with those of the last, and its mixers."""

    def make(name: str, mix: str, tokens: int = W, tap: str = "residual") -> tuple[Path, dict[int, Mixer]]:
        chosen = chosen_of(checkpoint(name), tuple(mix), tap, tokens)
        OPENVINO.linearize(exported(name, "openvino"), tmp_path / "nbl", chosen, tap)
        OPENVINO.keep_last_token(tmp_path / "nbl")
        return tmp_path / "nbl", chosen

    return make


@pytest.mark.parametrize(("name", "mix"), [("llama", "aww"), ("qwen2", "law"), ("granite", "wal")])
def test_the_ir_computes_what_torch_computes(checkpoint: Any, made: Any, name: str, mix: str) -> None:
    """A padded batch, cached steps, the states, and the graph that computes one token at its end."""
    out, chosen = made(name, mix)
    right = torch_logits(checkpoint(name), chosen)
    decoder = IrDecoder(out, ALL_LOGITS_IR, exact=True)
    assert worst_of_batch(decoder, right) < CLOSE
    assert decoder.contract.state_layers == tuple(i for i, kind in enumerate(mix) if kind == "w")
    assert worst_of_last(IrDecoder(out, IR_FILE, exact=True), right) < CLOSE
    assert check_ir_pruned("nbl", out).passed and judge_maps("nbl", held_ir_maps(out), chosen).passed


@pytest.mark.parametrize("tokens", [1, 16])
def test_chunks_and_sizes(checkpoint: Any, made: Any, tokens: int) -> None:
    """One row in chunks; the normed tap."""
    out, chosen = made("llama", "aww", tokens, "normed")
    right = torch_logits(checkpoint("llama"), chosen, "normed")
    decoder, text = IrDecoder(out, ALL_LOGITS_IR, exact=True), ids()[:1]
    for cuts in ((2,), (4, 5), (1, 2, 9)):
        decoder.begin(1)
        bounds = zip((0, *cuts), (*cuts, text.shape[1]), strict=True)
        found = np.concatenate([decoder.step(text[:, start:end])[0] for start, end in bounds])
        assert np.abs(found - right[0][: len(found)]).max() < CLOSE
    assert worst_of_last(IrDecoder(out, IR_FILE, exact=True), right) < CLOSE


def test_windows_of_two_sizes(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    sizes = {1: ("awa", 4), 2: ("aaw", W)}
    chosen = {i: chosen_of(checkpoint("llama"), tuple(mix), tokens=n)[i] for i, (mix, n) in sizes.items()}
    OPENVINO.linearize(exported("llama", "openvino"), tmp_path / "nbl", chosen)
    OPENVINO.keep_last_token(tmp_path / "nbl")
    right = torch_logits(checkpoint("llama"), chosen)
    assert worst_of_batch(IrDecoder(tmp_path / "nbl", ALL_LOGITS_IR, exact=True), right) < CLOSE
    assert worst_of_last(IrDecoder(tmp_path / "nbl", IR_FILE, exact=True), right) < CLOSE


def feeds_of(ids_BT: np.ndarray, total: int, beams: list[int]) -> dict[str, np.ndarray]:
    """Inputs of a step without padding behind which there are `total` tokens."""
    batch, count = ids_BT.shape
    places = np.broadcast_to(np.arange(total - count, total), ids_BT.shape)
    mask, order = np.ones((batch, total), np.int64), np.array(beams, np.int32)
    return {"input_ids": ids_BT, "attention_mask": mask, "position_ids": places.copy(), "beam_idx": order}


def test_states_follow_the_beams(made: Any) -> None:
    """Both rows go on from the second one, as a beam search may ask."""
    out, _ = made("llama", "aww")
    session, text = IrDecoder(out, ALL_LOGITS_IR, exact=True).session, ids()[:, : max(LENGTHS)]
    session.begin(2)
    session.run(text[:, :-1], np.ones_like(text[:, :-1]))
    both = feeds_of(text[[1, 1], -1:], text.shape[1], beams=[1, 1])
    found = session._requests[0].infer(both)["logits"].copy()
    session.begin(2)
    right = session.run(text, np.ones_like(text))
    assert np.abs(found[:, 0] - right[1, -1]).max() < CLOSE < np.abs(right[0, -1] - right[1, -1]).max()


@pytest.mark.parametrize(
    ("name", "precision", "mix", "tap"), [("llama", "fp16", "law", "residual"), ("qwen2", "int8", "waw", "normed")]
)
def test_matrices_get_the_codes_of_their_neighbours(
    checkpoint: Any, exported: Any, tmp_path: Path, name: str, precision: str, mix: str, tap: str
) -> None:
    """In float32 arithmetic, against the original with the same matrices; rotary tables are float32."""
    chosen, original = chosen_of(checkpoint(name), tuple(mix), tap), exported(name, "openvino", precision)
    OPENVINO.linearize(original, tmp_path / "nbl", chosen, tap)
    ir, held = read_ir(tmp_path / "nbl"), held_ir_maps(tmp_path / "nbl")
    assert judge_maps("nbl", held, chosen).passed
    coded = {name for name in stored_matrices(ir) if name.startswith("/nbl/")}
    assert coded == set(held.products)
    mixers = Running(chosen, stored_maps(held, chosen))
    right = OPENVINO.open_mixed(original, HEAD_DIM, mixers, tap, exact=True)
    whole = []
    for row, n in zip(ids(), LENGTHS, strict=True):
        right.begin(1)
        whole.append(right.step(row[None, : n + STEPS])[0])
    assert worst_of_batch(IrDecoder(tmp_path / "nbl", exact=True), whole) < CLOSE
    tables = [n for n in ir.get_ops() if n.get_friendly_name().startswith(window.TABLES)]
    assert tables and {n.get_element_type().to_string() for n in tables} == {"f32", "boolean"}


def test_verification_passes(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    """The whole ladder at int4, in float32 arithmetic and in what ships."""
    chosen, original = chosen_of(checkpoint("llama"), ("a", "w", "w")), exported("llama", "openvino", "int4")
    results = verify_tiny(
        checkpoint("llama"), "openvino", "int4", tmp_path, (1, 2), "residual", chosen.__getitem__, original
    )
    assert [r for r in results if not r.passed] == []
    assert {"structure", "original", "nbl", "text", "shipped", "last_token"} <= {r.check for r in results}


@pytest.mark.parametrize("part", ["norm", "bias", "output"])
def test_other_numbers_are_found(made: Any, part: str) -> None:
    out, chosen = made("qwen2", "aww")
    one = chosen[1]
    assert isinstance(one, Window)
    wrong = {**chosen, 1: dataclasses.replace(one, **{part: getattr(one, part) * np.float32(1.01)})}
    assert f"layer 1's {part} is not the fitted one" in judge_maps("nbl", held_ir_maps(out), wrong).detail


@pytest.mark.parametrize("mix", ["aww", "law"])
def test_few_rows_reach_the_windows_at_the_top(made: Any, mix: str) -> None:
    """Rows behind each MLP in a prefill of 18 tokens, and equal states with and without pruning."""
    import openvino

    out, _ = made("llama", mix)
    text, held = ids()[:1], []
    for file in (ALL_LOGITS_IR, IR_FILE):
        model = read_ir(out, file)
        nodes = [n for n in model.get_ordered_ops() if n.get_type_name() == "MatMul"]
        products = [n for n in nodes if "mlp.down_proj/" in n.get_friendly_name()]
        model.add_outputs([node.output(0) for node in products])
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        request = compiled.create_infer_request()
        found = request.infer(feeds_of(text, text.shape[1], beams=[0]))
        rows = [found[place + 1].shape[1] for place in range(len(products))]
        held.append({s.name: np.array(s.state.data) for s in request.query_state() if s.name.endswith("conv_state")})
    assert rows == {"aww": [2 * W, W + 1, 1], "law": [18, W + 1, 1]}[mix]
    assert held[0].keys() == held[1].keys() and held[0]
    assert max(np.abs(value - held[1][name]).max() for name, value in held[0].items()) < CLOSE


def test_genai_says_what_the_decoder_says(made: Any) -> None:
    """A batch of two lengths in OpenVINO GenAI's own choice of back end; the paged one refuses states."""
    import openvino
    import openvino_genai

    out, _ = made("llama", "waw")
    prompts = [ids()[k, :n].tolist() for k, n in enumerate(LENGTHS)]
    right = [list(greedy(IrDecoder(out, exact=True), prompt, STEPS)[0]) for prompt in prompts]
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline = openvino_genai.LLMPipeline(str(out), "CPU", **exact)
    config = pipeline.get_generation_config()
    config.max_new_tokens, config.do_sample, config.ignore_eos = STEPS, False, True
    rows = [[0] * (max(LENGTHS) - len(p)) + p for p in prompts]
    mask = [[0] * (max(LENGTHS) - len(p)) + [1] * len(p) for p in prompts]
    given = openvino_genai.TokenizedInputs(*(openvino.Tensor(np.array(v, np.int64)) for v in (rows, mask)))
    assert [list(map(int, t)) for t in pipeline.generate(given, config).tokens] == right
    with pytest.raises(RuntimeError):
        openvino_genai.LLMPipeline(str(out), "CPU", ATTENTION_BACKEND="PA", **exact)


def test_the_runner_goes_back_to_where_it_was_told_to(made: Any) -> None:
    """As a benchmark goes back to the end of a filled cache, again and again."""
    out, _ = made("llama", "aww")
    text = ids()[0].tolist()
    with OpenVinoRunner(out, threads=1) as runner:
        runner.begin(64)
        runner.append(text)
        right = runner.last_logits()
        runner.rewind(0)
        runner.append(text[:-1])
        for _ in range(3):
            runner.rewind(len(text) - 1)
            runner.append(text[-1:])  # one token, which reads the states of the windows
            assert np.abs(runner.last_logits() - right).max() < CLOSE
        with pytest.raises(NblError, match="cannot go back to the first 4 tokens"):
            runner.rewind(4)
