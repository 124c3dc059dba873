"""Model, options, text and prompt that are wrong: one sentence, the right exit status, and nothing earlier lost.

Status 1 is a file or a value that does not fit the model, 2 the command line by itself, 3 failed verification.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.targets.base import Availability

from ..command import TINY, assert_refused, nbl, snapshot
from ..damage import edit, truncate
from ..tiny import LAYERS

pytestmark = [pytest.mark.job, pytest.mark.process]

Same = tuple[object, ...]
Damage = Callable[[Path], object]


@pytest.fixture
def model(checkpoint: Any, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "damaged model"))


def assert_refused_everywhere(run: Path, status: int, given: Same, *parts: object) -> None:
    """Refused with a new output, which is not made, and with a finished one, which stays as it is, --force or not."""
    fresh = run.parent / "fresh" / "run"
    assert_refused(nbl(*given, "--output", fresh), status, *parts)
    assert not fresh.parent.exists()
    before = snapshot(run)
    assert_refused(nbl(*given, "--output", run), status, *parts)
    assert_refused(nbl(*given, "--output", run, "--force"), status, *parts)
    assert snapshot(run) == before


# -- the model -------------------------------------------------------------------------------------------------


INDEX = "model.safetensors.index.json"


def index(*names: object) -> Damage:
    def write(model: Path) -> None:
        weights = {f"weight.{i}": name for i, name in enumerate(names)}
        (model / INDEX).write_text(json.dumps({"weight_map": weights}))

    return write


def two_forms(model: Path) -> None:
    shutil.copyfile(model / "model.safetensors", model / "a.safetensors")
    index("a.safetensors")(model)


def only_a_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


MODELS: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "gone": (shutil.rmtree, ("no model at", "damaged model", "hub id")),
    "weights cut": (lambda m: truncate(m / "model.safetensors", 1000), ("model.safetensors", "truncated",
     "fetch it again")),
    "weights cut at the end": (lambda m: truncate(m / "model.safetensors", 471_000), ("model.safetensors",
     "truncated")),
    "weights empty": (lambda m: truncate(m / "model.safetensors", 0), ("model.safetensors", "truncated")),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ("has no safetensors weights",)),
    "pickle": (only_a_pickle, ("pytorch_model.bin is a pickle", "convert it")),
    "no config": (lambda m: (m / "config.json").unlink(), ("has no config.json",)),
    "config cut": (lambda m: truncate(m / "config.json", 100), ("config.json", "cannot be read",
     "fetch the model again")),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), ("config.json", "not a model configuration")),
    "config contradicts": (lambda m: edit(m / "config.json", num_key_value_heads=3), ("shapes that config.json",)),
    "config of 0 layers": (lambda m: edit(m / "config.json", num_hidden_layers=0), ("no usable", "1 to 1024 layers")),
    "bert": (lambda m: edit(m / "config.json", model_type="bert"), ("'bert'", "not supported", "README.md lists")),
    "a type that is a list": (lambda m: edit(m / "config.json", model_type=["llama"]), ("['llama']", "not supported")),
    "no type": (lambda m: edit(m / "config.json", model_type=None), ("not supported", "README.md lists")),
    "index names a missing file": (index("a.safetensors"), ("lacks a.safetensors", "index", "fetch the model again")),
    "index names a file outside": (index("../x.safetensors"), ("index.json", "outside", "not to be trusted")),
    "index names the directory above": (index(".."), ("index.json", "outside", "not to be trusted")),
    "index of numbers": (index(5), ("index.json", "cannot be read")),
    "index of nothing": (index(), ("index.json", "names no file")),
    "one file and an index of another": (two_forms, ("model.safetensors and model.safetensors.index.json", "remove")),
    "index cut": (lambda m: (m / INDEX).write_text('{"weight'), ("index.json", "cannot be read")),
    "index is a directory": (lambda m: (m / INDEX).mkdir(), ("index.json", "cannot be read")),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_damaged_model(case: str, model: Path, text: Path, run: Path) -> None:
    damage, parts = MODELS[case]
    damage(model)
    assert_refused_everywhere(run, 1, ("--model", model, "--calibration", text, *TINY), *parts)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda m: (m / "tokenizer.json").write_text("{"), ("no usable tokenizer",)),
        (lambda m: (m / "tokenizer.json").unlink(), ("has no tokenizer (tokenizer.json", "put the model's own files")),
        (lambda m: edit(m / "config.json", num_hidden_layers=LAYERS + 1), ("states 4 layers", "weights have 3")),
        (lambda m: edit(m / "config.json", intermediate_size=48), ("shapes that config.json states",)),
        (lambda m: _move_token(m / "tokenizer.json"), ("token 5000", "do not belong together")),
        (lambda m: _poison(m / "model.safetensors"), ("layer 0", "NaN or infinity", "check the checkpoint")),
    ],
    ids=["tokenizer", "no tokenizer", "a layer without weights", "another width", "an unknown token", "NaN"],
)  # fmt: skip
def test_model_that_is_found_out_when_it_is_loaded(
    damage: Damage, parts: tuple[str, ...], model: Path, text: Path, tmp_path: Path
) -> None:
    damage(model)
    given = ("--model", model, "--calibration", text, *TINY)
    assert_refused(nbl(*given, "--output", tmp_path / "run"), 1, *parts)
    assert {path.name for path in (tmp_path / "run").glob("*.safetensors")} <= {"text.safetensors"}
    assert not list((tmp_path / "run").glob(".nbl-export-*"))


def _move_token(path: Path) -> None:
    """A frequent token gets a number beyond the model's embeddings."""
    said = json.loads(path.read_text(encoding="utf-8"))
    said["model"]["vocab"]["e"] = 5000
    path.write_text(json.dumps(said), encoding="utf-8")


