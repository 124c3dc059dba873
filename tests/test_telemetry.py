"""Telemetry of the libraries is off in a process that imports this package, unless its environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

_SWITCHES = ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "NNCF_CI")
_SILENT_IN = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "GITLAB_CI", "CIRCLECI", "TRAVIS", "JENKINS_URL", "BUILDKITE",
              "CODEBUILD_BUILD_ID", "TEAMCITY_VERSION", "APPVEYOR", "BITBUCKET_BUILD_NUMBER",
              "SYSTEM_TEAMFOUNDATIONCOLLECTIONURI", "XDG_CACHE_HOME")  # ONNX Runtime is silent in CI  # fmt: skip
_OPEN = """
import sys
from pathlib import Path
from nbl_export.targets.onnx.engine import ORT
assert ORT.probe().available
ORT.open_runner(Path(sys.argv[1]), 1).__exit__()
"""


def python(code: str, *arguments: object, **environment: str) -> str:
    """What a fresh process says, with none of the switches in its environment but those given."""
    kept = {name: value for name, value in os.environ.items() if name not in (*_SWITCHES, *_SILENT_IN)}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120,
        env={**kept, "PYTHONPATH": str(Path(__file__).parent.parent), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("own", [None, "0", ""])
def test_the_environment_decides_and_off_is_the_default(own: str | None) -> None:
    code = f"import os, nbl_export; print([os.environ[n] for n in {_SWITCHES!r}])"
    given = {} if own is None else dict.fromkeys(_SWITCHES, own)
    assert python(code, **given).strip() == str(["1" if own is None else own] * len(_SWITCHES))


def test_opening_a_model_leaves_nothing_in_the_home(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    python(_OPEN, genai_dirs["nbl"], HOME=str(tmp_path))
    assert list(tmp_path.rglob("*")) == []


_COMPRESS = """
import nbl_export
import nncf, numpy, openvino, torch
from openvino import opset13 as ops
from openvino_tokenizers import convert_tokenizer
x = ops.parameter([1, 64], numpy.float32)
product = ops.matmul(x, ops.constant(numpy.ones((64, 64), numpy.float32)), False, True)
nncf.compress_weights(openvino.Model([product], [x], "m"), mode=nncf.CompressWeightsMode.INT8_ASYM)
openvino.convert_model(torch.nn.Linear(2, 2), example_input=torch.ones(1, 2))
"""


def test_converting_for_openvino_leaves_nothing_in_the_home(tmp_path: Path) -> None:
    """OpenVINO's telemetry writes ~/intel when openvino is imported, before it sends anything."""
    python(_COMPRESS, HOME=str(tmp_path))
    assert not (tmp_path / "intel").exists()
