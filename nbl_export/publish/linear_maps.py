"""Maps for formats that store neither a bias nor another input than the normed one, from a finished run.

    maps of the run                     linear maps
    without a bias, normed input        the same
    with a bias, normed input           the bias folded into the matrix, from the moments of the normed input
    on the residual stream              fitted anew on the normed input

Moments of the normed input come from the run's moments.safetensors, or are collected again from the run's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.mixers import kind_of
from nbl_export.mixers.base import Mixer
from nbl_export.run.deployed import Finished
from nbl_export.run.progress import Ui
from nbl_export.run_directory import MOMENTS_FILE

__all__ = ["TAP", "LinearMaps", "linear_maps", "loss_of_change"]


TAP = "normed"


@dataclass(frozen=True)
class LinearMaps:
    """Maps without a bias on the normed input, and one sentence on how they differ from the run's maps."""

    maps: Mapping[int, Mixer]
    change: str = ""


def linear_maps(found: Finished, ui: Ui) -> LinearMaps:
    """The run's maps without a bias, on the normed input.

    Raises:
        NblError: they need moments that the run has not, and its model or text is not available.
    """
    products = {i: mixer.product() for i, mixer in found.maps.items()}
    made = {i: _map(weight) for i, weight in products.items() if weight is not None}
    biased = [i for i in sorted(products) if i not in made]
    if unfitted := [i for i in biased if not kind_of(found.maps[i].kind).fitted]:
        kind = found.maps[unfitted[0]].kind
        raise NblError(
            f"layer {unfitted[0]} is of the kind {kind}, and this form holds one matrix a layer; use the run's model/, "
            "or --to transformers"
        )
    if not biased and (found.tap == TAP or not any(m.tensors()["weight"].any() for m in made.values())):
        return LinearMaps(made)  # of the form already, or dropped attention
    refitted = {} if found.tap == TAP else products
    for i, moments in _moments(found, sorted(refitted or biased), ui):
        mixer = found.maps[i]
        near = kind_of(mixer.kind).fit(moments, i, bias=False) if refitted else mixer.as_product(moments, i)
        weight = None if near is None else near.product()
        if weight is None:
            raise NblError(f"layer {i} is of the kind {mixer.kind}, and this form holds one matrix a layer")
        made[i] = _map(weight)
    if not refitted:
        return LinearMaps(made, "The bias of each map is folded into its matrix.")
    change = "The maps act on the normed input instead of the residual stream, and are fitted anew in closed form."
    if found.fit == "distilled":
        change += " What distillation had gained is lost: --fit distilled with the key maps = 'linear' keeps it."
    return LinearMaps(made, change)


def _map(weight_DD: np.ndarray) -> Mixer:
    return kind_of("linear").from_tensors({"weight": weight_DD, "bias": np.zeros(len(weight_DD), np.float32)})


def _moments(found: Finished, layers: Sequence[int], ui: Ui) -> Iterator[tuple[int, Any]]:
    """Moments of the normed input of some layers."""
    from nbl_export.calibrate import collect
    from nbl_export.calibrate.moments_file import whole_moments

    path = found.run.path / MOMENTS_FILE
    if path.is_file():
        with whole_moments(path) as file:
            if TAP in file.taps:
                for i in layers:
                    yield i, file.sums(i, TAP).moments()
                return
    try:
        model, windows = found.model.value, found.windows.value
    except NblError as error:
        raise NblError(f"{error}; or make a run for this form: {found.remake}") from error
    ui.say(f"  the run has no moments of the normed input; collecting them from {windows.numel()} tokens")
    with ui.task("collecting") as progress:
        sums = collect.collect(model, windows, progress, (TAP,))[TAP]
    for i in layers:
        yield i, sums[i]


def loss_of_change(found: Finished, linear: LinearMaps) -> str:
    """Perplexity of the run's maps and of the linear maps on text that fitted neither; "" if nothing changed."""
    if not linear.change or found.original_is_gone:
        return ""
    from nbl_export.model.switched import SwitchedModel

    found_on = found.final.value
    asked = ((found.maps, found.tap), (linear.maps, TAP))
    losses = [SwitchedModel(found.model.value, maps, tap).quality_loss(found_on, tuple(maps)) for maps, tap in asked]
    (original, before), (_, after) = (loss.perplexities for loss in losses)
    return f"Perplexity on held-back text: original {original:.4g}, maps of the run {before:.4g}, now {after:.4g}."
