"""What `convert` says of maps that it fitted anew: perplexities of torch models that hold these maps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from nbl_export.errors import NblError
from nbl_export.mixers.linear import Linear
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.publish.linear_maps import LinearMaps, linear_maps, loss_of_change
from nbl_export.run.progress import Ui

from ..tiny import HIDDEN, VOCAB

WINDOWS = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))


def linear(maps: Mapping[int, Linear]) -> dict[int, Linear]:
    """Other maps of the same layers, without a bias."""
    return {i: Linear(3 * m.weight.T, np.zeros(HIDDEN, np.float32)) for i, m in maps.items()}


def perplexity(model: Any) -> float:
    with torch.inference_mode():
        logits = model(WINDOWS).logits[:, :-1].double()
    return math.exp(cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten()).item())


@pytest.mark.parametrize("tap", ["residual", "normed"])
def test_the_perplexities_are_of_each_maps_own_tap(
    tap: str, checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]]
) -> None:
    """The maps of the run act on the run's tap, and linear maps on the normed input."""
    path, maps = checkpoint("llama"), random_maps(0, 2)
    now = LinearMaps(linear(maps), "changed")
    model, final = (SimpleNamespace(value=value) for value in (load_model(path), WINDOWS))
    found: Any = SimpleNamespace(model=model, maps=maps, tap=tap, final=final, original_is_gone=False)
    said = [float(value) for value in re.findall(r"(\d[\d.e+]*\d)", loss_of_change(found, now))]
    expected = [
        perplexity(load_model(path)),
        perplexity(linearize(load_model(path), maps, tap)),
        perplexity(linearize(load_model(path), now.maps, "normed")),
    ]
    assert said == pytest.approx(expected, rel=6e-4)  # four digits are said
    other = perplexity(linearize(load_model(path), now.maps, "residual"))
    assert abs(other / expected[2] - 1) > 0.01  # a wrong tap would show


def test_nothing_is_said_of_maps_that_did_not_change_or_without_the_original() -> None:
    for change, gone in (("", False), ("changed", True)):
        found: Any = SimpleNamespace(original_is_gone=gone)
        assert loss_of_change(found, LinearMaps({}, change)) == ""


def test_predicted_keys_have_no_linear_map() -> None:
    found: Any = SimpleNamespace(maps={2: SimpleNamespace(kind="predicted", product=lambda: None)}, tap="normed")
    with pytest.raises(NblError, match="layer 2 is of the kind predicted, and this form holds one matrix a layer"):
        linear_maps(found, Ui(quiet=True))
