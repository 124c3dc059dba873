"""A job with a recipe: no calibration, no choice, the same graph; refused for another model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ..command import TINY, assert_refused, configured, nbl, snapshot
from ..jobs import until


@pytest.fixture(scope="module")
def recipe(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the finished run."""
    folder = tmp_path_factory.mktemp("recipe")
    run = shutil.copytree(finished, folder / "run")
    done = nbl("recipe", run, "--output", folder / "tiny.json")
    assert (done.status, done.out) == (0, f"{folder / 'tiny.json'}\n"), done.err
    return folder / "tiny.json"


@pytest.fixture
def given(checkpoint: Any, text: Path, tmp_path: Path) -> tuple[object, ...]:
    config = configured(tmp_path, layers=None)[1]
    lines = Path(config).read_text(encoding="utf-8").splitlines()
    Path(config).write_text("\n".join(line for line in lines if not line.startswith("layers")), encoding="utf-8")
    return ("--model", checkpoint("llama"), "--calibration", text, "--config", config, *TINY[2:])


def test_the_graph_of_a_recipe_is_that_of_its_run(
    recipe: Path, given: tuple[object, ...], finished: Path, tmp_path: Path
) -> None:
    done = nbl(*given, "--recipe", recipe, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    assert "calibrate: left out, the recipe has the layers and the maps" in done.err
    assert not (tmp_path / "run" / "moments.safetensors").exists()
    same = [snapshot(run / "model") for run in (finished, tmp_path / "run")]
    for files in same:
        files.pop("nbl.json")
    assert same[0] == same[1]
    facts = json.loads((tmp_path / "run" / "nbl.json").read_text(encoding="utf-8"))
    assert (facts["status"], facts["fit"]) == ("verified", {"kind": "recipe", "made_by": "independent"})
    assert f"--recipe {recipe}" in facts["command"] and "--layers" not in facts["command"]
    assert "from the recipe" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    moved = recipe.rename(recipe.with_suffix(".gone"))  # a finished run does without its recipe
    try:
        assert nbl("bench", tmp_path / "run", "--generate-tokens", 3).status == 0
        assert nbl("recipe", tmp_path / "run", "--output", tmp_path / "again.json").status == 0
    finally:
        moved.rename(recipe)
    names = (recipe, tmp_path / "again.json")
    assert json.loads(names[0].read_text(encoding="utf-8")) == json.loads(names[1].read_text(encoding="utf-8"))
    assert_refused(nbl("plan", tmp_path / "run", "--layers", "2"), 2, "--layers is for a job without --recipe")


def test_a_recipe_of_another_model_is_refused(
    recipe: Path, given: tuple[object, ...], checkpoint: Any, tmp_path: Path
) -> None:
    other = ("--model", checkpoint("qwen3"), *given[2:])
    done = nbl(*other, "--recipe", recipe, "--output", tmp_path / "run")
    assert_refused(done, 1, "the recipe is of", "another model or another revision", "leave --recipe out")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--layers", "1"), "--layers is for a job without --recipe"),
        (("--fit", "drop"), "--fit drop does not go with --recipe"),
        (("--tap", "normed"), "have the tap residual"),
    ],
)
def test_options_that_a_recipe_settles_are_refused(
    recipe: Path, given: tuple[object, ...], options: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = nbl(*given, "--recipe", recipe, *options, "--output", tmp_path / "run")
    assert_refused(done, 2, said)


def test_a_recipe_of_layers_alone_names_them(given: tuple[object, ...], finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "made")
    assert nbl("recipe", run, "--output", tmp_path / "r.json", "--layers-only").status == 0
    assert_refused(
        nbl(*given, "--recipe", tmp_path / "r.json", "--tap", "normed", "--output", tmp_path / "run"), 2,
        "--tap does not go with --recipe",
    )  # fmt: skip
    with until("plan"):
        done = nbl(*given, "--recipe", tmp_path / "r.json", "--output", tmp_path / "run")
    assert done.status == 0, done.err
    ours, theirs = (json.loads((r / "nbl.json").read_text(encoding="utf-8")) for r in (tmp_path / "run", finished))
    assert ours["replaced_layers"] == theirs["replaced_layers"] and ours["fit"] == theirs["fit"]
    assert ours["options"]["recipe"] is None


def test_a_recipe_is_written_once_and_under_its_name(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "made")
    (tmp_path / "r.json").write_text("mine", encoding="utf-8")
    assert_refused(nbl("recipe", run, "--output", tmp_path / "r.json"), 1, "is there already")
    assert_refused(nbl("recipe", run, "--output", tmp_path / "r.toml"), 2, "a recipe is NAME.json")
    assert (tmp_path / "r.json").read_text(encoding="utf-8") == "mine"
