"""A model folder for transformers.js: same numbers, the names it looks for, and nothing written where it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from nbl_export.errors import NblError
from nbl_export.mixers.linear import Linear
from nbl_export.publish.transformers_js import lay_out
from nbl_export.rewrite import rewrite

from ..command import nbl, snapshot
from ..tiny import HEAD_DIM

Exported = Callable[..., Path]
Maps = Callable[..., dict[int, Linear]]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def logits(path: Path) -> np.ndarray:
    """Of five tokens, with empty caches of the sizes that the graph names, or of a head where it names none."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feed: dict[str, np.ndarray] = {"input_ids": np.arange(5)[None], "attention_mask": np.ones((1, 5), np.int64)}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            width = value.shape[3] if isinstance(value.shape[3], int) else HEAD_DIM
            feed[value.name] = np.zeros((1, value.shape[1], 0, width), kinds[value.type])
        elif value.name == "position_ids":
            feed[value.name] = np.arange(5)[None]
    return np.asarray(session.run(["logits"], feed)[0])


@pytest.mark.parametrize(
    ("source", "precision", "name", "dtype"),
    [
        ("genai", "fp32", "model.onnx", "fp32"),
        ("genai", "int4", "model_q4.onnx", "q4"),
        ("genai", "int8", "model_quantized.onnx", "q8"),
        ("mobius", "fp16", "model_fp16.onnx", "fp16"),
    ],
)
def test_the_graph_has_the_name_of_its_precision_and_computes_the_same(
    source: str, precision: str, name: str, dtype: str, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    rewrite(exported("llama", source, precision), model, random_maps(1))
    before = snapshot(model)
    assert lay_out(model, out) == out
    assert snapshot(model) == before
    assert {p.name for p in (out / "onnx").iterdir()} == {name, f"{name}_data"}
    settings = read(out / "config.json")
    assert settings["transformers.js_config"] == {"dtype": dtype, "use_external_data_format": 1}
    assert {k: v for k, v in settings.items() if k != "transformers.js_config"} == read(model / "config.json")
    np.testing.assert_array_equal(logits(out / "onnx" / name), logits(model / "model.onnx"))


def test_every_cache_has_a_number_for_the_size_of_a_head(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    """transformers.js takes a symbol for 0 and makes caches that the graph refuses."""
    lay_out(genai_dirs["nbl"], tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "onnx" / "model.onnx", load_external_data=False).graph
    caches = [v for v in (*graph.input, *graph.output) if "." in v.name]
    assert [v.name for v in graph.input if v.name.endswith(".key")] == [
        "past_key_values.0.key",
        "past_key_values.2.key",
    ]
    assert {v.type.tensor_type.shape.dim[3].dim_value for v in caches} == {HEAD_DIM}


def test_the_chat_template_is_where_it_is_looked_for(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(genai_dirs["nbl"], tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ messages[0].content }} é", encoding="utf-8")
    lay_out(model, tmp_path / "out")
    assert read(tmp_path / "out" / "tokenizer_config.json")["chat_template"] == "{{ messages[0].content }} é"


def test_takes_a_run_directory(run: Path, tmp_path: Path) -> None:
    done = nbl("card", run, "--base-model", "owner/name", "--transformers-js", tmp_path / "out")
    assert (done.status, done.out.splitlines()[-1]) == (0, str(tmp_path / "out")), done.err
    np.testing.assert_array_equal(
        logits(tmp_path / "out" / "onnx" / "model.onnx"), logits(run / "model" / "model.onnx")
    )
    assert read(tmp_path / "out" / "nbl.json") == read(run / "model" / "nbl.json")


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "model.onnx.data"])
def test_a_link_out_of_the_folder_is_not_copied(genai_dirs: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(genai_dirs["nbl"], tmp_path / "folder"))
    (tmp_path / "id_rsa").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "id_rsa")
    with pytest.raises(NblError, match="is a link out of its directory"):
        lay_out(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refused(folder: Path, out: Path, *parts: object) -> None:
    with pytest.raises(NblError) as seen:
        lay_out(folder, out)
    assert all(str(part) in str(seen.value) for part in parts), seen.value


def test_refuses_what_it_cannot_lay_out(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    model, out = Path(shutil.copytree(genai_dirs["nbl"], tmp_path / "model")), tmp_path / "out"
    refused(model, model, model, "there already")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", out, tmp_path / "empty", "is missing")
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.onnx", b"\x08\xff not a graph"),
        ("config.json", b"[1]"),
        ("tokenizer_config.json", b"{"),
        ("genai_config.json", b"{}"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: bytes, genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(genai_dirs["nbl"], tmp_path / "model"))
    (model / name).write_bytes(content)
    refused(model, tmp_path / "out", model / name)
    assert not (tmp_path / "out").exists()


def test_a_cache_of_another_form_is_refused(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(genai_dirs["nbl"], tmp_path / "model"))
    graph = onnx.load(model / "model.onnx", load_external_data=False)
    del next(i for i in graph.graph.input if i.name == "past_key_values.2.key").type.tensor_type.shape.dim[3:]
    (model / "model.onnx").write_bytes(graph.SerializeToString())
    refused(model, tmp_path / "out", "past_key_values.2.key", "4 dimensions")


def test_weights_elsewhere_are_not_followed(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A location outside the folder must not be copied into what someone will publish."""
    model = Path(shutil.copytree(genai_dirs["nbl"], tmp_path / "model"))
    graph = onnx.load(model / "model.onnx", load_external_data=False)
    entries = [e for t in graph.graph.initializer for e in t.external_data if e.key == "location"]
    entries[-1].value = "../../secret"
    (model / "model.onnx").write_bytes(graph.SerializeToString())
    refused(model, tmp_path / "out", "../../secret")
    assert not (tmp_path / "out").exists()
