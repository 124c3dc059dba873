"""References of the original are computed once for a run directory, and again for anything else."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors import safe_open

from nbl_export.verify import ladder, torch_reference
from nbl_export.verify.kept import KeptReferences
from nbl_export.verify.ladder import Probe, Reference

from ..command import TINY, nbl
from ..disk import calls_of_os
from ..jobs import until

PROBE = Probe(((1, 2, 3), (4, 5)), ((1, 2),), 3, (1, 2, 3, 4))
FILE = "references.safetensors"


def made(seed: int = 0) -> Reference:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    return Reference(
        (normal(3, 7), normal(2, 7)), (normal(3), normal(2)), ((1, 2, 3),), ((0.1, 0.2, 1 / 3),), normal(4, 7),
        normal(4),
    )  # fmt: skip


def same(one: Reference, other: Reference) -> bool:
    pairs = [*zip(one.logits, other.logits, strict=True), *zip(one.noise, other.noise, strict=True)]
    pairs += [] if one.long is None else [(one.long, other.long), (one.long_noise, other.long_noise)]  # type: ignore[list-item]
    arrays = all(a.tobytes() == b.tobytes() and a.shape == b.shape for a, b in pairs)
    return arrays and (one.greedy, one.margins, one.noisy) == (other.greedy, other.margins, other.noisy)


def write(path: Path, reference: Reference, graph: Path | None = None) -> None:
    kept = KeptReferences(path, ["a model"])
    kept.put("own", PROBE, reference, graph)
    kept.save()


SHORT = dataclasses.replace(made(), greedy=(), margins=(), long=None, long_noise=None)


@pytest.mark.parametrize("reference", [made(), dataclasses.replace(made(1), noisy=True), SHORT])
def test_what_is_kept_comes_back(reference: Reference, tmp_path: Path) -> None:
    write(tmp_path / FILE, reference)
    found = KeptReferences(tmp_path / FILE, ["a model"]).get("own", PROBE)
    assert found is not None and same(found, reference)


def test_another_model_probe_graph_or_kind_gets_nothing(tmp_path: Path) -> None:
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"a graph")
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    write(tmp_path / FILE, made(), graph)
    kept = KeptReferences(tmp_path / FILE, ["a model"])
    assert kept.get("own", PROBE, graph) is not None
    assert kept.get("own", PROBE) is None and kept.get("codes", PROBE, graph) is None
    assert KeptReferences(tmp_path / FILE, ["another"]).get("own", PROBE, graph) is None
    for other in ({"rows": ((1, 2, 3), (4, 6))}, {"prompts": ((1, 3),)}, {"new_tokens": 4}, {"long": (1, 2, 3, 5)}):
        assert kept.get("own", dataclasses.replace(PROBE, **other), graph) is None
    (tmp_path / "model.onnx.data").write_bytes(b"other weights")
    assert kept.get("own", PROBE, graph) is None


def test_a_damaged_or_foreign_file_gives_nothing(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / FILE
    write(path, made())
    whole = path.read_bytes()
    stated = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    arrays = load_file(path)

    def foreign(metadata: dict[str, str] | None, **changed: np.ndarray) -> None:
        save_file({**arrays, **changed}, path, metadata=metadata)

    def bytes_of(content: bytes) -> Callable[[], object]:
        return lambda: path.write_bytes(content)

    known = json.loads(stated["references"])
    damages: list[Callable[[], object]] = [
        path.unlink,
        bytes_of(b""),
        bytes_of(b"nothing of the kind"),
        bytes_of(whole[:-5]),
        bytes_of(whole[:-1] + bytes([whole[-1] ^ 1])),  # one bit of one figure
        lambda: foreign(None),
        lambda: foreign({"references": "no JSON"}),
        lambda: foreign({"references": "[]"}),
        lambda: foreign({"references": json.dumps({"own": {"key": known["own"]["key"]}})}),
        lambda: foreign(stated, **{"own.long": arrays["own.long"][:2]}),
        lambda: foreign(stated, **{"own.more": arrays["own.long"]}),
    ]
    for damage in damages:
        path.write_bytes(whole)
        damage()
        assert KeptReferences(path, ["a model"]).get("own", PROBE) is None
    path.write_bytes(whole)
    assert KeptReferences(path, ["a model"]).get("own", PROBE) is not None


def test_a_file_that_has_everything_is_not_written_again(tmp_path: Path) -> None:
    write(tmp_path / FILE, made())
    (tmp_path / FILE).chmod(0o600)
    before = (tmp_path / FILE).stat()
    kept = KeptReferences(tmp_path / FILE, ["a model"])
    found = kept.get("own", PROBE)
    assert found is not None
    kept.put("own", PROBE, found)
    kept.save()
    after = (tmp_path / FILE).stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)
    kept.put("own", PROBE, dataclasses.replace(found, noisy=True))  # the noise has been measured since
    kept.save()
    again = KeptReferences(tmp_path / FILE, ["a model"]).get("own", PROBE)
    assert again is not None and again.noisy


def test_references_are_on_the_disk_before_they_replace_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = calls_of_os(monkeypatch)
    write(tmp_path / FILE, made())
    assert done == [("fsync", (tmp_path / FILE).stat().st_size), ("replace", str(tmp_path / FILE))]


@pytest.fixture
def runs_of_torch() -> Iterator[mock.Mock]:
    """Counts references of the torch model, and sees that no noise is measured."""
    made, no_noise = torch_reference.make_reference, AssertionError("noise, and every position is within the limit")
    with (
        mock.patch.object(torch_reference, "make_reference", side_effect=made) as counted,
        mock.patch.object(torch_reference, "with_noise", side_effect=no_noise),
    ):
        yield counted


def checks(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "verify.json").read_text(encoding="utf-8"))["checks"]
    return found


def models_run(counted: mock.Mock, run: Path, *arguments: object) -> int:
    """How many models the main job runs for references."""
    before = counted.call_count
    with until("verify"):
        done = nbl(*TINY, *arguments, "--output", run)
    assert done.status == 0, done.err
    return int(counted.call_count - before)


def test_another_plan_runs_the_original_no_more(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, runs_of_torch: mock.Mock
) -> None:
    """The original is one of two models that run at first, and none for other plans of the same model and text."""
    run = tmp_path / "run"
    verified = functools.partial(models_run, runs_of_torch, run, "--model", checkpoint("llama"), "--calibration", text)
    assert verified("--layers", "1,2") == 2
    first, kept = checks(run), (run / FILE).read_bytes()
    assert verified("--layers", "1") == 1
    assert verified("--layers", "1,2") == 1
    assert checks(run) == first
    assert (run / FILE).read_bytes() == kept
    assert verified("--layers", "1", "--calibration-tokens", "2048") == 2


@pytest.mark.fuzz
def test_another_plan_runs_the_matrices_of_an_int8_graph_no_more(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, runs_of_torch: mock.Mock
) -> None:
    run = tmp_path / "run"
    verified = functools.partial(models_run, runs_of_torch, run, "--model", checkpoint("llama"), "--calibration", text)
    assert verified("--layers", "1", "--precision", "int8") == 4  # own matrices, then the graph's
    assert verified("--layers", "2", "--precision", "int8") == 2
    assert verified("--layers", "2", "--precision", "int8", "--calibration-tokens", "2048") == 4


@pytest.mark.fuzz
def test_a_model_with_one_other_weight_runs(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, runs_of_torch: mock.Mock
) -> None:
    """Its tokens and sizes are those of the model whose references lie in the run directory."""
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(checkpoint("llama"), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})

    def run(model: Path, name: str, layers: str) -> int:
        before = runs_of_torch.call_count
        out = tmp_path / "runs" / name
        done = nbl("--model", model, "--calibration", text, *TINY, "--layers", layers, "--output", out)
        assert done.status == 0, done.err
        return int(runs_of_torch.call_count - before)

    assert run(checkpoint("llama"), "first", "1") == run(other, "second", "1") == 2
    shutil.copyfile(tmp_path / "runs" / "first" / FILE, tmp_path / "runs" / "second" / FILE)
    assert run(other, "second", "2") == 2


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_noise_is_that_of_the_model_that_the_graph_is_compared_with(
    precision: str, checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit of zero every graph needs noise; the noise is that of original and NBL model with their matrices."""
    seen: list[tuple[str, bool]] = []
    measure = torch_reference.with_noise

    def watched(model: Any, probe: Probe, found: Reference) -> Reference:
        again = torch_reference.make_reference(model, probe)
        seen.append((type(model.get_decoder().layers[1].self_attn).__name__, same(again, found)))
        return measure(model, probe, found)

    monkeypatch.setattr(torch_reference, "with_noise", watched)
    monkeypatch.setitem(ladder.TOLERANCES, "fp32", dataclasses.replace(ladder.TOLERANCES["fp32"], limit=1e-12))
    run = tmp_path / "run"
    with until("verify"):
        nbl("--model", checkpoint("llama"), "--calibration", text, *TINY, "--precision", precision, "--layers", "1,2",
            "--logits", "all", "--output", run)  # fmt: skip
    assert seen == [("LlamaAttention", True), ("Wrapped", True)]
    compared = [r for r in checks(run) if r["check"] in ("original", "nbl") and "max abs" in r["metric"]]
    assert compared and all("whose float32 noise allows" in r["detail"] for r in compared)
    kept = json.loads(safe_open(run / FILE, framework="numpy").metadata()["references"])
    assert kept["codes" if precision == "int4" else "own"]["noisy"]
