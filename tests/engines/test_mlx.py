"""mlx-lm on a tiny model of the Nemotron-NAS form: tokens of transformers (`make test-mlx`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear.maps import Linear
from nbl_export.targets.checkpoint import nemotron_nas

from ..tiny import HIDDEN, SPLIT, greedy, random_map, save_checkpoint

pytestmark = pytest.mark.mlx

PYTHON = os.environ.get("NBL_MLX_PYTHON", "")
CODE = """
import json, sys
import mlx.core as mx
from mlx_lm.utils import load_model
from mlx_lm.models.cache import make_prompt_cache
from pathlib import Path
model, _ = load_model(Path(sys.argv[1]))
ids, new = json.loads(sys.argv[2]), int(sys.argv[3])
cache = make_prompt_cache(model)
found, chunk = [], ids
for _ in range(new):
    chunk = [int(model(mx.array([chunk]), cache=cache)[0, -1].argmax())]
    found += chunk
print(json.dumps(found))
"""
NEW = 12


@pytest.mark.parametrize("layers", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("architecture", ["llama", "llama3", "mistral"])
def test_mlx_gives_the_tokens_of_transformers(architecture: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    if not PYTHON:
        pytest.skip("NBL_MLX_PYTHON does not name the Python of an environment with mlx-lm; see make test-mlx")
    checkpoint = save_checkpoint(architecture, tmp_path / "model", intermediate_size=256, **SPLIT)
    maps = {i: Linear(random_map(i).weight, torch.zeros(HIDDEN).numpy()) for i in layers}
    nemotron_nas.save(load_model(checkpoint), checkpoint, maps, "mlx", tmp_path / "out")
    ids = torch.randint(3, 380, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = greedy(linearize(load_model(checkpoint), maps, "normed"), ids, NEW)
    words = [PYTHON, "-c", CODE, str(tmp_path / "out"), json.dumps(ids), str(NEW)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
