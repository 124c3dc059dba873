"""OpenVINO as an engine: the runner, what LLMPipeline makes of the same directory, and what a probe says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import CorruptError, MissingPackageError, NblError
from nbl_export.graph.ir import paged
from nbl_export.graph.ir.files import difference, read_ir
from nbl_export.graph.ir.paged import PagedIr
from nbl_export.graph.ir.signals import kept_signal_stack
from nbl_export.graph.names import IR_FILE
from nbl_export.methods.checkpoint import load
from nbl_export.model import mapped
from nbl_export.targets import load_engine
from nbl_export.targets.openvino import engine as openvino_engine
from nbl_export.targets.openvino.check import check_paged
from nbl_export.targets.openvino.engine import OPENVINO
from nbl_export.targets.openvino.export import build
from nbl_export.targets.openvino.runner import OpenVinoRunner

from ..tiny import VOCAB, made_by, narrowed, random_map, record_of

pytestmark = [pytest.mark.engine, pytest.mark.process]

PROMPT = np.random.default_rng(5).integers(2, VOCAB, 20).tolist()


@pytest.fixture(scope="module")
def directories(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama in float32 with a pruned tail, and its NBL version with the middle layer replaced."""
    import shutil

    out = tmp_path_factory.mktemp("openvino")
    shutil.copytree(exported("llama", "openvino", "fp32"), out / "original")
    OPENVINO.keep_last_token(out / "original")
    OPENVINO.linearize(out / "original", out / "model", {1: random_map(1)})
    return {"original": out / "original", "nbl": out / "model"}


@pytest.mark.parametrize("variant", ["original", "nbl"])
def test_the_runner_says_what_torch_says(
    directories: dict[str, Path], checkpoint: Callable[[str], Path], variant: str
) -> None:
    import torch

    from nbl_export.methods.applied import linearize
    from nbl_export.methods.checkpoint import load

    model = load.load_model(checkpoint("llama"))
    if variant == "nbl":
        model = linearize(model, {1: random_map(1)}, "residual")
    ids = torch.tensor([PROMPT])
    for _ in range(12):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    with load_engine("openvino").open_runner(directories[variant], 1) as runner:
        assert runner.greedy(PROMPT, 12) == ids[0, len(PROMPT) :].tolist()


def test_rewinding_and_appending_gives_equal_logits(directories: dict[str, Path]) -> None:
    with OpenVinoRunner(directories["nbl"], 1) as runner:
        runner.begin(40)
        runner.append(PROMPT)
        first = runner.last_logits()
        runner.append([7])
        second = runner.last_logits()
        runner.append([9])
        runner.rewind(len(PROMPT))
        runner.append([7])
        assert np.array_equal(runner.last_logits(), second)
        runner.rewind(0)
        runner.append(PROMPT)
        assert np.array_equal(runner.last_logits(), first)
        with pytest.raises(ValueError, match="cannot rewind 20 tokens to 21"):
            runner.rewind(21)
        with pytest.raises(NblError, match=r"41 tokens do not fit into .*nbl|41 tokens do not fit"):
            runner.append([5] * 21)


