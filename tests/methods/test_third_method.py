"""Every method through every step that calls the protocol; `pop` is a third method in one folder of the tests.

calibrate ─► choose ─► maps file ─┬─ torch, within `applied` and for good ─► checkpoint of transformers
                                  └─ ONNX: all checks of verification, against the method's own reference
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import nbl_export.hf  # noqa: F401  registers the classes
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.methods import METHODS, cache_layers, method_of
from nbl_export.methods.base import Choice, ChoiceInputs, Limit, Maps
from nbl_export.methods.checkpoint.copied import copy_linearized
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear.method import LayerCandidates
from nbl_export.methods.linear.order import quiet
from nbl_export.methods.maps_file import load_maps, save_maps
from nbl_export.methods.predicted_kv.candidates import ExitCandidates, Exits
from nbl_export.methods.rewrite import rewrite
from nbl_export.methods.rows import continuing_tokens
from nbl_export.methods.sums_file import open_sums
from nbl_export.options.options import JobOptions
from nbl_export.records.inputs import Lazy
from tests.command import BARE, nbl
from tests.methods.pop import POP, OwnProducts
from tests.tiny import HEAD_DIM, LAYERS, VOCAB
from tests.verifying import verify_tiny

pytestmark = pytest.mark.job

EXIT = ExitCandidates((1,), (4,), True, Exits((1,), 64))
CANDIDATES: dict[str, Any] = {"linear": LayerCandidates((0, 2), "cca"), "predicted_kv": EXIT, "pop": EXIT}
CLOSE = 1e-4  # logits of float32 engines, of about 1
IDS = torch.from_numpy(np.random.default_rng(3).integers(2, VOCAB, (1, 24)))


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has the third method for one test."""
    monkeypatch.setitem(METHODS, POP.name, POP)


def test_every_method_has_a_case(added: None) -> None:
    assert CANDIDATES.keys() == METHODS.keys()


def chosen(name: str, model: Any, folder: Path) -> Choice:
    """What the method chooses of the tiny model, with sums from a file."""
    method, candidates = METHODS[name], CANDIDATES[name]
    text = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (32, 64)))
    with method.collector(model, candidates.collected, bf16=False) as sums:
        rows = method.rows(text, candidates.collected)
        sums.begin(rows)
        sums.add(rows)
        sums.meet()
        sums.save(folder / "sums", {"identity": {"batches": 1}, "done": 1})
    unread = ("trains", "partial", "selection", "validation", "selection_items", "validation_items", "saved", "speedup",
              "setting")  # fmt: skip
    given: dict[str, Any] = dict.fromkeys(unread, Lazy(None, lambda: None))
    inputs = ChoiceInputs(
        num_layers=LAYERS, candidates=candidates, limit=Limit(0.05, None),
        sums=Lazy(None, lambda: open_sums(folder / "sums")), model=Lazy(None, lambda: model), **given,
    )  # fmt: skip
    return method.choose(inputs, quiet, lambda _line: None, {})


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> Any:
    return load_model(checkpoint("llama"))


def logits(model: Any) -> torch.Tensor:
    """Of the last rows, which leave the highest layers of every method."""
    with torch.inference_mode():
        found: torch.Tensor = model(IDS, use_cache=False).logits[:, -4:]
    return found


@pytest.mark.parametrize("name", CANDIDATES)
def test_torch_computes_what_is_served_within_a_context_alone(name: str, model: Any, tmp_path: Path) -> None:
    choice = chosen(name, model, tmp_path)
    assert method_of(choice.maps) is METHODS[name] and set(choice.plan.mixers) == {name}
    before, modules = logits(model), [type(module) for module in model.modules()]
    with METHODS[name].applied(model, choice.maps):
        within = logits(model)
    assert torch.equal(logits(model), before) and [type(module) for module in model.modules()] == modules
    assert (within - before).abs().max() > CLOSE
    save_maps(choice.maps, tmp_path / "maps")
    again = load_maps(tmp_path / "maps", choice.plan.layers)
    with METHODS[name].applied(model, again):
        assert torch.equal(logits(model), within)


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_graph_computes_what_torch_does(name: str, model: Any, exported: Any, tmp_path: Path) -> None:
    choice = chosen(name, model, tmp_path)
    rewrite(exported("llama"), tmp_path / "nbl", choice.maps)
    decoder = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    decoder.begin(1)
    with METHODS[name].applied(model, choice.maps):
        right = logits(model)[0]
    np.testing.assert_allclose(decoder.step(IDS.numpy())[0, -4:], right, atol=CLOSE)
    assert decoder.contract.cache_layers == cache_layers(choice.plan)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", CANDIDATES)
def test_verification_passes(
    name: str, precision: str, model: Any, checkpoint: Callable[[str], Path], exported: Any, tmp_path: Path
) -> None:
    """The whole ladder, of which the text is that of GenAI."""
    maps = chosen(name, model, tmp_path).maps
    found = verify_tiny(
        checkpoint("llama"), "genai", precision, tmp_path / "graphs", tuple(maps), mixer_of=maps.__getitem__,
        exported=exported("llama", "genai", precision),
    )  # fmt: skip
    assert [result for result in found if not result.passed] == []
    assert {"structure", "original", "nbl", "text", "last_token"} <= {result.check for result in found}


@pytest.mark.parametrize("name", CANDIDATES)
def test_transformers_loads_its_checkpoint(
    name: str, model: Any, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    choice = chosen(name, model, tmp_path)
    assert copy_linearized(checkpoint("llama"), choice.maps, "residual", tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with METHODS[name].applied(model, choice.maps):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_mix_of_methods_is_refused(model: Any, exported: Any, tmp_path: Path) -> None:
    mixed: Maps = {**chosen("linear", model, tmp_path).maps, **chosen("pop", model, tmp_path).maps}
    with pytest.raises(Exception, match=r"maps are of several methods \(linear, pop\), and a model has one"):
        rewrite(exported("llama"), tmp_path / "nbl", mixed)


def test_a_whole_job_of_a_third_method(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the text to the report, once the options name it."""
    monkeypatch.setattr(JobOptions, "method", POP.name)
    words = ("--model", checkpoint("llama"), "--calibration", text, *BARE, "--exit-layer", "1", "--recent-tokens", "4")
    done = nbl(*words, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    manifest = json.loads((tmp_path / "run" / "nbl.json").read_text(encoding="utf-8"))
    assert manifest["kinds"] == ["pop", "pop"] and manifest["status"] == "verified"
    maps = load_maps(tmp_path / "run" / "maps.safetensors", (1, 2))
    assert all(isinstance(mixer, OwnProducts) for mixer in maps.values())
    assert continuing_tokens(mixer.reads for mixer in maps.values()) == 4
    assert "Numerics verified" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
