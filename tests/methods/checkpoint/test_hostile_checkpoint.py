"""A checkpoint that asks transformers for code, pickles, other weights or files of this machine gets none of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import CorruptError, NblError
from nbl_export.methods.checkpoint.load import load_model, load_tokenizer, materialise, read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.model.checkpoint.pretrained import model_of
from tests.command import TINY, assert_refused, nbl
from tests.test_security import EVIL
from tests.tiny import save_gguf

pytestmark = [pytest.mark.job, pytest.mark.process]

Checkpoint = Callable[[str], Path]


@pytest.fixture
def model(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a tiny checkpoint, to be made hostile."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


def changed(model: Path, name: str, **values: Any) -> None:
    path = model / name
    said = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**said, **values}), encoding="utf-8")


def asking(checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy with an unknown tokenizer class and code beside it, and the file that the code would write.

    Transformers would ask on the terminal, and "y" would run it.
    """
    model, marker = Path(shutil.copytree(checkpoint, tmp_path / "model")), tmp_path / "marker"
    (model / "evil.py").write_text(EVIL.format(marker=str(marker)), encoding="utf-8")
    asks = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    changed(model, "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=asks)
    return model, marker


def test_no_code_of_a_tokenizer_runs(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of SmolLM3, which has no tokenizer class in transformers."""
    model, marker = asking(checkpoint("smollm3"), tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    with pytest.raises(NblError, match="has no usable tokenizer"):
        load_tokenizer(model)
    assert not marker.exists()


def test_nobody_is_asked_whether_code_may_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, marker = asking(checkpoint("llama"), tmp_path)
    (tmp_path / "text.txt").write_text("words " * 5000, encoding="utf-8")
    given = ("--model", model, "--calibration", tmp_path / "text.txt", *TINY, "--output", tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-m", "nbl_export", *map(str, given)], input="y\n" * 20, capture_output=True, text=True,
        timeout=300, cwd=Path(__file__).parents[2], env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert not marker.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("nbl-export: ")]
    assert len(said) == 1 and "has no usable tokenizer" in said[0], done.stderr


def test_a_pickle_is_not_read_beside_safetensors(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    read: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *given, **_: read.append(given))
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(NblError, match=r"decoy.safetensors is not named model.safetensors.*pytorch_model.bin"):
        resolve(str(model))
    with pytest.raises(NblError, match=r"no file named model\.safetensors"):
        model_of(model)  # transformers itself
    assert read == []


_REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"transformers_weights": "pytorch_model.bin"}),
    ("config.json", {"attn_implementation": "kernels-community/flash-attn"}),
    ("config.json", {"_attn_implementation": {"": "someone/kernel"}}),
    ("config.json", {"experts_implementation": "someone/kernel"}),
    ("config.json", {"_attn_implementation_internal": "someone/kernel"}),
    ("config.json", {"_experts_implementation_internal": "someone/kernel"}),
    ("config.json", {"quantization_config": {"quant_method": "fp8"}}),
    ("config.json", {"quantization_config": {"bits": 4}}),
    ("generation_config.json", {"custom_generate": "someone/generate"}),
    ("tokenizer_config.json", {"tokenizer_file": "{outside}"}),
    ("config.json", {"configuration_files": ["config.5.0.0.json"]}),
    ("tokenizer_config.json", {"vocab": "secret"}),  # of the working directory
    ("tokenizer_config.json", {"vocab_file": "../secret"}),
    ("tokenizer_config.json", {"vocab_file": "~/secret"}),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.json", "../private/tokenizer.1.json"]}),
    ("tokenizer_config.json", {"fast_tokenizer_files": ["~nobody/../../private/tokenizer.1.json"]}),
    ("tokenizer_config.json", {"anything": [{"deep": {"er": "sub/../../secret"}}]}),
    ("tokenizer_config.json", {"sp_model_kwargs": {"model_file": "{outside}"}}),
]


@pytest.mark.parametrize(("name", "values"), _REFUSED, ids=str)
def test_settings_that_are_refused(
    model: Path, name: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "tokenizer.1.json").write_bytes((model / "tokenizer.json").read_bytes())
    for place in ("sub", "~nobody"):
        (model / place).mkdir()
    said = json.loads(json.dumps(values).replace("{outside}", str(tmp_path / "secret")))
    changed(model, name, **said)
    with pytest.raises(NblError, match=f"{name} sets {next(iter(values))}, which is refused"):
        resolve(str(model))
    with pytest.raises(NblError, match="which is refused"):
        load_tokenizer(model)


def test_settings_inside_others_are_refused(model: Path) -> None:
    changed(model, "config.json", sub={"deep": [{"attn_implementation": "someone/kernel"}]})
    with pytest.raises(NblError, match="sets attn_implementation"):
        resolve(str(model))


def test_settings_that_real_models_have_pass(model: Path) -> None:
    changed(model, "config.json", attn_implementation="sdpa", auto_map={"AutoConfig": "a.B"}, quantization_config=None)
    left_over = {
        "special_tokens_map_file": "/home/somebody/map.json",
        "tokenizer_file": "/home/somebody/tokenizer.json",
    }
    changed(model, "tokenizer_config.json", **left_over, name_or_path="org/model", sp_model_kwargs={})
    token = {"383": {"content": "/", "special": False}}  # a path on every machine
    changed(model, "tokenizer_config.json", sep_token="/", chat_template="/", extra_special_tokens=["/", "../"])
    changed(model, "tokenizer_config.json", added_tokens_decoder=token, fast_tokenizer_files=["tokenizer.json"])
    read_spec(resolve(str(model)))
    assert load_tokenizer(model)("The")["input_ids"]
    assert load_model(model).config.num_hidden_layers == 3


def test_an_adapter_does_not_load_another_model(model: Path) -> None:
    changed(model, "adapter_config.json", base_model_name_or_path="/somewhere/else")
    with pytest.raises(NblError, match="merge the adapter"):
        resolve(str(model))


def test_names_that_stand_twice_are_refused(model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace("{", '{"model_type": "gpt2",', 1), encoding="utf-8")
    with pytest.raises(NblError, match="'model_type' occurs twice"):
        resolve(str(model))


def test_a_quantised_model_is_not_loaded_as_the_original(model: Path) -> None:
    changed(model, "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(NblError, match="--quantized-model"):
        load_model(model)


# -- links -------------------------------------------------------------------------------------------------------


_LINKED = ("merges.txt", "config.json", "tokenizer.json", "model.safetensors", "anything",
           "additional_chat_templates/k.jinja", "additional_chat_templates/.k.jinja", ".hidden")  # fmt: skip


@pytest.mark.parametrize("name", _LINKED)
def test_links_out_of_a_checkpoint_are_not_followed(model: Path, tmp_path: Path, text: Path, name: str) -> None:
    outside = tmp_path / "id_rsa"
    outside.write_bytes((model / name).read_bytes() if (model / name).exists() else b"secret")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(outside)
    done = nbl("--model", model, "--calibration", text, *TINY, "--output", tmp_path / "run")
    assert_refused(done, 1, model / name, "is a link out of its directory", "cp -rL")
    assert not list((tmp_path / "run").rglob(name))


def test_an_index_names_no_link_out(model: Path, tmp_path: Path) -> None:
    """Not even a hidden one, to weights that would load."""
    from safetensors import safe_open

    (model / "model.safetensors").rename(tmp_path / "private.safetensors")
    (model / ".w.safetensors").symlink_to(tmp_path / "private.safetensors")
    with safe_open(str(tmp_path / "private.safetensors"), framework="np") as file:
        names = dict.fromkeys(file.keys(), ".w.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")
    with pytest.raises(CorruptError, match=r"\.w\.safetensors is a link out of its directory"):
        resolve(str(model))
    with pytest.raises(CorruptError, match=r"\.w\.safetensors is a link out of its directory"):
        load_model(model)


# -- GGUF --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A GGUF file alone in a folder."""
    (tmp_path / "folder").mkdir()
    return save_gguf(tmp_path / "folder" / "model.gguf")


def test_a_folder_with_a_gguf_has_no_link_out(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("secret", encoding="utf-8")
    assert resolve(str(gguf.parent)).gguf == gguf
    template = gguf.parent / "additional_chat_templates" / "k.jinja"
    template.parent.mkdir()
    template.symlink_to(tmp_path / "id_rsa")
    with pytest.raises(CorruptError, match=r"k\.jinja is a link out of its directory"):
        resolve(str(gguf.parent))


def test_a_gguf_that_is_a_link_out_is_refused(gguf: Path, tmp_path: Path) -> None:
    gguf.rename(tmp_path / "private.gguf")
    gguf.symlink_to(tmp_path / "private.gguf")
    for name in (gguf, gguf.parent):
        with pytest.raises(CorruptError, match=r"model\.gguf is a link out of its directory"):
            resolve(str(name))


def test_nothing_beside_a_gguf_file_is_read(gguf: Path, tmp_path: Path) -> None:
    """A file in a folder of downloads is a model by itself, whatever else is there."""
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    materialise(resolve(str(gguf)), alone)
    (tmp_path / "id_rsa").write_text("secret", encoding="utf-8")
    (gguf.parent / "additional_chat_templates").mkdir()
    for name in ("additional_chat_templates/k.jinja", "chat_template.jinja", "somewhere"):
        (gguf.parent / name).symlink_to(tmp_path / "id_rsa")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"):
        (gguf.parent / name).write_text('{"custom_generate": "evil", "transformers_weights": "x"}', encoding="utf-8")
    materialise(resolve(str(gguf)), beside)
    names = sorted(p.name for p in alone.rglob("*"))
    assert "tokenizer.json" in names and sorted(p.name for p in beside.rglob("*")) == names
    for name in names:
        assert (alone / name).read_bytes() == (beside / name).read_bytes(), name


def test_text_files_that_are_links_are_not_copied(model: Path, tmp_path: Path) -> None:
    from nbl_export.targets.export.finish import add_text_files

    (tmp_path / "id_rsa").write_text("secret", encoding="utf-8")
    (model / "merges.txt").symlink_to(tmp_path / "id_rsa")
    (tmp_path / "out").mkdir()
    with pytest.raises(NblError, match=r"merges.txt is a link out of its directory"):
        add_text_files(model, tmp_path / "out")
    assert not (tmp_path / "out" / "merges.txt").exists()


def cached(model: Path, cache: Path, *, shared: bool = False) -> Path:
    """The checkpoint as the hub's cache keeps it: links from a snapshot to files named by their hash."""
    repository = cache / "models--org--tiny"
    snapshot = repository / "snapshots" / ("ab" * 20)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        blob = repository / "blobs" / f"{number:064x}"
        if shared:
            store = cache / "blobs" / blob.name[:2] / blob.name
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, store)
            blob.symlink_to(store)
        else:
            shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_the_cache_of_the_hub_is_read(model: Path, tmp_path: Path, shared: bool) -> None:
    snapshot = cached(model, tmp_path / "hub", shared=shared)
    assert resolve(str(snapshot)).fingerprint == resolve(str(model)).fingerprint
    assert load_tokenizer(snapshot)("The")["input_ids"] == load_tokenizer(model)("The")["input_ids"]
    assert load_model(snapshot).config.num_hidden_layers == 3


@pytest.mark.parametrize("half", ["snapshots", "models", "revision"])
def test_half_of_the_cache_s_layout_is_not_the_cache(model: Path, tmp_path: Path, half: str) -> None:
    snapshot = cached(model, tmp_path / "hub")
    repository = snapshot.parent.parent
    resolve(str(snapshot))
    if half == "snapshots":
        snapshot.parent.rename(repository / "versions")
        snapshot = repository / "versions" / snapshot.name
    elif half == "models":
        repository.rename(tmp_path / "hub" / "org--tiny")
        snapshot = tmp_path / "hub" / "org--tiny" / "snapshots" / snapshot.name
    else:
        snapshot = snapshot.rename(snapshot.parent / "main")
    with pytest.raises(CorruptError, match="is a link out of its directory"):
        resolve(str(snapshot))


@pytest.mark.parametrize("trick", ["name", "folder", "chain"])
def test_what_only_looks_like_the_cache_is_not(model: Path, tmp_path: Path, trick: str) -> None:
    snapshot, secret = cached(model, tmp_path / "hub"), tmp_path / "home" / ("0" * 64)
    secret.parent.mkdir()
    secret.write_text("secret", encoding="utf-8")
    blobs = tmp_path / "hub" / "models--org--tiny" / "blobs"
    if trick == "name":  # in the folder of blobs, and not one
        (blobs / "id_rsa").write_text("secret", encoding="utf-8")
        (snapshot / "merges.txt").symlink_to(blobs / "id_rsa")
    elif trick == "folder":  # the folder of blobs is a link itself
        shutil.copytree(blobs, secret.parent, dirs_exist_ok=True)
        shutil.rmtree(blobs)
        blobs.symlink_to(secret.parent)
    else:
        (blobs / ("f" * 64)).symlink_to(secret)
        (snapshot / "merges.txt").symlink_to(blobs / ("f" * 64))
    with pytest.raises(NblError, match="is a link out of its directory"):
        resolve(str(snapshot))
