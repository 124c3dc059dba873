"""Every repair of an exporter is needed: with it switched off, verification of some tiny model fails.

With all of them on, all checks pass: tests/verify/test_tiny_graphs.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from nbl_export.errors import NblError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.ir.files import read_ir
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model, read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.model.architectures import ARCHITECTURES
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import apart
from nbl_export.targets.export import mobius, restore_attention
from nbl_export.targets.onnx import export_genai as genai_patches
from nbl_export.targets.openvino import export as openvino_export
from nbl_export.targets.openvino import trace
from nbl_export.targets.openvino.engine import OPENVINO
from nbl_export.targets.tensorrt import export as static
from nbl_export.targets.tensorrt import static_form
from nbl_export.verify.exporter import row_logits

from ..exports import build_decoder
from ..tiny import LAYERS, random_map
from ..verifying import verify_tiny

pytestmark = [pytest.mark.engine, pytest.mark.job]

Checkpoint = Callable[[str], Path]


def nothing(*_: Any, **__: Any) -> Any:
    """A repair that finds nothing to do."""
    return []


def as_it_was(given: Any) -> Any:
    return given


def uncorrected(_checkpoint: Path) -> Any:
    return contextlib.nullcontext()


def more(*given: Any) -> Any:
    return pytest.param(*given, marks=pytest.mark.fuzz)


def no_windows(_config: Any) -> tuple[None, ...]:
    return (None,) * LAYERS


def failed(results: Sequence[CheckResult]) -> set[str]:
    """Checks that failed."""
    return {r.check for r in results if not r.passed}


@pytest.mark.parametrize(
    ("module", "repair", "instead", "architecture", "source"),
    [
        (restore_attention, "_set_window", nothing, "mistral-window", "genai"),
        (restore_attention, "_set_window", nothing, "phi3-window", "genai"),
        (restore_attention, "_set_window", nothing, "qwen2-window", "mobius"),
        (restore_attention, "_set_scale", nothing, "gemma3", "mobius"),
        (restore_attention, "_restore_root", nothing, "gemma2", "genai"),
        (restore_attention, "_restore_root", nothing, "gemma3", "genai"),
        (restore_attention, "_restore_tables", nothing, "llama-linear", "genai"),
        (restore_attention, "_restore_tables", nothing, "llama-yarn", "genai"),
        (restore_attention, "_restore_tables", nothing, "gemma3", "genai"),
        (restore_attention, "_restore_tables", nothing, "gemma3", "mobius"),
        (restore_attention, "_restore_shared", nothing, "gpt_oss", "mobius"),
        more(genai_patches, "_olmo", as_it_was, "olmo", "genai"),
        more(mobius, "corrected", uncorrected, "helium", "mobius"),
        more(static, "corrected", uncorrected, "helium", "static"),
        (static, "windows_of", no_windows, "mistral-window", "static"),
        (static, "windows_of", no_windows, "qwen2-window", "static"),
        (trace, "windows_of", no_windows, "gemma2", "openvino"),
        more(trace, "windows_of", no_windows, "phi3-window", "openvino"),
    ],
)
def test_a_graph_without_the_repair_is_not_that_of_torch(
    module: ModuleType, repair: str, instead: Any, architecture: str, source: str, checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, repair, instead)
    assert "exporter" in failed(verify_tiny(checkpoint(architecture), source, "fp32", tmp_path, (1,), prompts=False))


@pytest.mark.parametrize(
    ("module", "repair", "instead", "architecture", "source", "said"),
    [
        (restore_attention, "_set_window", nothing, "gemma2", "genai", "sliding_window_cache"),  # a ring cache
        (restore_attention, "_drop_rotary_size", nothing, "phi4-mini", "mobius", "cannot load"),
        (restore_attention, "_forget_window", nothing, "gemma3", "genai", "."),
        (genai_patches, "_smollm3", as_it_was, "smollm3", "genai", "position_ids"),
        (genai_patches, "_gemma3", as_it_was, "gemma3", "genai", "rope_type"),
        (mobius, "_restore_config", nothing, "olmo2", "mobius", "."),
        (openvino_export, "_start_empty", nothing, "llama", "openvino", "."),
    ],
)
def test_a_graph_without_the_repair_does_not_run(
    module: ModuleType, repair: str, instead: Any, architecture: str, source: str, said: str, checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, repair, instead)
    with pytest.raises(Exception, match=said):  # of the exporter, of the runtime, or a refusal
        verify_tiny(checkpoint(architecture), source, "fp32", tmp_path, (1,))


@pytest.mark.parametrize("repaired", [True, False])
def test_folded_sizes_let_the_last_layer_compute_one_token(
    repaired: bool, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without them, nodes behind the last attention read the number of tokens, and the head alone has one token."""
    if not repaired:
        monkeypatch.setattr(trace, "_fold_sizes", nothing)
    openvino_export.build(checkpoint("phi3"), tmp_path / "ir", "fp32")
    OPENVINO.keep_last_token(tmp_path / "ir")
    names = {node.get_friendly_name() for node in read_ir(tmp_path / "ir").get_ops()}
    gathers = {name for name in names if name.startswith("/nbl/last/")}
    assert gathers == ({"/nbl/last/attention", "/nbl/last/residual"} if repaired else {"/nbl/last/head"})