@pytest.mark.skipif(sys.platform != "linux", reason="only there does OpenVINO replace the stack of signals")
def test_ctrl_c_is_handled_after_models_were_freed(directories: dict[str, Path]) -> None:
    """In a process of its own, which a signal on a freed stack would end."""
    code = (
        "import signal, sys, pathlib\n"
        "from nbl_export.targets.openvino.runner import OpenVinoRunner\n"
        "first, second = (OpenVinoRunner(pathlib.Path(sys.argv[1]), 1) for _ in range(2))\n"
        "print(len(second.greedy([1, 2, 3], 2)))\n"
        "del first\n"
        "del second\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    print('handled')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, directories["nbl"]], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "2\nhandled\n"), done.stderr


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
@pytest.mark.parametrize("variant", ["original", "nbl"])
def test_llm_pipeline_says_the_same(directories: dict[str, Path], variant: str, backend: str) -> None:
    """OpenVINO GenAI loads the directory by itself, on both of its back ends."""
    genai = pytest.importorskip("openvino_genai")
    with OpenVinoRunner(directories[variant], 1) as runner:
        said = runner.greedy(PROMPT, 10)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    with kept_signal_stack():
        pipeline = genai.LLMPipeline(str(directories[variant]), "CPU", ATTENTION_BACKEND=backend, **settings)
    given = genai.GenerationConfig(max_new_tokens=10, ignore_eos=True, do_sample=False)
    import openvino

    ids = openvino.Tensor(np.array([PROMPT], np.int64))
    assert list(pipeline.generate(ids, given).tokens[0]) == said


@pytest.mark.parametrize("way", ["draft", "lookup"])
def test_proposed_tokens_change_no_answer(
    way: str, directories: dict[str, Path], exported: Callable[..., Path]
) -> None:
    """The program of docs/drafts.md: the original with the NBL model as its draft, and with prompt lookup."""
    genai = pytest.importorskip("openvino_genai")
    import openvino

    ids, original = PROMPT * 3, exported("llama", "openvino", "fp32")
    with OpenVinoRunner(original, 1) as runner:
        said = runner.greedy(ids, 20)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    more: dict[str, Any] = {"prompt_lookup": True}
    given = genai.GenerationConfig(max_new_tokens=20, ignore_eos=True, do_sample=False, num_assistant_tokens=3)
    with kept_signal_stack():
        if way == "draft":
            more = {"draft_model": genai.draft_model(str(directories["nbl"]), "CPU", **settings)}
        else:
            given.max_ngram_size = 3
        pipeline = genai.LLMPipeline(str(original), "CPU", **settings, **more)
    found = pipeline.generate(openvino.Tensor(np.array([ids], np.int64)), given)
    assert list(found.tokens[0]) == said
    assert way == "lookup" or found.extended_perf_metrics.get_num_draft_tokens() > 0


def test_the_tokenizer_as_ir_gives_the_same_ids(directories: dict[str, Path]) -> None:
    genai = pytest.importorskip("openvino_genai")
    text = "The with statement is used to wrap the execution of a block: naïve café."
    with OpenVinoRunner(directories["nbl"], 1) as runner:
        ours = runner.encode(text, chat=False)
    with kept_signal_stack():
        tokenizer = genai.Tokenizer(str(directories["nbl"]))
    assert tokenizer.encode(text).input_ids.data[0].tolist() == ours
    assert tokenizer.decode(ours) == text


@pytest.mark.parametrize(("architecture", "is_paged"), [("llama", True), ("gemma3", False), ("mistral-window", False)])
def test_a_graph_with_windows_runs_in_the_stateful_form(
    architecture: str, is_paged: bool, exported: Callable[..., Path]
) -> None:
    with OpenVinoRunner(exported(architecture, "openvino", "fp32"), 1) as runner:
        assert isinstance(runner._session, PagedIr) == is_paged


@pytest.mark.parametrize(("architecture", "passed"), [("llama", True), ("mistral-window", False)])
def test_another_answer_of_the_paged_form_is_found(
    architecture: str, passed: bool, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged, "has_window", lambda _directory: False)
    (result,) = check_paged("original", exported(architecture, "openvino", "fp32"), IR_FILE)
    assert result.passed == passed


def test_a_directory_without_positions_is_told(directories: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(directories["nbl"], tmp_path / "model"))
    (broken / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CorruptError, match="does not state max_position_embeddings"):
        OpenVinoRunner(broken, 1)


def library(version: str, devices: list[str], narrow: bool, answer: list[float]) -> Any:
    core = SimpleNamespace(available_devices=devices, get_property=lambda *_: ["FP32", "BF16"] if narrow else ["FP32"])
    return SimpleNamespace(__version__=version, Core=lambda: core), answer


@pytest.mark.parametrize(
    ("version", "devices", "narrow", "answer", "said"),
    [
        ("2025.4.1-1", ["CPU"], True, [17.0, 30.0], "openvino 2025.4.1 is too old"),
        ("2026.4.1-1", ["GPU"], True, [17.0, 30.0], "has no CPU plugin here"),
        ("2026.4.1-1", ["CPU"], True, [17.0, 31.0], "computes"),
        ("2026.4.1-1", ["CPU"], False, [17.0, 30.0], "computes in float32, because this processor has no bfloat16"),
        ("2026.4.1-1", ["CPU"], True, [17.0, 30.0], "CPU plugin, computes in bfloat16"),
    ],
)
def test_a_probe_says_what_is_found(
    monkeypatch: pytest.MonkeyPatch, version: str, devices: list[str], narrow: bool, answer: list[float], said: str
) -> None:
    found, result = library(version, devices, narrow, answer)
    monkeypatch.setattr(openvino_engine, "load_openvino", lambda: found)
    monkeypatch.setattr(openvino_engine, "_known_answer", lambda *_: result)
    probed = openvino_engine.OPENVINO.probe()
    assert said in probed.reason
    assert probed.available == (said.startswith(("computes in", "CPU plugin")))


def test_the_real_library_computes_the_known_answer() -> None:
    assert load_engine("openvino").probe().available


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, directories: dict[str, Path]) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "openvino" in openvino_engine.OPENVINO.probe().reason
    with pytest.raises(MissingPackageError, match=r"pip install '\.\[openvino\]'"):
        OpenVinoRunner(directories["nbl"], 1)


