"""Olive runs the recipes of docs/olive.md on a tiny model; the graphs agree with torch (`make test-olive`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.plan.maps_file import load_maps, maps_in

from ..command import TINY, nbl
from ..tiny import HEAD_DIM

pytestmark = pytest.mark.olive

PYTHON = os.environ.get("NBL_OLIVE_PYTHON", "")
OLD_GENAI = os.environ.get("NBL_OLIVE_APART", "")  # directory with GenAI 0.14, which Olive's ModelBuilder needs
PAGE = Path(__file__).parents[2] / "docs" / "olive.md"
SMALL = {"layers": "1", "calibration_tokens": 1024, "context": 64, "repetitions": 1, "prompt_tokens": [16],
         "generate_tokens": 4, "depths": [0], "compute_dtype": "float32"}  # fmt: skip


@pytest.fixture(scope="module")
def home(checkpoint: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run and the table of passes."""
    if not PYTHON or not OLD_GENAI:
        pytest.skip("NBL_OLIVE_PYTHON and NBL_OLIVE_APART name no environment with olive-ai; see make test-olive")
    home = tmp_path_factory.mktemp("olive")
    done = nbl("--model", checkpoint("llama"), "--calibration", text, *TINY, "--output", home / "run")
    assert done.status == 0, done.err
    table = subprocess.run([PYTHON, "-m", "nbl_export.olive"], capture_output=True, text=True, check=True).stdout
    (home / "package.json").write_text(table, encoding="utf-8")
    return home


def recipe(which: int, model: Path, home: Path, out: Path) -> dict[str, Any]:
    """A recipe of the page, with paths."""
    found = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[which]
    text = found.replace('"MODEL"', json.dumps(str(model))).replace('"OUT"', json.dumps(str(out)))
    value: dict[str, Any] = json.loads(text.replace("RUN/", f"{home / 'run'}/"))
    return value


def olive(value: dict[str, Any], home: Path, **more: str) -> None:
    (home / "recipe.json").write_text(json.dumps({**value, "cache_dir": str(home / "cache")}), encoding="utf-8")
    words = [str(Path(PYTHON).parent / "olive"), "run", "--config", home / "recipe.json"]
    words += ["--package-config", home / "package.json"]
    environment = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", **more}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    name = "all_logits.onnx" if (directory / "all_logits.onnx").is_file() else "model.onnx"
    session = onnxruntime.InferenceSession(str(directory / name), providers=["CPUExecutionProvider"])
    empty = {i.name: np.zeros((1, i.shape[1], 0, HEAD_DIM), np.float32) for i in session.get_inputs()
             if i.name.startswith("past_key_values")}  # fmt: skip
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty}
    return np.asarray(session.run(["logits"], {i.name: given[i.name] for i in session.get_inputs()})[0][0])


def of_torch(model: Path, maps: Path, ids: np.ndarray) -> np.ndarray:
    layers, tap = maps_in(maps)
    linearized = linearize(load_model(model), load_maps(maps, layers), str(tap))
    with torch.inference_mode():
        return np.asarray(linearized(torch.from_numpy(ids), use_cache=False).logits[0])


def test_the_rewrite_behind_the_model_builder(checkpoint: Callable[[str], Path], home: Path) -> None:
    model, ids = checkpoint("llama"), np.arange(3, 40)[None]
    olive(recipe(1, model, home, home / "builder"), home, PYTHONPATH=OLD_GENAI)
    wanted = of_torch(model, home / "run" / "maps.safetensors", ids)
    np.testing.assert_allclose(logits(home / "builder", ids), wanted, atol=1e-3)
    assert json.loads((home / "builder" / "nbl.json").read_text(encoding="utf-8"))["replaced_layers"]
    assert (home / "builder" / "genai_config.json").is_file() and (home / "builder" / "tokenizer.json").is_file()


def test_the_rewrite_of_a_directory(checkpoint: Callable[[str], Path], home: Path) -> None:
    value = recipe(1, checkpoint("llama"), home, home / "given")
    original = {"type": "ONNXModel", "model_path": str(home / "run" / "original"), "onnx_file_name": "model.onnx"}
    olive({**value, "input_model": original, "passes": {"nbl": value["passes"]["nbl"]}}, home)
    ids = np.arange(3, 40)[None]
    ours, theirs = logits(home / "run" / "model", ids), logits(home / "given", ids)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_gptq_gives_an_int4_graph_its_codes(checkpoint: Callable[[str], Path], text: Path, home: Path) -> None:
    model = checkpoint("llama")
    value = recipe(2, model, home, home / "gptq")
    data = value["data_configs"][0]
    data["load_dataset_config"]["data_files"] = str(text)
    data["pre_process_data_config"] |= {"max_seq_len": 64, "max_samples": 16}
    olive(value, home)
    codes = ("--precision", "int4", "--quantized-model", home / "gptq" / "model")
    done = nbl("--model", model, "--calibration", text, *TINY, *codes, "--output", home / "coded")
    assert done.status == 0, done.err
    facts = json.loads((home / "coded" / "nbl.json").read_text(encoding="utf-8"))
    assert facts["quantized"]["method"] == "olive" and facts["status"] == "verified"


def test_the_whole_job(checkpoint: Callable[[str], Path], text: Path, home: Path) -> None:
    value = recipe(0, checkpoint("llama"), home, home / "whole")
    value["passes"]["nbl"]["options"] |= {**SMALL, "calibration": [str(text)]}
    olive(value, home)
    facts = json.loads((home / "whole" / "nbl.json").read_text(encoding="utf-8"))
    assert len(facts["replaced_layers"]) == 1 and facts["options"]["precision"] == "int4"
    assert (home / "whole" / "genai_config.json").is_file()