def _opened(checkpoint: Path, out: Path) -> Any:
    static.build(checkpoint, out, "fp32", max_seq_len=96)
    return OnnxDecoder(out, 0, file="decoder.onnx", fp32_activations=True)


@pytest.mark.parametrize("left_out", ["HeadMajorCaches", "ScaledQueries", "DerivedPositions", "ExplicitMasks"])
def test_no_step_to_the_static_form_can_be_left_out(
    left_out: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passes = static_form.form_passes(96, no_windows(None))
    kept = [step for step in passes if type(step).__name__ != left_out]
    assert len(kept) == len(passes) - 1
    monkeypatch.setattr(static, "form_passes", lambda *_: kept)
    with pytest.raises(Exception, match=r"\S"):  # of a later step, or of the engine
        _opened(checkpoint("llama"), tmp_path)


@pytest.mark.parametrize(
    ("field", "wrong", "architecture", "source", "check"),
    [
        ("norm_before", None, "llama", "genai", "torch"),
        ("norm_after", None, "gemma2", "genai", "torch"),
        ("norm_after", None, "olmo2", "mobius", "torch"),
        ("multiplier", None, "granite", "genai", "torch"),
        ("score_scalar", None, "gemma3", "mobius", "exporter"),
        ("embedding_root", False, "gemma3", "genai", "exporter"),
        ("runtime_type", None, "olmo2", "mobius", ""),
    ],
)
def test_an_architectures_record_is_needed(
    field: str, wrong: Any, architecture: str, source: str, check: str, checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """Other fields (head, norms of the MLP, values a layer) reach no graph: tests/model/test_architectures.py."""
    name = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    assert getattr(ARCHITECTURES[name], field) != wrong
    monkeypatch.setitem(ARCHITECTURES, name, dataclasses.replace(ARCHITECTURES[name], **{field: wrong}))
    if check == "torch":  # the graph has the map where torch has it only by a right record
        verify_tiny(checkpoint(architecture), source, "fp32", tmp_path, (1,), prompts=False)
        row, spec = list(range(2, 20)), read_spec(resolve(str(checkpoint(architecture))))
        decoder = OnnxDecoder(tmp_path / "model", spec.head_dim)
        decoder.begin(1)
        model = linearize(load_model(checkpoint(architecture)), {1: random_map(1)})
        assert apart(row_logits(model, row)[-1:], decoder.step(np.asarray([row]))[0]) > 0.01  # the last token's alone
    elif check:
        assert check in failed(verify_tiny(checkpoint(architecture), source, "fp32", tmp_path, (1,), prompts=False))
    else:
        with pytest.raises(NblError):
            verify_tiny(checkpoint(architecture), source, "fp32", tmp_path, (1,))


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_matrices_are_rounded_one_by_one(
    precision: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder holds one matrix in float32 at a time, and writes what it writes with all of them.

    k_quant searches in parts of a matrix. It sorts the nodes of the graph that it is given.
    """
    monkeypatch.setattr(genai_patches, "_VALUES", 1000)
    seen: list[int] = []
    patch = genai_patches._one_by_one

    def counted(theirs: Callable[[Any], Any]) -> Any:
        def rounded(self: Any) -> Any:
            seen.append(len(self.model.graph.initializers))
            return theirs(self)

        return patch(rounded)

    for name, made in (("one by one", counted), ("all at once", as_it_was)):
        monkeypatch.setattr(genai_patches, "_one_by_one", made)
        if made is as_it_was:
            monkeypatch.setattr(genai_patches, "_in_parts", as_it_was)
        build_decoder("genai", checkpoint("llama"), tmp_path / name, precision)
    assert set(seen) == {1}
    assert len(seen) > LAYERS
    ours, theirs = (tmp_path / name for name in ("one by one", "all at once"))
    assert (ours / "model.onnx.data").read_bytes() == (theirs / "model.onnx.data").read_bytes()
    graphs = [onnx.load(str(place / "model.onnx"), load_external_data=False) for place in (ours, theirs)]
    for graph in graphs:
        graph.graph.node.sort(key=lambda node: node.name)
        graph.graph.value_info.sort(key=lambda value: value.name)
    assert graphs[0] == graphs[1]
