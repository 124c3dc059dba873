"""Predicted KV in OpenVINO's IR: both back ends give what torch gives, sequence for sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import RefusalError
from nbl_export.graph.ir.files import precision_of, read_ir, stored_matrix
from nbl_export.graph.ir.paged import PagedIr
from nbl_export.graph.ir.session import IrDecoder
from nbl_export.graph.ir.signals import kept_signal_stack
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE
from nbl_export.methods.checkpoint.load import load_model, read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.model.architectures import exits_refused
from nbl_export.targets.checks import judge_maps
from nbl_export.targets.openvino import check
from nbl_export.targets.openvino.engine import OPENVINO
from tests.exits import CLOSE, apart, chunks_of, predicted_maps, torch_logits
from tests.tiny import HEAD_DIM, KV_HEADS, cases, made_by, record_of

pytestmark = pytest.mark.engine

W = 4
KEYS = KV_HEADS * HEAD_DIM
# Architectures whose IR takes an exit layer, by their records.
IN_OPENVINO = [
    name for name in made_by("openvino") if "openvino" not in exits_refused(record_of(name).name, has_window=False)
]
CHUNKS = (13, 1, W + 1, W + 2, 9, 1)  # as for the reference


@pytest.fixture(scope="module")
def pair(
    exported_ir: Callable[[str, str], Path], checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """(architecture, precision, exit layer) -> the original with both graphs, and its version with predicted KV."""

    @functools.cache
    def make(architecture: str = "llama", precision: str = "fp32", exit_layer: int = 1) -> tuple[Path, Path]:
        source = exported_ir(architecture, precision)
        out = tmp_path_factory.mktemp("pair") / "model"
        spec = read_spec(resolve(str(checkpoint(architecture))))
        OPENVINO.linearize(source, out, predicted_maps(exit_layer, W, spec.num_kv_heads * spec.head_dim))
        return source, out

    return make


@pytest.mark.parametrize(
    ("architecture", "exit_layer"), cases([("llama", 2), ("llama", 0), *((name, 1) for name in IN_OPENVINO)])
)
def test_logits_are_those_of_torch(
    architecture: str, exit_layer: int, checkpoint: Callable[[str], Path], pair: Callable[..., tuple[Path, Path]]
) -> None:
    spec = read_spec(resolve(str(checkpoint(architecture))))
    maps = predicted_maps(exit_layer, W, spec.num_kv_heads * spec.head_dim)
    chunks = chunks_of(CHUNKS)
    right = torch_logits(load_model(checkpoint(architecture)), maps, chunks)
    source, out = pair(architecture, "fp32", exit_layer)
    every = IrDecoder(out, ALL_LOGITS_IR, exact=True)
    last = IrDecoder(out, IR_FILE, exact=True)
    reference = OPENVINO.open_reference(source, spec.head_dim, maps, "residual", exact=True)
    for decoder in (every, last, reference):
        decoder.begin(1)
    for ids, logits in zip(chunks, right, strict=True):
        assert apart(every.step(ids)[0], logits) < CLOSE
        assert apart(reference.step(ids)[0], logits) < CLOSE
        assert apart(last.step(ids)[0], logits[-1:]) < CLOSE


def test_each_sequence_of_a_batch_has_its_own_rows(pair: Callable[..., tuple[Path, Path]]) -> None:
    """A batch that is padded on the left, and a step in which one row's positions go on behind the other's."""
    _, out = pair()
    lengths = (7, 13)
    prompts = chunks_of(lengths)
    valid = (np.arange(13) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.stack([np.pad(prompt[0], (0, 13 - prompt.shape[1])) for prompt in prompts])
    seconds = np.concatenate(chunks_of((6, 6), 1))  # positions 7 .. 12, and 13 .. 18
    together = IrDecoder(out, ALL_LOGITS_IR, exact=True)
    together.begin(2)
    found = [together.step(ids, valid), together.step(seconds)]
    for row, length in enumerate(lengths):
        single = IrDecoder(out, ALL_LOGITS_IR, exact=True)
        single.begin(1)
        expected = single.step(ids[row : row + 1, :length]), single.step(seconds[row : row + 1])
        assert np.isnan(expected[1][0]).all(-1).sum() == 6 - W - 1
        for got, right in zip(found, expected, strict=True):
            assert apart(got[row, : right.shape[1]], right[0]) < CLOSE


# Steps of the paged back end, each with tokens of several sequences: (sequence, tokens) in their order.
STEPS = (
    ((0, 13), (1, 7), (2, 3)),  # prompts of unequal length
    ((0, 1), (1, 1), (3, 20)),  # decode beside prefill
    ((2, 1), (0, 9), (1, 6)),  # a second turn, and a further part of a prompt
    ((3, 1), (2, 12), (1, 1), (0, 1)),
)


@pytest.mark.parametrize("exit_layer", [0, 1, 2])
def test_sequences_of_a_paged_step_are_these_sequences_alone(
    exit_layer: int, checkpoint: Callable[[str], Path], pair: Callable[..., tuple[Path, Path]]
) -> None:
    model = load_model(checkpoint("llama"))
    lengths = {s: [n for step in STEPS for name, n in step if name == s] for s in range(4)}
    texts = {s: chunks_of(own, s) for s, own in lengths.items()}
    right = {s: torch_logits(model, predicted_maps(exit_layer, W, KEYS), chunks) for s, chunks in texts.items()}
    paged = PagedIr(pair("llama", "fp32", exit_layer)[1], ALL_LOGITS_IR, exact=True)
    paged.begin(64, 4)
    done = dict.fromkeys(texts, 0)
    for step in STEPS:
        found = paged.step({s: texts[s][done[s]][0] for s, _ in step})
        for s, logits in zip((s for s, _ in step), np.split(found, np.cumsum([n for _, n in step])[:-1]), strict=True):
            assert apart(logits, right[s][done[s]]) < CLOSE
            done[s] += 1


def test_two_sequences_whose_positions_follow_each_other_are_one_run(pair: Callable[..., tuple[Path, Path]]) -> None:
    """The limit that `methods.predicted_kv.ir` states."""
    for more, continues in ((W - 1, True), (W, False)):
        paged = PagedIr(pair()[1], ALL_LOGITS_IR, exact=True)
        paged.begin(64, 2)
        first, second, third = (ids[0] for ids in chunks_of((9, 9, more)))
        paged.step({0: first})
        found = paged.step({1: second, 0: third}, np.array([len(second) - 1, -1]))
        assert np.isnan(found[0]).all() != continues
        assert not np.isnan(found[1]).any()


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_maps_get_the_codes_of_their_neighbours(pair: Callable[..., tuple[Path, Path]], precision: str) -> None:
    source, out = pair("llama", precision)
    model = read_ir(out)
    assert precision_of(model) == precision
    groups = ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]  # of activations, which the plugin reads
    assert model.has_rt_info(groups) == (precision != "fp16")
    products = {n.get_friendly_name(): n for n in model.get_ops() if n.get_type_name() == "MatMul"}
    neighbour = next(name for name in products if "layers.0.mlp.up_proj" in name)
    names = [name for name in products if name.startswith("/nbl/")]
    assert len(names) == 2
    found = [stored_matrix(products[name]) for name in (neighbour, *names)]
    assert None not in found
    if precision == "int4":
        assert len({blocks.size for blocks in found if blocks is not None}) == 1
    assert judge_maps("nbl", check.read_maps(out), predicted_maps(1, W, KEYS)).passed
    assert check.check_untouched(out, source).passed
    assert check.check_pruned("nbl", out).passed


def test_maps_of_some_layers_alone_are_refused(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    maps = {1: predicted_maps(1, W, KEYS)[1]}
    with pytest.raises(RefusalError, match=r"layer 2: maps are for layers \[1\]"):
        OPENVINO.linearize(pair()[0], tmp_path / "model", maps)


def test_maps_of_another_width_are_refused(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match=f"layer 1: its map predicts keys {KEYS // 2} wide"):
        OPENVINO.linearize(pair()[0], tmp_path / "model", predicted_maps(1, W, KEYS // 2))


# -- OpenVINO GenAI -------------------------------------------------------------------------------------------

SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def answers(directory: Path, prompts: list[np.ndarray], new_tokens: int = 8, **scheduler: Any) -> list[list[int]]:
    """Greedy answers of a pipeline that gets all prompts at once."""
    genai = pytest.importorskip("openvino_genai")
    import openvino

    config = genai.SchedulerConfig()
    for name, value in ({"cache_size": 1, "max_num_batched_tokens": 4096} | scheduler).items():
        setattr(config, name, value)
    with kept_signal_stack():
        pipeline = genai.ContinuousBatchingPipeline(str(directory), config, "CPU", SETTINGS)
    given = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
    found = pipeline.generate([openvino.Tensor(ids) for ids in prompts], [given] * len(prompts))
    return [list(one.m_generation_ids[0]) for one in found]


def alone(directory: Path, chunks: list[np.ndarray], new_tokens: int = 8) -> list[int]:
    """The greedy answer to chunks that are appended one by one, in the stateful form."""
    decoder = IrDecoder(directory, exact=True)
    decoder.begin(1)
    found: list[int] = []
    for ids in chunks:
        logits = decoder.step(ids)
    for _ in range(new_tokens):
        found.append(int(logits[0, -1].argmax()))
        logits = decoder.step(np.array([found[-1:]]))
    return found


def test_prompts_at_once_get_the_answers_of_each_alone(pair: Callable[..., tuple[Path, Path]]) -> None:
    _, out = pair()
    prompts = chunks_of((40, 7, 23, 3, 61))
    assert answers(out, prompts) == [alone(out, [ids]) for ids in prompts]


def test_a_prompt_that_the_scheduler_splits_is_its_chunks(pair: Callable[..., tuple[Path, Path]]) -> None:
    """The last W tokens of each chunk continue, so the answer is another than that of the whole prompt."""
    _, out = pair()
    (prompt,) = chunks_of((90,))
    said = answers(out, [prompt], max_num_batched_tokens=32, max_num_seqs=4)[0]
    assert said == alone(out, [prompt[:, k : k + 32] for k in range(0, 90, 32)])
    assert said != alone(out, [prompt])


def test_a_known_prefix_is_the_chunk_before(pair: Callable[..., tuple[Path, Path]]) -> None:
    """With prefix caching, whole blocks of a known prefix are read from the cache."""
    genai = pytest.importorskip("openvino_genai")
    import openvino

    _, out = pair()
    prefix, rest = chunks_of((64, 20))
    config = genai.SchedulerConfig()
    config.cache_size = 1
    config.enable_prefix_caching = True
    with kept_signal_stack():
        pipeline = genai.LLMPipeline(str(out), "CPU", scheduler_config=config, **SETTINGS)
    given = genai.GenerationConfig(max_new_tokens=8, ignore_eos=True, do_sample=False)
    first = list(pipeline.generate(openvino.Tensor(prefix), given).tokens[0])
    both = np.concatenate([prefix, rest], 1)
    second = list(pipeline.generate(openvino.Tensor(both), given).tokens[0])
    assert first == alone(out, [prefix])
    assert second == alone(out, [prefix, rest])
