"""Writes the recipe of a finished run: `nbl-export recipe DIR --output NAME.json`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from nbl_export.errors import NblError, UsageError
from nbl_export.files import move_into_place, refuse_occupied
from nbl_export.mixers import kind_of
from nbl_export.mixers.base import Mixer
from nbl_export.options.options import NO_ORIGINAL, RECIPE_FIT
from nbl_export.plan.recipe import Recipe, Windows, save
from nbl_export.run.deployed import Finished, open_finished
from nbl_export.run.progress import Ui

__all__ = ["write_recipe"]


def write_recipe(directory: Path, target: Path, ui: Ui, *, layers_only: bool = False, force: bool = False) -> None:
    """Write the layers of a run, and their maps unless `layers_only`, to `target` and beside it.

    Raises:
        UsageError: `target` does not end in .json. NblError: it is there already, the run is not finished or failed,
            replaces no layer, or was made of an NBL checkpoint; or its windows have several sizes.
    """
    if target.suffix != ".json":
        raise UsageError(f"--output {target}: a recipe is NAME.json")
    files = [target] if layers_only else [target, target.with_suffix(".safetensors")]
    for file in files:
        refuse_occupied(file)
    with open_finished(directory, ui, force=force) as found, found.run.scratch() as scratch:
        save(_recipe(found), None if layers_only else found.maps, _own(found), scratch / target.name)
        for file in reversed(files):  # the JSON last: it names the maps
            move_into_place(scratch / file.name, file)


def _recipe(found: Finished) -> Recipe:
    facts, kinds = found.run.manifest, {i: mixer.kind for i, mixer in found.maps.items()}
    if found.original_is_gone:
        raise NblError(f"{found.run.path} has no recipe: {NO_ORIGINAL}")
    if not kinds:
        raise NblError(f"{found.run.path} replaces no layer, so there is no recipe")
    sizes = {mixer.work().reach for mixer in found.maps.values() if not kind_of(mixer.kind).fitted}
    if len(sizes) > 1:
        raise NblError(f"{found.run.path} has windows of several sizes, which no recipe holds; choose one size")
    layers, made = tuple(sorted(kinds)), facts["fit"]
    return Recipe(
        title=facts["model"].get("title") or Path(facts["model"]["name"]).name,
        fingerprint=facts["model"]["fingerprint"],
        num_layers=facts["num_layers"],
        layers=layers,
        kinds=tuple(kinds[i] for i in layers),
        tap=found.tap,
        fit=made["made_by"] if made["kind"] == RECIPE_FIT else made["kind"],
        window=next(iter(sizes), None),
        revision=facts["model"].get("revision"),
    )


def _own(found: Finished) -> Windows:
    from nbl_export.model.windows import window_layers

    def windows(layers: Collection[int]) -> Mapping[int, Mixer]:
        if not layers:
            return {}
        tokens = next(found.maps[i].work().reach or 0 for i in layers)
        return window_layers(found.model.value, layers, tokens, found.tap)

    return windows
