"""NBL checkpoints: saved, loaded by AutoModelForCausalLM in a fresh process, and equal to the linearized model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.maps_file import load_maps
from tests.command import nbl

pytestmark = [pytest.mark.job, pytest.mark.process]

IDS = torch.arange(2, 40)[None]


SAVE = ("convert", "--to", "transformers", "--output")


def test_the_command_and_a_fresh_process(run: Path, tmp_path: Path) -> None:
    saved = tmp_path / "new" / "place"
    done = nbl(*SAVE, saved, run)
    assert (done.status, done.out) == (0, f"{saved}\n"), done.err
    code = (
        "import sys, torch, nbl_export.methods.checkpoint.hf_classes\nfrom transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "torch.save(m(torch.arange(2, 40)[None], use_cache=False).logits.detach(), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(saved), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    manifest = json.loads((run / "nbl.json").read_text())
    model = load_model(Path(manifest["places"]["model"]))
    expected = linearize(model, load_maps(run / "maps.safetensors", manifest["replaced_layers"]), manifest["tap"])
    with torch.inference_mode():
        assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected(IDS, use_cache=False).logits)
    assert not [p.name for p in run.iterdir() if p.name.startswith(".nbl-export-")]


def test_a_configuration_that_contradicts_itself() -> None:
    from nbl_export.methods.checkpoint.hf_classes import CLASSES

    config_class, model_class = CLASSES["llama"]

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "vocab_size": 16}  # fmt: skip
    for wrong in ({"nbl_replaced_layers": [2]}, {"nbl_replaced_layers": [0, 1]}, {"nbl_tap": "elsewhere"}):
        with pytest.raises(ValueError, match=r"config\.json replaces layers"):
            model_class(config_class(**shape, **wrong))


def test_an_architecture_without_a_class(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from nbl_export.methods.checkpoint.hf_classes import save_linearized

    with pytest.raises(NblError, match="no NBL checkpoint of architecture other; there are llama, mistral"):
        save_linearized(SimpleNamespace(config=SimpleNamespace(model_type="other")), tmp_path, {}, "residual", tmp_path)
