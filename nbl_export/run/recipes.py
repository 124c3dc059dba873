"""A recipe in a job: what it asks for, whether it is of the job's model, and the plan and maps that it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, UsageError
from nbl_export.mixers.base import Mixer
from nbl_export.options.goals import GOALS
from nbl_export.options.options import NO_WINDOWS, RECIPE_FIT, JobOptions, flag_of
from nbl_export.options.rules import ModelFacts
from nbl_export.options.settle import read_asked
from nbl_export.plan.recipe import SHIPPED, Recipe, find, load_maps
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.from_json import require
from nbl_export.records.plan import Plan
from nbl_export.run.resolve import Resolver
from nbl_export.run_directory import RunDirectory

__all__ = ["begin", "check", "known", "made_by", "note", "plan_and_maps", "sha256"]

Read = tuple[Recipe, Path] | None  # a recipe, and the path of its file


def begin(asked: Mapping[str, Any], recorded: JobOptions | None) -> tuple[Mapping[str, Any], Read]:
    """The options of a job and its recipe. A recipe without maps becomes the options that it stands for.

    Raises:
        UsageError: there is no such recipe, or an option contradicts it. NblError: it cannot be used.
    """
    name = asked.get("recipe") or (recorded.recipe if recorded else None)
    if name is None:
        return asked, None
    recipe, path = find(str(name))
    if recipe.maps is not None:
        return {**asked, "recipe": path.stem if path.parent == SHIPPED else str(path)}, (recipe, path)
    stated = read_asked({
        "layers": [i for i in recipe.layers if i not in recipe.unfitted] or "0",
        "window_layers": list(recipe.unfitted) or NO_WINDOWS,
        "window": recipe.window, "tap": recipe.tap, "fit": recipe.fit,
    })  # fmt: skip
    both = [key for key in (*stated, *GOALS, "select") if asked.get(key) is not None]
    if both:
        raise UsageError(f"{flag_of(both[0])} does not go with --recipe {name}, which says what it is; leave one out")
    return {**{key: value for key, value in asked.items() if key != "recipe"}, **stated}, (recipe, path)


def known(facts: ModelFacts, recipe: Read) -> ModelFacts:
    """What options depend on in a model with a recipe's maps."""
    if recipe is None or recipe[0].maps is None:
        return facts
    return dataclasses.replace(facts, recipe_tap=recipe[0].tap, maps_window=bool(recipe[0].unfitted))


def check(recipe: Read, source: Any, decoder: DecoderSpec) -> None:
    """Require that a recipe is of a model.

    Raises:
        NblError: it is of another model, or of another revision. CorruptError: it states another number of layers.
    """
    if recipe is None:
        return
    recipe[0].refuse_other(source.fingerprint, source.title)
    try:
        recipe[0].plan(decoder.others)
        require(recipe[0].num_layers == decoder.num_layers, f"the model has {decoder.num_layers} layers")
    except ValueError as error:
        raise CorruptError(f"{recipe[1]} does not fit its model ({error}); fetch it again") from error


def note(r: Resolver) -> None:
    """Record name and hash of a recipe in the manifest, so that a finished run does without its file."""
    if r.options.recipe is not None and r.read_recipe is not None:
        found = r.read_recipe[0]
        r.run.note(recipe={"name": r.options.recipe, "sha256": found.maps, "fit": found.fit})


def sha256(r: Resolver) -> str:
    """SHA-256 of the recipe's maps: of the recipe that the job begins with, or else as recorded."""
    return str(r.read_recipe[0].maps if r.read_recipe else r.run.manifest["recipe"]["sha256"])


def made_by(run: RunDirectory, fit: str) -> dict[str, str]:
    """How the maps of a recipe were made, for the manifest; nothing for other maps."""
    return {"made_by": run.manifest["recipe"]["fit"]} if fit == RECIPE_FIT else {}


def plan_and_maps(r: Resolver, windows: Callable[..., Mapping[int, Mixer]]) -> tuple[Plan, Mapping[int, Mixer]]:
    """The plan and the maps of the job's recipe.

    Args:
        windows: layers and a number of tokens -> the windows of the layers' own attention.

    Raises:
        NblError: the recipe cannot be found or used.
    """
    recipe, path = r.read_recipe or find(r.options.recipe or "")
    own = lambda layers: windows(layers, recipe.window) if layers else {}  # noqa: E731
    return recipe.plan(r.spec.others), load_maps(recipe, path, r.spec, own)