def test_a_batch_behind_a_sequence_has_numbers(exported: Callable[..., Path]) -> None:
    """With keys and values of 8 bits, one request that ran both gives NaN (OpenVINO 2026.4)."""
    from nbl_export.graph.ir.session import IrDecoder
    from nbl_export.verify.ladder import run_rows

    rng = np.random.default_rng(0)
    rows = [rng.integers(2, VOCAB, n).tolist() for n in (80, 53)]
    decoder = IrDecoder(exported("llama", "openvino", "int8"))
    run_rows(decoder, rows[:1])
    found = run_rows(decoder, rows)
    assert [logits.shape for logits in found] == [(80, VOCAB), (53, VOCAB)]
    assert all(np.isfinite(logits).all() for logits in found)


def test_a_token_beyond_the_vocabulary_is_told(directories: dict[str, Path]) -> None:
    with OpenVinoRunner(directories["nbl"], 1) as runner:
        runner.begin(10)
        with pytest.raises(NblError, match=f"token {VOCAB} is beyond the {VOCAB} of .*tokenizer is of another model"):
            runner.append([3, VOCAB])


# -- weights that stay in a checkpoint's files ---------------------------------------------------------------

FEW = [("gemma3", "bfloat16", "int8"), ("qwen2", "float16", "int4"), ("llama", "float32", "int4")]
MORE = [(name, "bfloat16", "int8") for name in made_by("openvino") if record_of(name).experts is None]


@pytest.mark.parametrize(
    ("name", "dtype", "precision"),
    [*FEW, *(pytest.param(*case, marks=pytest.mark.fuzz) for case in MORE if case not in FEW)],
)
def test_the_ir_is_that_of_the_whole_model(
    name: str, dtype: str, precision: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    given = narrowed(checkpoint(name), tmp_path / "checkpoint", dtype)
    for from_files in (True, False):
        build(given, tmp_path / str(from_files), precision, from_files)
    assert difference(read_ir(tmp_path / "True"), read_ir(tmp_path / "False")) == ""


def test_weights_stay_in_their_files(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model that does not fit into memory, which is refused if it has to."""
    given = narrowed(checkpoint("llama"), tmp_path / "narrow", "bfloat16")
    mixed = narrowed(checkpoint("llama"), tmp_path / "mixed", "bfloat16", but="norm.weight")
    monkeypatch.setattr(mapped, "available_bytes", lambda: 1000)
    parameters = list(load.load_mapped(given).parameters())
    if sys.platform == "linux":
        assert set(map(_file_of, parameters)) == {given / "model.safetensors"}
    for refused in (lambda: load.load_mapped(mixed), lambda: load.load_model(given)):
        with pytest.raises(NblError, match="needs the whole torch model in memory"):
            refused()


def _file_of(parameter: Any) -> Path | None:
    """The file that a parameter's memory is mapped from."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        place, *_, file = line.split(maxsplit=5)
        first, end = (int(edge, 16) for edge in place.split("-"))
        if first <= parameter.data_ptr() < end:
            return Path(file)
    return None
