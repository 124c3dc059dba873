"""llama.cpp on tiny GGUF files (`make test-llama-cpp`), and what is said if it is not installed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.graph.gguf.content import write_content
from nbl_export.mixers.linear import Linear
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.model.torch_decoder import TorchDecoder
from nbl_export.targets.gguf.engine import LLAMA_CPP, LlamaCppRunner
from nbl_export.targets.gguf.linearize import linearized
from nbl_export.targets.gguf.node import PLACE
from nbl_export.targets.gguf.write import content_of

from ..canaries import Canaries
from ..command import assert_refused, nbl
from ..tiny import HIDDEN, random_map, save_checkpoint, save_gguf

IDS = np.random.default_rng(0).integers(3, 384, 40).tolist()
runs = pytest.mark.llama_cpp


def linear(*layers: int) -> dict[int, Linear]:
    return {i: Linear(random_map(i).weight, np.zeros(HIDDEN, np.float32)) for i in layers}


@runs
@pytest.mark.parametrize("layers", [(), (0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("architecture", ["llama", "llama3", "llama-linear", "llama-yarn", "mistral", "qwen2"])
def test_files_compute_what_torch_computes(architecture: str, layers: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint, maps = save_checkpoint(architecture, tmp_path / "model"), linear(*layers)
    write_content(linearized(content_of(checkpoint), maps, "keep", {}), tmp_path / "m.gguf")
    ours = TorchDecoder(linearize(load_model(checkpoint), maps, "normed"))
    logs, best = ours.score(IDS)
    with LLAMA_CPP.open_runner(tmp_path / "m.gguf", 1) as runner:
        found, its_best = runner.score(IDS)
        np.testing.assert_allclose(found, logs, atol=2e-3)  # keys and values in float16
        assert (its_best == best).mean() > 0.9
        runner.begin(64)
        runner.append(IDS[:20])
        runner.append(IDS[20:39])
        whole = np.array(runner.server.ask("logits", ids=[IDS[39]])["logits"])
        runner.rewind(39)
        np.testing.assert_allclose(np.array(runner.server.ask("logits", ids=[IDS[39]])["logits"]), whole, atol=1e-6)
    with torch.inference_mode():
        expected = ours._model(torch.tensor([IDS]), use_cache=False).logits[0, -1].numpy()
    np.testing.assert_allclose(whole, expected, atol=5e-3)


@runs
def test_zero_layers_replaced_gives_the_logits_of_the_original_file(tmp_path: Path) -> None:
    from nbl_export.graph.gguf.content import read_content

    original = save_gguf(tmp_path / "original.gguf")
    write_content(linearized(read_content(original), {}, "keep", {}), tmp_path / "zero.gguf")
    found = []
    for path in (original, tmp_path / "zero.gguf"):
        with LLAMA_CPP.open_runner(path, 1) as runner:
            runner.begin(64)
            found.append(runner.server.ask("logits", ids=IDS)["logits"])
    assert found[0] == found[1]


@runs
def test_commands_take_files(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for layers in ((), (1,)):
        path = tmp_path / f"{len(layers)}.gguf"
        write_content(linearized(content_of(checkpoint("llama")), linear(*layers), "keep", {}), path)
    pair = (tmp_path / "0.gguf", tmp_path / "1.gguf")
    done = nbl("bench", *pair, "--depth", "0", "--prompt-tokens", "16", "--generate-tokens", "4", "--repetitions", "3",
               "--json")  # fmt: skip
    assert done.status == 0, done.err
    value = json.loads(done.out)
    cache = [value["variants"][str(p)]["kv_cache_bytes_per_token"] for p in pair]
    assert cache[1] * 3 == cache[0] * 2  # one of three layers has no cache
    assert all(v["engine"] == "llama.cpp" and "float16" in v["arithmetic"] for v in value["variants"].values())
    said = nbl("generate", pair[1], "The import", "--max-new-tokens", "4", "--raw")
    assert said.status == 0, said.err
    assert_refused(nbl("bench", *pair, "--batch", "2"), 1, "one sequence")
    assert "llama.cpp v" in nbl("doctor").out


@runs
def test_a_damaged_file(tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-2000])
    assert_refused(nbl("generate", path, "The"), 1, path, "cannot be read as GGUF")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    answer = LLAMA_CPP.probe()
    assert not answer.available and "npm install node-llama-cpp" in answer.reason
    path = save_gguf(tmp_path / "m.gguf")
    assert_refused(nbl("generate", path, "The"), 1, "engine llama.cpp is not available here", "npm install")
    with pytest.raises(NblError, match="npm install"):
        LlamaCppRunner(path, 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs node 20" in LLAMA_CPP.probe().reason


COMMANDS = (("doctor",), ("generate", "m.gguf", "hi"), ("bench", "m.gguf", "--depth", "0", "--repetitions", "1"))


@pytest.mark.parametrize("place", [None, "", ".", "./", "../strange"])
def test_a_package_of_the_working_directory_is_not_run(
    place: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of a stranger, in which somebody types a command."""
    strange, canaries = tmp_path / "strange", Canaries(tmp_path / "canaries")
    strange.mkdir()
    save_gguf(strange / "m.gguf")
    canaries.plant(strange)
    monkeypatch.chdir(strange)
    monkeypatch.delenv(PLACE, raising=False)
    if place is not None:
        monkeypatch.setenv(PLACE, place)
    for command in COMMANDS if place is None else COMMANDS[1:2]:
        done = nbl(*command)
        assert canaries.touched() == [], command
        assert done.status == (0 if command == ("doctor",) else 1)
        assert PLACE in " ".join((done.out + done.err).split())
    assert "absolute path" in LLAMA_CPP.probe().reason


def test_a_package_that_the_user_names_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above would show nothing."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    canaries = Canaries(tmp_path / "canaries")
    (tmp_path / "mine").mkdir()
    canaries.plant(tmp_path / "mine")
    monkeypatch.setenv(PLACE, str(tmp_path / "mine"))
    assert not LLAMA_CPP.probe().available
    assert canaries.touched() == ["node"]


def test_a_package_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    package = tmp_path / "node_modules" / "node-llama-cpp"
    package.mkdir(parents=True)
    (package / "package.json").write_text("{}")
    monkeypatch.setenv(PLACE, str(tmp_path))
    answer = LLAMA_CPP.probe()
    assert not answer.available and "llama.cpp's process ended" in answer.reason
    assert os.environ[PLACE] == str(tmp_path)
