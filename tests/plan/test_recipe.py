"""Recipes as files: what is written is read, and a stranger's file is refused in a sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nbl_export.errors import CorruptError, NblError, UsageError
from nbl_export.files import file_sha256
from nbl_export.mixers.base import Mixer, WindowShape
from nbl_export.mixers.window import Window
from nbl_export.plan import recipe as recipes
from nbl_export.plan.recipe import Recipe, find, load_maps, save
from nbl_export.records.decoder import DecoderSpec

from ..tiny import HIDDEN, LAYERS, random_map

SPEC = DecoderSpec("llama", LAYERS, HIDDEN, 4, 2, 16, 384, 512)
RECIPE = Recipe("tiny", "f" * 32, LAYERS, (0, 2), ("linear", "window"), "normed", "distilled", 8)


def window(seed: int = 0) -> Window:
    made = np.random.default_rng(seed)

    def size(*shape: int) -> np.ndarray:
        return made.standard_normal(shape, np.float32)

    shape = WindowShape(8, 4, 2, 16, 0.25)
    return Window(shape, size(128, HIDDEN), np.zeros(128, np.float32), size(HIDDEN, 64), size(8))


def own(layers: Collection[int]) -> Mapping[int, Mixer]:
    return {i: window() for i in layers}


def trained(rank: int = 3) -> Window:
    before, made = window(), np.random.default_rng(7)
    added = made.standard_normal((128, rank), np.float32) @ made.standard_normal((rank, HIDDEN), np.float32)
    return dataclasses.replace(before, qkv=before.qkv + added)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    save(RECIPE, {0: random_map(0), 2: trained()}, own, tmp_path / "r.json")
    return tmp_path / "r.json"


def test_what_is_written_is_read(written: Path) -> None:
    recipe, path = find(str(written))
    assert (dataclasses.replace(recipe, maps=None), path) == (RECIPE, written)
    maps = load_maps(recipe, path, SPEC, own)
    for name, array in random_map(0).tensors().items():
        np.testing.assert_array_equal(maps[0].tensors()[name], array)
    for name, array in trained().tensors().items():
        np.testing.assert_allclose(maps[2].tensors()[name], array, atol=1e-4)


def test_a_recipe_has_no_weight_of_the_model(written: Path) -> None:
    tensors = load_file(written.with_suffix(".safetensors"))
    assert {n: t.shape for n, t in tensors.items() if ".2." in n} == {
        "layers.2.window.qkv.up": (128, 3), "layers.2.window.qkv.down": (3, HIDDEN),
    }  # fmt: skip


def test_layers_alone_are_one_file(tmp_path: Path) -> None:
    save(RECIPE, None, own, tmp_path / "r.json")
    assert find(str(tmp_path / "r.json"))[0] == RECIPE
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": [2, 0]}, "sorted"),
        ({"layers": [0, LAYERS]}, "has no attention"),
        ({"layers": [], "kinds": []}, "replaces no layer"),
        ({"kinds": ["linear", "os.system"]}, "the kinds are"),
        ({"kinds": ["linear"]}, "one kind"),
        ({"num_layers": 10**9}, "that of no decoder"),
        ({"tap": "../x"}, "unknown tap"),
        ({"fit": "magic"}, "the fits are"),
        ({"window": None}, "windows of no size"),
        ({"window": True}, "wrong kind"),
        ({"window": 0}, "at least one token"),
        ({"title": 3}, "wrong kind"),
        ({"code": "x"}, "code"),
    ],
)
def test_values_that_do_not_fit_are_refused(written: Path, changes: dict[str, Any], reason: str) -> None:
    values = json.loads(written.read_text(encoding="utf-8"))
    written.write_text(json.dumps({**values, **changes}), encoding="utf-8")
    with pytest.raises(CorruptError, match=rf"is not a recipe \(.*{reason}.*fetch it again"):
        find(str(written))


def test_other_files_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file, and the package has"):
        find("none")
    (tmp_path / "other.json").write_text('{"format": "nbl-recipe-9"}', encoding="utf-8")
    with pytest.raises(NblError, match="no recipe of this version"):
        find(str(tmp_path / "other.json"))
    (tmp_path / "long.json").write_text(" " * (2 << 20), encoding="utf-8")
    with pytest.raises(NblError, match="larger than"):
        find(str(tmp_path / "long.json"))


def test_another_model_is_refused_with_the_revision_that_is_wanted() -> None:
    recipe = dataclasses.replace(RECIPE, revision="abc123")
    recipe.refuse_other("f" * 32, "mine")
    with pytest.raises(NblError, match="the recipe is of tiny, revision abc123, and mine is another model"):
        recipe.refuse_other("e" * 32, "mine")
    with pytest.raises(NblError, match="the recipe is of tiny, and mine is another model"):
        RECIPE.refuse_other("e" * 32, "mine")


def _wide(tensors: dict[str, Any]) -> None:
    """Factors whose product fits, with more columns than the weight has."""
    tensors["layers.2.window.qkv.up"] = np.zeros((128, HIDDEN + 1), np.float32)
    tensors["layers.2.window.qkv.down"] = np.zeros((HIDDEN + 1, HIDDEN), np.float32)


def _zeroed(tensors: dict[str, Any]) -> None:
    tensors["layers.0.linear.weight"] = np.zeros((8, 8), np.float32)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda t: t.update({"layers.0.linear.weight": t["layers.0.linear.weight"] * np.nan}), "NaN or infinity"),
        (_zeroed, "disagree"),
        (lambda t: t.update({"layers.0.linear.bias": t["layers.0.linear.bias"].astype(np.float64)}), "not float32"),
        (lambda t: t.update({"layers.1.linear.bias": t["layers.0.linear.bias"]}), "is of no layer"),
        (lambda t: t.update({"layers.2.window.qkv.up": np.zeros((7, 3), np.float32)}), "wrong shape"),
        (_wide, "factors of wrong shapes"),
        (lambda t: t.update({"layers.2.window.qkv.up": np.zeros((128, 4), np.float32)}), "matmul|mismatch"),
        (lambda t: t.update({"layers.2.window.code": np.zeros(3, np.float32)}), "of another kind"),
        (lambda t: t.pop("layers.0.linear.bias"), "bias"),
    ],
)
def test_maps_that_do_not_fit_are_refused(written: Path, damage: Any, reason: str) -> None:
    file = written.with_suffix(".safetensors")
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    recipe, path = find(str(written))
    with pytest.raises(CorruptError, match="its hash is another"):
        load_maps(recipe, path, SPEC, own)
    with pytest.raises(CorruptError, match=rf"(?s)not the maps of this recipe \(.*({reason})"):
        load_maps(dataclasses.replace(recipe, maps=file_sha256(file)), path, SPEC, own)


def test_a_link_and_another_hidden_size_are_refused(written: Path, tmp_path: Path) -> None:
    recipe, path = find(str(written))
    with pytest.raises(CorruptError, match="another hidden size"):
        load_maps(recipe, path, dataclasses.replace(SPEC, hidden_size=64), own)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "r.json").write_bytes(written.read_bytes())
    (folder / "r.safetensors").symlink_to(written.with_suffix(".safetensors"))
    with pytest.raises(CorruptError, match="link"):
        load_maps(*find(str(folder / "r.json")), SPEC, own)
    (folder / "s.json").symlink_to(written)
    with pytest.raises(CorruptError, match="link"):
        find(str(folder / "s.json"))


def test_maps_beyond_the_bound_are_not_read(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_MOST_MAPS_BYTES", 100)
    monkeypatch.setattr(recipes, "file_sha256", lambda _: pytest.fail("the whole file is read"))
    with pytest.raises(CorruptError, match="not the maps of this recipe"):
        load_maps(*find(str(written)), SPEC, own)


def test_recipes_of_the_package_are_whole() -> None:
    """Each names a model and layers, and its maps are the file that it names."""
    for path in sorted(recipes.SHIPPED.glob("*.json")):
        found, place = find(path.stem)
        assert place == path and found.maps in (None, file_sha256(path.with_suffix(".safetensors")))
