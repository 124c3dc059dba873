"""Which layers: the two spellings of --layers, the order of the scores, the maps file."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nbl_export.errors import CorruptError, NblError
from nbl_export.methods import cache_layers
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.linear.order import plan_of
from nbl_export.methods.maps_file import load_maps, maps_in, save_maps
from nbl_export.options.goals import parse_layers
from nbl_export.records.plan import LayerScore, Plan
from tests.command import keys, nbl
from tests.tiny import LAYERS

pytestmark = pytest.mark.job

SCORES = tuple(LayerScore(i, bound, 0.5, 0.1) for i, bound in enumerate((5.0, 1.0, 3.0, 1.0, 9.0)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8", 8), ("0", 0), ("0,7,24-29", (0, 7, 24, 25, 26, 27, 28, 29)), ("8,", (8,)), ("3-4", (3, 4)), ("9,1", (1, 9))],
)
def test_layers_are_read(text: str, expected: int | tuple[int, ...]) -> None:
    assert parse_layers(text, 30) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("30", "at least one stays"), ("0-29", "at least one stays"), ("31", "at least one stays"),
        ("1,30", "layer 30 does not exist"), ("1,1", "layer 1 is named twice"), ("3-5,4", "layer 4 is named twice"),
        ("-1", "is not a layer"), ("5-3", "runs backwards"), ("a", "is not a layer"), ("1,,2", "is not a layer"),
        ("", "is not a layer"), ("1.5", "is not a layer"),
    ],
)  # fmt: skip
def test_bad_layers_are_refused(text: str, message: str) -> None:
    with pytest.raises(NblError, match=message):
        parse_layers(text, 30)


def test_smallest_bound_goes_first_and_ties_go_to_the_lower_layer() -> None:
    assert plan_of(SCORES, 1).layers == (1,)
    assert plan_of(SCORES, 2).layers == (1, 3)
    assert plan_of(SCORES, 3).layers == (1, 2, 3)
    assert plan_of(SCORES, 0) == Plan.of(5, {}, "residual", "cca", SCORES)


def test_named_layers_are_taken_as_they_are() -> None:
    assert plan_of(SCORES, (0, 4)).layers == (0, 4)
    plan = plan_of(SCORES, (0, 4))
    assert plan.kinds == ("linear", "attention", "attention", "attention", "linear")
    assert (plan.layers, plan.mixers, plan.num_layers) == ((0, 4), ("linear", "linear"), 5)


def test_contradictory_plans_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Plan.of(5, {5: "linear"})
    with pytest.raises(ValueError, match="at least one attention layer stays"):
        Plan.of(5, dict.fromkeys(range(5), "linear"))


def test_caches_are_those_that_layers_hold() -> None:
    assert cache_layers(Plan.of(4, {0: "linear", 2: "predicted_kv", 3: "linear"})) == (1, 2)


def maps() -> dict[int, Linear]:
    rng = np.random.default_rng(0)
    return {i: Linear(rng.standard_normal((4, 4)).astype("f"), rng.standard_normal(4).astype("f")) for i in (1, 3)}


def test_maps_round_trip(tmp_path: Path) -> None:
    save_maps(maps(), tmp_path / "maps.safetensors")
    back = load_maps(tmp_path / "maps.safetensors", (1, 3))
    assert sorted(back) == [1, 3]
    assert all(
        np.array_equal(back[i].tensors()[name], array) for i, m in maps().items() for name, array in m.tensors().items()
    )
    with pytest.raises(CorruptError, match=r"layers\.2\.weight"):
        load_maps(tmp_path / "maps.safetensors", (1, 2))
    (bad := maps())[3].weight[0, 0] = np.nan
    save_maps(bad, tmp_path / "maps.safetensors")
    with pytest.raises(CorruptError, match="layer 3"):
        load_maps(tmp_path / "maps.safetensors", (1, 3))


LINEAR, PREDICTED = {"weight": np.eye(4, dtype="f"), "bias": np.ones(4, "f")}, {"predicted_kv.bias": np.ones(2, "f")}


def predicted(*numbers: float) -> dict[str, np.ndarray]:
    return {**PREDICTED, "predicted_kv.weight": np.ones((2, 8), "f"), "predicted_kv.numbers": np.array(numbers, "f")}


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": np.ones((4, 1), "f"), "bias": np.ones(4, "f")},
        {"weight": np.ones((4, 33), "f"), "bias": np.ones(4, "f")},
        {"weight": np.eye(5, dtype="f"), "bias": np.ones(5, "f")},
        {"weight": np.array(1, "f"), "bias": np.ones(4, "f")},
        {"weight": np.ones((0, 1 << 40), "f"), "bias": np.ones(0, "f")},
        {"none.nothing": np.ones((0, 4), "f")},
        {"unknown.nothing": np.ones((0, 4), "f")},
        predicted(4, 1, 1e9, 1e-5),
        predicted(4, 1, np.inf, 1e-5),
        predicted(4, np.nan, 2, 1e-5),
        predicted(1e9, 1, 2, 1e-5),
        predicted(4, 1, 2),
        {**predicted(), "predicted_kv.numbers": np.ones((4, 4), "f")},
        predicted(4, 1, 2, -1),
        predicted(4, 1, 2, 0),
        {"weight": np.eye(4, dtype=ml_dtypes.float8_e4m3fn), "bias": np.ones(4, "f")},
        {"weight": np.eye(4, dtype="i4"), "bias": np.ones(4, "f")},
    ],
    ids=range(17),
)
def test_maps_of_other_shapes_than_the_decoder_are_refused(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    for good in (LINEAR, predicted(4, 1, 2, 1e-5)):
        save_file({f"layers.1.{name}": array for name, array in good.items()}, tmp_path / "maps.safetensors")
        assert load_maps(tmp_path / "maps.safetensors", (1,), 4)[1].size == 4
    others = {f"layers.{'9' * 5000}.bias": np.ones(4, "f")}  # Python reads no number of as many digits
    save_file({**others, **{f"layers.1.{n}": a for n, a in tensors.items()}}, tmp_path / "maps.safetensors")
    assert maps_in(tmp_path / "maps.safetensors")[0] == (1,)
    with pytest.raises(CorruptError, match=r"maps\.safetensors"):
        load_maps(tmp_path / "maps.safetensors", (1,), 4)


def test_a_maps_file_says_its_tap_and_equal_maps_are_equal_bytes(tmp_path: Path) -> None:
    contents = set()
    for k in range(8):
        save_maps(maps(), tmp_path / f"{k}.safetensors", "normed")
        contents.add((tmp_path / f"{k}.safetensors").read_bytes())
    assert len(contents) == 1
    assert maps_in(tmp_path / "0.safetensors") == (tuple(maps()), "normed")


def test_an_older_maps_file_does_not_say_its_tap(tmp_path: Path) -> None:
    tensors = {"layers.3.weight": np.eye(2, dtype="f"), "layers.3.bias": np.ones(2, "f")}
    save_file(tensors, tmp_path / "maps.safetensors", metadata={"format": "nbl-maps-1"})
    assert maps_in(tmp_path / "maps.safetensors") == ((3,), None)


def test_a_plan_reads_the_moments_of_one_layer_at_a_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All moments of a large model do not fit into memory: 8 layers of 4,096 x 4,096 are 3 GiB."""
    from nbl_export.methods.linear import order

    alive: list[weakref.ref[Any]] = []
    most = 0
    whole = order.read_sums

    def read_sums(file: Any, layer: int, tap: str) -> Any:
        nonlocal most
        gc.collect()
        most = max(most, 1 + sum(ref() is not None for ref in alive))
        found = whole(file, layer, tap)
        alive.append(weakref.ref(found.xx))
        return found

    monkeypatch.setattr(order, "read_sums", read_sums)
    gc.collect()
    gc.freeze()  # what is there already is not looked through again and again
    try:
        for select in ("cca", "efficient"):
            done = nbl("plan", run, "--layers", "1", *keys(select=select))
            assert done.status == 0, done.err
    finally:
        gc.unfreeze()
    assert len(alive) >= 2 * LAYERS and most <= 2  # the layer before may still be held
