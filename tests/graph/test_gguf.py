"""GGUF files: what is kept, exchanged and refused. No engine runs here (tests/targets/test_llama_cpp.py)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_export.errors import CorruptError, NblError
from nbl_export.graph.gguf.content import Content, Key, Tensor, read_content, recoded, tensor_of, write_content
from nbl_export.mixers.linear import Linear
from nbl_export.targets.gguf import check
from nbl_export.targets.gguf import write as from_checkpoint
from nbl_export.targets.gguf.engine import facts_of, read_gguf_facts
from nbl_export.targets.gguf.linearize import check_base, exchanged, linearized

from ..tiny import HEAD_DIM, HIDDEN, LAYERS, VOCAB, random_map, save_gguf

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def linear(*layers: int) -> dict[int, Linear]:
    return {i: Linear(random_map(i).weight, np.zeros(HIDDEN, np.float32)) for i in layers}


def in_kind(content: Content, kind: str) -> Content:
    """The content with all matrices in a type."""
    return Content(content.architecture, content.keys, tuple(
        recoded(t, Kind[kind]) if len(t.shape) > 1 else t for t in content.tensors))  # fmt: skip


def test_the_content_is_written_as_it_was_read(base: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        first = in_kind(read_content(base), kind)
        write_content(first, tmp_path / f"{kind}.gguf")
        second = read_content(tmp_path / f"{kind}.gguf")
        assert (second.architecture, dict(second.keys)) == (first.architecture, dict(first.keys))
        for ours, theirs in zip(second.tensors, first.tensors, strict=True):
            assert (ours.name, ours.shape, ours.kind) == (theirs.name, theirs.shape, theirs.kind)
            assert ours.stored_bytes == ours.read().nbytes
            np.testing.assert_array_equal(ours.read(), theirs.read())


@pytest.mark.parametrize("layers", [(), (0,), (2,), (0, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_replaced_layers_have_a_matrix_and_no_cache_and_the_rest_keeps_its_codes(
    base: Path, tmp_path: Path, layers: tuple[int, ...], kind: str
) -> None:
    content, maps = in_kind(read_content(base), kind), linear(*layers)
    write_content(linearized(content, maps, "keep", {"nbl.version": Key.text("1")}), tmp_path / "out.gguf")
    assert [r for r in check.check_file(tmp_path / "out.gguf", content, maps, "keep") if not r.passed] == []
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "deci" and keys["nbl.version"] == "1"
    assert keys["deci.attention.head_count"] == [4] * LAYERS
    assert keys["deci.attention.head_count_kv"] == [0 if i in layers else 2 for i in range(LAYERS)]
    assert not [name for name in keys if name.startswith("llama.")]
    assert keys["tokenizer.ggml.merges"] == gguf.GGUFReader(base).fields["tokenizer.ggml.merges"].contents()
    placed = {t.name: t for t in reader.tensors}
    for i in layers:
        assert f"blk.{i}.attn_q.weight" not in placed
        assert placed[f"blk.{i}.attn_output.weight"].tensor_type == Kind[kind]  # of the matrix in its place
        found = gguf.quants.dequantize(placed[f"blk.{i}.attn_output.weight"].data, Kind[kind])
        assert np.abs(found - maps[i].weight).max() < 0.2 * np.abs(maps[i].weight).max()
    facts = read_gguf_facts(tmp_path / "out.gguf")
    assert facts.cache_bytes_per_token == (LAYERS - len(layers)) * 2 * 2 * HEAD_DIM * 2
    assert (facts.vocab_size, facts.cache_layers, facts.context_length) == (VOCAB, LAYERS - len(layers), 512)


def test_a_map_in_the_place_of_k_quants_gets_8_bits(base: Path) -> None:
    content = read_content(base)
    quants = [Tensor(t.name, t.shape, Kind.Q4_K, t.read) if "attn_output" in t.name else t for t in content.tensors]
    found = linearized(Content("llama", content.keys, tuple(quants)), linear(1), "keep", {}).by_name
    assert found["blk.1.attn_output.weight"].kind == Kind.Q8_0
    assert found["blk.0.attn_output.weight"].kind == Kind.Q4_K


@pytest.mark.parametrize(("kind", "stored"), [("f16", Kind.F16), ("q8_0", Kind.Q8_0), ("q4_0", Kind.Q4_0)])
def test_a_type_is_the_type_of_all_matrices(base: Path, tmp_path: Path, kind: str, stored: Kind) -> None:
    content, maps = read_content(base), linear(1)
    write_content(linearized(content, maps, kind, {}), tmp_path / "out.gguf")
    assert [r for r in check.check_file(tmp_path / "out.gguf", content, maps, kind) if not r.passed] == []
    found = read_content(tmp_path / "out.gguf")
    assert {t.kind for t in found.tensors if len(t.shape) == 2} == {stored}
    assert {t.kind for t in found.tensors if len(t.shape) == 1} == {Kind.F32}
    assert found.keys["general.file_type"].value == {Kind.F16: 1, Kind.Q8_0: 7, Kind.Q4_0: 2}[stored]


def test_rows_that_are_no_whole_blocks_become_float16(base: Path) -> None:
    content = read_content(base)
    narrow = [tensor_of(t.name, t.values()[:, :40], t.kind) if "ffn_gate" in t.name else t for t in content.tensors]
    found = linearized(Content("llama", content.keys, tuple(narrow)), {}, "q8_0", {}).by_name
    assert found["blk.0.ffn_gate.weight"].kind == Kind.F16 and found["blk.0.ffn_up.weight"].kind == Kind.Q8_0


def test_halves_become_neighbours_in_a_file_of_qwen2(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    content = in_kind(from_checkpoint.content_of(checkpoint("qwen2")), "Q8_0")
    write_content(linearized(content, linear(1), "keep", {}), tmp_path / "out.gguf")
    assert [r for r in check.check_file(tmp_path / "out.gguf", content, linear(1), "keep") if not r.passed] == []
    before, after = content.by_name, read_content(tmp_path / "out.gguf").by_name
    assert "blk.1.attn_q.bias" not in after
    queries = HIDDEN // HEAD_DIM
    for name, heads in (("attn_q.weight", queries), ("attn_q.bias", queries), ("attn_k.weight", 2), ("attn_k.bias", 2)):
        moved = exchanged(before[f"blk.0.{name}"].values(), heads)
        np.testing.assert_array_equal(after[f"blk.0.{name}"].values(), moved)
        assert (moved != before[f"blk.0.{name}"].values()).any()
    named = {n.replace("qwen2.", "llama."): k for n, k in content.keys.items()}
    unmoved = Content("llama", named, content.tensors)  # as if its rows were neighbours already
    found = check.check_file(tmp_path / "out.gguf", unmoved, linear(1), "keep")
    assert [r.metric for r in found if not r.passed] == ["kept tensors byte for byte"]


@settings(max_examples=20, deadline=None)
@given(heads=st.integers(1, 6), half=st.integers(1, 8), inputs=st.integers(1, 5))
def test_exchanged_rows_pair_neighbours(heads: int, half: int, inputs: int) -> None:
    """Rotating neighbours after the exchange is rotating halves before it."""
    rows = np.random.default_rng(0).standard_normal((heads * 2 * half, inputs))
    found = exchanged(rows, heads).reshape(heads, half, 2, inputs)
    first, second = rows.reshape(heads, 2, half, inputs).swapaxes(0, 1)
    np.testing.assert_array_equal(found[:, :, 0], first)
    np.testing.assert_array_equal(found[:, :, 1], second)


def test_planted_faults_are_found(base: Path, tmp_path: Path) -> None:
    content, maps = read_content(base), linear(0, 2)
    written = linearized(content, maps, "keep", {})

    def failed(changed: Content) -> list[str]:
        write_content(changed, tmp_path / "out.gguf")
        return [r.metric for r in check.check_file(tmp_path / "out.gguf", content, maps, "keep") if not r.passed]

    def with_tensor(name: str, values: np.ndarray) -> Content:
        changed = [tensor_of(name, values, t.kind) if t.name == name else t for t in written.tensors]
        return Content(written.architecture, written.keys, tuple(changed))

    assert failed(written) == []
    other = written.by_name["blk.0.attn_output.weight"].values()
    assert failed(with_tensor("blk.2.attn_output.weight", other)) == ["maps in the file"]
    norm = written.by_name["blk.1.attn_norm.weight"].values().copy()
    norm[3] = 2
    assert failed(with_tensor("blk.1.attn_norm.weight", norm)) == ["kept tensors byte for byte"]
    lost = tuple(t for t in written.tensors if t.name != "blk.1.ffn_up.weight")
    assert failed(Content("deci", written.keys, lost)) == ["tensors", "kept tensors byte for byte"]
    cached = {**written.keys, "deci.attention.head_count_kv": Key.numbers([2] * LAYERS)}
    assert failed(Content(written.architecture, cached, written.tensors)) == ["layers with a cache"]
    named = {n.replace("deci.", "other."): k for n, k in written.keys.items()}
    assert failed(Content("other", named, written.tensors)) == ["architecture"]


def test_refused(base: Path, tmp_path: Path) -> None:
    content = read_content(base)
    with pytest.raises(NblError, match="layer 1's map has a bias"):
        linearized(content, {1: random_map(1)}, "keep", {})
    with pytest.raises(NblError, match="has architecture 'qwen3'"):
        check_base(Content("qwen3", content.keys, content.tensors), base)
    norms = (*content.tensors, tensor_of("blk.0.attn_q_norm.weight", np.ones(HEAD_DIM, np.float32), Kind.F32))
    with pytest.raises(NblError, match=r"has blk\.0\.attn_q_norm\.weight"):
        check_base(Content("llama", content.keys, norms), base)
    windowed = {**content.keys, "llama.attention.sliding_window": Key.number(64)}
    with pytest.raises(NblError, match="sliding window"):
        check_base(Content("llama", windowed, content.tensors), base)
    parts = {**content.keys, "split.count": Key.number(3)}
    write_content(Content("llama", parts, content.tensors), tmp_path / "part.gguf")
    with pytest.raises(NblError, match="one of 3 parts"):
        read_content(tmp_path / "part.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(base.read_bytes()[: base.stat().st_size // 2])
    with pytest.raises(CorruptError, match="cannot be read as GGUF"):
        read_content(cut)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_checkpoint_gives_the_file_that_transformers_reads_as_the_same_model(
    architecture: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """transformers' own reader of GGUF undoes names, permutation and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    content = from_checkpoint.content_of(checkpoint(architecture))
    write_content(content, tmp_path / "whole.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="whole.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(checkpoint(architecture), dtype=torch.float32)
    ids = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((theirs(ids).logits - ours(ids).logits).abs().max()) < 1e-5
    tokenizers = [AutoTokenizer.from_pretrained(checkpoint(architecture)),
                  AutoTokenizer.from_pretrained(tmp_path, gguf_file="whole.gguf")]  # fmt: skip
    said = [t("The three primary colours: red, green\nand blue.")["input_ids"] for t in tokenizers]
    assert said[0] == said[1]
    assert facts_of(content).parameters == sum(p.numel() for p in ours.parameters())


@pytest.mark.parametrize(
    ("architecture", "part"),
    [("qwen3", "norms of queries and keys"), ("phi3", "fused projections"), ("gemma2", "norms behind attention"),
     ("mistral-window", "sliding window"), ("granite", "multipliers")],
)  # fmt: skip
def test_checkpoints_of_another_structure_are_refused(
    architecture: str, part: str, checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(NblError, match=part):
        from_checkpoint.content_of(checkpoint(architecture))


def test_a_tokenizer_whose_splitting_has_no_name_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"ByteLevel"', '"Whitespace"'))
    with pytest.raises(NblError, match="give the file with --base"):
        from_checkpoint.content_of(tmp_path / "other")


def test_llama3_factors_are_those_of_transformers(checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(checkpoint("llama3"))
    plain = 1 / config.rope_parameters["rope_theta"] ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    (factors,) = [t for t in from_checkpoint._tensors(checkpoint("llama3"), _config(checkpoint("llama3")))
                  if t.name == "rope_freqs.weight"]  # fmt: skip
    np.testing.assert_allclose(plain / factors.values(), scaled.numpy(), rtol=1e-5)


def _config(directory: Path) -> dict[str, object]:
    import json

    found: dict[str, object] = json.loads((directory / "config.json").read_text())
    return found