def _poison(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path)
    tensors["model.layers.0.self_attn.q_proj.weight"][:] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})


def test_gguf_of_another_architecture(text: Path, run: Path, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "gptneox")
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    given = ("--model", tmp_path / "m.gguf", "--calibration", text)
    assert_refused_everywhere(run, 1, given, "m.gguf", "'gptneox'", "which README.md lists")
    (tmp_path / "n.gguf").touch()
    assert_refused_everywhere(run, 1, ("--model", tmp_path, "--calibration", text), "2 GGUF files", "name one")


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing", "a/b/c", "~/nothing/here", "nobody/no thing"])
def test_model_that_is_nowhere(name: str, run: Path) -> None:
    assert_refused_everywhere(run, 1, ("--model", name), "no model", name.removeprefix("~"))


def test_model_is_a_file(run: Path, text: Path) -> None:
    assert_refused_everywhere(run, 1, ("--model", text), "is not a model", "a directory with safetensors")


# -- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--calibration-tokens", "x"), ("--calibration-tokens",)),
        (("--seed", "1"), ("--seed is a key of a file: write seed = ... to FILE.toml, and give --config",)),
        (("--device", "gpu"), ("--device is auto, cpu, cuda, not 'gpu'",)),
        (("--max-perplexity-increase", "0.1"), ("may mean 10% or 0.1%; write one of them",)),
        (("--config", "/nowhere.toml"), ("--config", "/nowhere.toml", "cannot be read")),
        (("--no-such-option",), ("--no-such-option",)),
        (("stray",), ("stray",)),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_option_that_is_none(options: tuple[str, ...], parts: tuple[str, ...], same: Same, run: Path) -> None:
    assert_refused_everywhere(run, 2, (*same, *options), *parts)


def test_options_of_the_main_job_stand_before_no_command(run: Path) -> None:
    assert_refused(nbl("--layers", "2", "plan", run), 2, "--layers", "plan")


def test_engine_that_is_not_available(same: Same, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before any work; what needs no engine goes on."""
    from nbl_export.targets.onnx.engine import OrtEngine

    gone = Availability(False, "the library is from the moon; install another")
    monkeypatch.setattr(OrtEngine, "probe", lambda _self, run=False: gone)
    assert_refused_everywhere(run, 1, same, "engine ort is not available here", "from the moon; install another")
    before = snapshot(run)
    assert_refused(nbl("generate", run, "Hi"), 1, "not available here", "from the moon")
    assert_refused(nbl("bench", run, "--generate-tokens", 5), 1, "not available here", "from the moon")
    assert snapshot(run) == before  # the option of a command that failed is not recorded
    (run / "verify.json").unlink()
    assert_refused(nbl("verify", run), 1, "not available here", "from the moon")
    assert "from the moon" in nbl("doctor").out
    assert nbl("plan", run, "--layers", "2").status == 0


# -- calibration text ------------------------------------------------------------------------------------------


def test_calibration_text(checkpoint: Any, run: Path, tmp_path: Path) -> None:
    """Other damage: `tests/text/test_corpus.py`."""
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "a"}\n{"text')
    given = ("--model", checkpoint("llama"), *TINY, "--calibration", tmp_path / "t.jsonl")
    assert_refused_everywhere(run, 1, given, "calibration text", "t.jsonl, line 2", "is not JSON")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/not/there.txt", "no calibration text at /not/there.txt: give a UTF-8 file"),
        ("not-there.txt", "no calibration text at not-there.txt: give a UTF-8 file"),
        ("./not/there", "no calibration text at not/there: give a UTF-8 file"),
        (".", "calibration text . is a directory; name a file in it"),
    ],
)
def test_calibration_text_that_is_nowhere(name: str, reason: str, checkpoint: Any, run: Path) -> None:
    given = ("--model", checkpoint("llama"), *TINY, "--calibration", name)
    assert_refused_everywhere(run, 1, given, reason)


def test_calibration_text_that_is_too_short(checkpoint: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Only a few words.")
    given = ("--model", checkpoint("llama"), *TINY, "--calibration", tmp_path / "t.txt")
    before = snapshot(run)
    refused = nbl(*given, "--output", run)
    assert_refused(refused, 1, "t.txt is too short", "tokens", "give more text or a smaller key context")
    assert snapshot(run) == before
    assert nbl("report", run).status == 0


# -- generate --------------------------------------------------------------------------------------------------


def test_prompt_that_cannot_be_answered(finished: Path) -> None:
    assert_refused(nbl("generate", finished, ""), 1, "prompt is empty")
    assert_refused(nbl("generate", finished, "word " * 600), 1, "512", "shorten the prompt")
    assert_refused(nbl("generate", finished, "Hi", "--max-new-tokens", 0), 2, "--max-new-tokens")


def test_reader_that_goes_away(finished: Path) -> None:
    """`nbl-export generate ... | head -c 1` ends quietly."""
    command = [sys.executable, "-m", "nbl_export", "generate", str(finished), "The", "--max-new-tokens", "300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) in (0, 1)
