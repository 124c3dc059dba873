"""Graphs of every architecture from every source that makes it: the original, the rewrite, and what is mended."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import STATIC_GRAPH_FILE
from nbl_export.graph.passes.tail import keep_last_token
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model, read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.rewrite import rewrite
from nbl_export.targets.checks import ExpectedGraph
from nbl_export.targets.onnx_files import check_files
from nbl_export.verify import exporter
from nbl_export.verify.ladder import DECODE_STEPS, Probe, Reference, run_rows
from tests.exports import build_decoder

from ..command import TINY, assert_refused, configured, nbl
from ..jobs import until
from ..tiny import LAYERS, VARIANTS, VOCAB, cases, made_by, random_map, record_of, save_checkpoint

pytestmark = pytest.mark.job

Checkpoint = Callable[[str], Path]
Exported = Callable[..., Path]
Maps = Callable[..., dict[int, Linear]]
TOLERANCE = 2e-4  # of logits, float32
GRAPHS = [(a, s) for s in ("genai", "mobius") for a in made_by(s)]
# phi4-mini on mobius is one that ONNX Runtime would not load; windows, tables and scales are what else gets lost
MENDED = [(a, s) for a in VARIANTS if a not in ("mistral", "phi3-long") for s in ("genai", "mobius")]
MENDED.remove(("llama-bias", "mobius"))  # refused, see below


def rows() -> list[list[int]]:
    """Two rows, the longer one beyond the tiny windows."""
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, n + DECODE_STEPS).tolist() for n in (29, 11)]


@functools.cache
def torch_logits(checkpoint: Path, replaced: tuple[int, ...] = (), tap: str = "residual") -> list[np.ndarray]:
    """Of `random_maps`."""
    model = linearize(load_model(checkpoint), {layer: random_map(layer) for layer in replaced}, tap)
    with torch.inference_mode():
        return [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows()]


@functools.cache
def head_dim(checkpoint: Path) -> int:
    return read_spec(resolve(str(checkpoint))).head_dim


def open_graph(directory: Path, checkpoint: Path) -> OnnxDecoder:
    return OnnxDecoder(directory, head_dim(checkpoint))


def worst(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize(("architecture", "source"), cases([*GRAPHS, *MENDED]))
def test_the_original_graph_agrees_with_torch(
    architecture: str, source: str, checkpoint: Checkpoint, exported: Exported
) -> None:
    found = run_rows(open_graph(exported(architecture, source), checkpoint(architecture)), rows())
    assert worst(found, torch_logits(checkpoint(architecture))) < TOLERANCE


@pytest.mark.parametrize(("architecture", "source"), cases(GRAPHS))
def test_the_rewritten_graph_agrees_with_torch(
    architecture: str, source: str, checkpoint: Checkpoint, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """Norms on both sides of attention and multipliers go with it; windows and rotation of the other layers stay."""
    for replaced in ((1,), (0, 2)):
        maps, out = random_maps(*replaced), tmp_path / "".join(map(str, replaced))
        rewrite(exported(architecture, source), out, maps)
        decoder = open_graph(out, checkpoint(architecture))
        assert worst(run_rows(decoder, rows()), torch_logits(checkpoint(architecture), replaced)) < TOLERANCE, replaced
        assert decoder.contract.cache_layers == tuple(i for i in range(LAYERS) if i not in replaced)
        kept = ir.load(out / "model.onnx").graph
        attention = sum("Attention" in node.op_type for node in kept)
        assert attention == LAYERS - len(replaced) or not attention  # GPT-OSS of mobius: attention is many nodes


@pytest.mark.parametrize(("architecture", "source"), cases(g for g in GRAPHS if "normed" in record_of(g[0]).taps))
def test_the_normed_tap(
    architecture: str, source: str, checkpoint: Checkpoint, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    maps = random_maps(1, 2)
    rewrite(exported(architecture, source), tmp_path / "nbl", maps, "normed")
    found = run_rows(open_graph(tmp_path / "nbl", checkpoint(architecture)), rows())
    assert worst(found, torch_logits(checkpoint(architecture), (1, 2), "normed")) < TOLERANCE


@pytest.mark.parametrize(("architecture", "source"), cases(GRAPHS))
def test_the_pruned_tail(
    architecture: str, source: str, checkpoint: Checkpoint, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """Logits of the last token, from graphs with norms and caps behind the last attention that others do not have."""
    for replaced in ((), (1, 2)):
        maps, out = random_maps(*replaced), tmp_path / f"nbl{len(replaced)}"
        rewrite(exported(architecture, source), out, maps)
        keep_last_token(out)
        decoder = open_graph(out, checkpoint(architecture))
        decoder.begin(1)
        last = decoder.step(np.array([rows()[0]]))
        expected = torch_logits(checkpoint(architecture), replaced)[0][-1]
        assert last.shape == (1, 1, VOCAB) and np.abs(last[0, 0] - expected).max() < TOLERANCE, replaced


@pytest.mark.parametrize("architecture", cases([*made_by("static"), "qwen2-window", "phi3-window", "phi4-mini"]))
def test_the_static_form(architecture: str, checkpoint: Checkpoint, random_maps: Maps, tmp_path: Path) -> None:
    build_decoder("static", checkpoint(architecture), tmp_path / "original", "fp32", cache_length=96)
    rewrite(tmp_path / "original", tmp_path / "nbl", random_maps(0, 2))
    for name, chosen in (("original", ()), ("nbl", (0, 2))):
        found = run_rows(OnnxDecoder(tmp_path / name, 0, file=STATIC_GRAPH_FILE, fp32_activations=True), rows())
        assert worst(found, torch_logits(checkpoint(architecture), chosen)) < TOLERANCE


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "phi3-window", "qwen2-window"])
def test_a_lost_window_fails_check_exporter(
    architecture: str, checkpoint: Checkpoint, exported: Exported, tmp_path: Path
) -> None:
    model = ir.load(exported(architecture) / "model.onnx")
    attention = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert any(n.attributes.get_int("local_window_size", -1) == 16 for n in attention)
    for node in attention:
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", -1)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    model, probe = load_model(checkpoint(architecture)), Probe(tuple(map(tuple, rows())), (), 0)
    for directory, right in ((exported(architecture), True), (tmp_path, False)):
        decoder = open_graph(directory, checkpoint(architecture))
        original = Reference(tuple(run_rows(decoder, [row])[0] for row in rows()), None)
        assert all(r.passed for r in exporter.check_logits(model, "fp32", probe, original)) == right


def test_no_ring_caches_are_promised_to_the_runtime(exported: Exported) -> None:
    for architecture in ("gemma3", "phi3-window", "qwen2-window"):
        told = json.loads((exported(architecture) / "genai_config.json").read_text())["model"]["decoder"]
        assert "sliding_window" not in told
        graph = ir.load(exported(architecture) / "model.onnx").graph
        assert not any("sliding_window_cache" in node.attributes for node in graph)


@pytest.mark.parametrize(
    ("size", "source", "precision"),
    [
        (80, "genai", "fp32"), (640, "genai", "fp32"), (80, "genai", "int8"), (640, "genai", "int4"),
        (80, "mobius", "fp32"), (640, "mobius", "fp32"), (80, "mobius", "fp16"),
    ],
)  # fmt: skip
def test_the_root_of_the_hidden_size_is_not_rounded(size: int, source: str, precision: str, tmp_path: Path) -> None:
    """sqrt(80) = 8.944: the GenAI builder writes 8.94, mobius the nearest in half precision."""
    checkpoint = save_checkpoint("gemma3", tmp_path / "checkpoint", hidden_size=size)
    build_decoder(source, checkpoint, tmp_path / "original", precision)
    graph = ir.load(tmp_path / "original" / "model.onnx").graph
    if precision != "fp16":  # in half precision, the exporter's number is the nearest one
        stored = graph.initializers["nbl.embedding_root"]
        assert stored.const_value is not None and stored.uses()
        assert stored.const_value.numpy() == np.float32(math.sqrt(size)) != np.float32(round(math.sqrt(size), 2))
    decoder, spec = open_graph(tmp_path / "original", checkpoint), read_spec(resolve(str(checkpoint)))
    wanted = ExpectedGraph("original", spec, precision, "all", tuple(range(LAYERS)), {})
    checked = check_files(tmp_path / "original", decoder.contract, wanted)
    assert not [r for r in checked if not r.passed]
    if precision == "fp32" and size == 80:
        assert worst(run_rows(decoder, rows()), torch_logits(checkpoint)) < 1e-5


@pytest.mark.parametrize(("architecture", "positions"), [("ministral3", 64), ("llama", 512)])
def test_the_context_ends_where_the_graph_would_be_wrong(architecture: str, positions: int, exported: Exported) -> None:
    """Queries of Ministral 3 grow behind the original positions, and mobius leaves the factor out."""
    told = json.loads((exported(architecture, "mobius") / "genai_config.json").read_text())
    assert told["model"]["context_length"] == told["search"]["max_length"] == positions


@pytest.mark.parametrize("source", ["mobius", "static"])
def test_biases_that_a_source_loses_are_refused(source: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(NblError, match=r"biases in its MLPs \(mlp_bias\), which mobius .* leaves out; use"):
        build_decoder(source, checkpoint("llama-bias"), tmp_path / "original", "fp32", cache_length=96)


HYBRID = r"is of a hybrid model \({}\), which is not supported: only about a quarter of the layers"


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True, which is not supported"),
        ("gemma3", {"model_type": "gemma3", "text_config": {}}, "its language model, saved by itself, may be"),
        ("llama", {"model_type": "mamba"}, "which is not supported; 36 are, which README.md lists"),
        ("llama", {"model_type": "gemma4_text"}, "not supported: its layers have heads of two sizes"),
        ("llama", {"model_type": "cohere2"}, "not supported: its MLP runs beside its attention"),
        ("llama", {"model_type": "falcon_h1"}, "not supported: attention and a Mamba block run side by side"),
        ("llama", {"model_type": "lfm2"}, HYBRID.format("lfm2")),
        ("llama", {"model_type": "nbl-qwen3_next", "nbl_replaced_layers": [0], "nbl_tap": "normed"}, "a hybrid model"),
        ("llama", {"model_type": "new", "layer_types": ["conv", "full_attention", "conv"]}, HYBRID.format("new")),
        ("llama", {"model_type": "seen", "text_config": {"layer_types": ["linear_attention"]}}, HYBRID.format("seen")),
        ("granitemoehybrid", {"layer_types": ["attention", "mamba", "attention"]}, HYBRID.format("granitemoehybrid")),
        ("granitemoehybrid", {"layer_types": None}, HYBRID.format("granitemoehybrid")),  # what transformers then makes
        ("granitemoehybrid", {"num_local_experts": 4}, "not supported: it has experts, and the GenAI builder"),
        ("granitemoehybrid", {"position_embedding_type": "nope"}, "not supported: its attention has no rotation"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual True, which is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\], which is not supported"),
        ("phimoe", {"num_experts_per_tok": 1}, "num_experts_per_tok 1, which is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "depend on the length of"),
    ],
)
def test_what_is_not_understood_is_refused_at_once(
    architecture: str, changes: dict[str, object], said: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    for file in checkpoint(architecture).iterdir():
        shutil.copyfile(file, tmp_path / "model" / file.name)
    config = json.loads((checkpoint(architecture) / "config.json").read_text())
    (tmp_path / "model" / "config.json").unlink()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(NblError, match=said):
        resolve(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("gemma3", ("--layers", "2")),
        ("granite", ("--layers", "1", *configured(tap="normed"))),
        ("qwen3", ("--layers", "2", "--precision", "int4")),
        ("olmo2", ("--layers", "2")),  # by mobius
        ("gemma2", ("--layers", "2", "--precision", "int8")),
        ("qwen3_moe", ()),
    ],
)
def test_the_main_job(
    architecture: str, options: tuple[str, ...], checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    """From the checkpoint to a verified decoder that GenAI runs, maps fitted on text."""
    given = ("--model", checkpoint(architecture), "--calibration", text, *TINY, *options)
    with until("verify"):
        done = nbl(*given, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    verify = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert verify["passed"] and {r["check"] for r in verify["checks"]} >= {
        "structure",
        "original",
        "nbl",
        "text",
        "last_token",
    }


@pytest.mark.parametrize(
    ("architecture", "options", "said"),
    [
        ("olmo2", configured(decoder_source="genai"), "decoder_source genai is not possible for olmo2: the GenAI"),
        ("gemma2", configured(decoder_source="mobius"), "key decoder_source mobius is not possible for gemma2"),
    ],
)
def test_what_an_architecture_cannot_is_refused_before_anything_is_computed(
    architecture: str, options: tuple[str, ...], said: str, checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    given = ("--model", checkpoint(architecture), "--calibration", text, *TINY, *options)
    assert_refused(nbl(*given, "--output", tmp_path / "run"), 1, said)
    assert not (tmp_path / "run").exists()
