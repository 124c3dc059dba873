"""Recipes: which layers of one revision of a model are replaced, and by which maps, as files that are small and inert.

    NAME.json          model, fingerprint of its files, layers, kinds, tap
    NAME.safetensors   what replaces attention, unless the recipe names layers alone; no weight of the model itself
        layers.{i}.linear.{weight,bias}        a fitted map, whole
        layers.{i}.window.{name}[.up, .down]   what training added to the layer's own weights, if it was trained

A recipe may come from a stranger: its values, its links and the shapes of its tensors are checked. The package has
recipes too, which are found by their names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbl_export.errors import CorruptError, NblError, UsageError
from nbl_export.files import file_sha256, write_json
from nbl_export.mixers import kind_of, kinds
from nbl_export.mixers.base import Mixer
from nbl_export.options.options import FITS
from nbl_export.records.decoder import MOST_LAYERS, DecoderSpec
from nbl_export.records.from_json import read_record, require
from nbl_export.records.plan import Plan
from nbl_export.trust.contained import check_inside
from nbl_export.trust.model_settings import read_object

__all__ = ["SHIPPED", "Recipe", "Windows", "find", "load_maps", "save"]

Windows = Callable[[Collection[int]], Mapping[int, Mixer]]  # layers -> what their own attention makes, untrained

SHIPPED = Path(__file__).parent.parent / "recipes"
_FORMAT = "nbl-recipe-1"
_MOST_BYTES = 1 << 20  # of the JSON
_MOST_MAPS_BYTES = 4 << 30
_TENSOR = re.compile(r"layers\.(\d{1,6})\.(\w+)\.(\w+?)(?:\.(up|down))?")
_NOISE = 1e-5  # of the largest singular value: what rounding leaves of a difference


@dataclass(frozen=True)
class Recipe:
    """The content of NAME.json.

    Attributes:
        title, revision: of the model. fingerprint: of its files, which a job's model must have.
        fit: how the maps were made. window: tokens that layers of kind window read.
        maps: SHA-256 of NAME.safetensors; None if the recipe names layers alone.
    """

    title: str
    fingerprint: str
    num_layers: int
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    tap: str
    fit: str
    window: int | None = None
    revision: str | None = None
    maps: str | None = None

    def __post_init__(self) -> None:
        require(0 < self.num_layers <= MOST_LAYERS, "num_layers is that of no decoder")
        require(len(self.layers) > 0, "it replaces no layer")
        require(all(kind in kinds() for kind in self.kinds), f"the kinds are {', '.join(kinds())}")
        require(self.fit in FITS, f"the fits are {', '.join(FITS)}")
        require(self.window is None or self.window >= 1, "a window has at least one token")
        require(self.window is not None or not self.unfitted, "it has windows of no size")
        self.plan()  # checks layers, kinds and tap

    def plan(self, others: tuple[int, ...] = ()) -> Plan:
        """The plan for a decoder, of which some layers may have no attention.

        Raises:
            ValueError: layers, kinds or tap do not fit.
        """
        return Plan(self.num_layers, self.layers, self.tap, "given", kinds=self.kinds, others=others)

    @property
    def unfitted(self) -> tuple[int, ...]:
        """Layers whose mixer is made of their own attention."""
        return tuple(i for i, kind in zip(self.layers, self.kinds, strict=True) if not kind_of(kind).fitted)

    def refuse_other(self, fingerprint: str, model: str) -> None:
        """Require the model that the recipe is of.

        Raises:
            NblError: the files of the model are others.
        """
        if fingerprint != self.fingerprint:
            revision = f", revision {self.revision}" if self.revision else ""
            raise NblError(
                f"the recipe is of {self.title}{revision}, and {model} is another model or another revision of it; "
                "give that revision, or leave --recipe out"
            )


def find(name: str) -> tuple[Recipe, Path]:
    """A recipe of the package by its name, or of a file, and where its JSON is.

    Raises:
        UsageError: there is no such recipe. NblError, CorruptError: it cannot be used.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}
    path = shipped.get(name) or Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"--recipe {name}: no such file, and the package has {', '.join(shipped) or 'no recipe'}")
    check_inside(path, path.parent)
    values = read_object(path, _MOST_BYTES)
    if values.get("format") != _FORMAT:
        raise NblError(f"{path} is no recipe of this version, which reads {_FORMAT}")
    try:
        return read_record(Recipe, {k: v for k, v in values.items() if k != "format"}), path.absolute()
    except (TypeError, ValueError) as error:
        raise CorruptError(f"{path} is not a recipe ({error}); fetch it again") from error


def save(recipe: Recipe, maps: Mapping[int, Mixer] | None, own: Windows, path: Path) -> None:
    """Write a recipe, with maps unless they are None, to a path that ends in .json; the maps go beside it."""
    from safetensors.numpy import save_file

    if maps is not None:
        windows, tensors = own(recipe.unfitted), dict[str, np.ndarray]()
        for i, mixer in maps.items():
            before = windows[i].tensors() if i in windows else {}
            for name, array in mixer.tensors().items():
                tensors |= _parts(f"layers.{i}.{mixer.kind}.{name}", array, before.get(name))
        save_file(tensors, path.with_suffix(".safetensors"))
        recipe = dataclasses.replace(recipe, maps=file_sha256(path.with_suffix(".safetensors")))
    write_json(path, {"format": _FORMAT, **dataclasses.asdict(recipe)})


def _parts(name: str, array: np.ndarray, before: np.ndarray | None) -> dict[str, np.ndarray]:
    """A tensor whole, or what was added to the one before: nothing, thin factors of it, or the whole difference."""
    if before is None:
        return {name: np.ascontiguousarray(array)}
    added = array - before
    if not added.any():
        return {}
    if added.ndim == 2:
        up, size, down = np.linalg.svd(added, full_matrices=False)
        rank = int((size > _NOISE * size[0]).sum())
        if rank * sum(added.shape) < added.size:
            return {f"{name}.up": up[:, :rank] * size[:rank], f"{name}.down": np.ascontiguousarray(down[:rank])}
    return {name: np.ascontiguousarray(added)}


def load_maps(recipe: Recipe, path: Path, spec: DecoderSpec, own: Windows) -> dict[int, Mixer]:
    """The maps of a recipe, for a decoder of these sizes.

    Raises:
        CorruptError: the file of the maps is not the one that the recipe names, or it does not fit.
    """
    file = path.with_suffix(".safetensors")
    found, windows = _read(file, recipe), own(recipe.unfitted)
    try:
        maps = {
            i: kind_of(kind).from_tensors(_joined(found.get(i, {}), windows[i].tensors() if i in windows else {}))
            for i, kind in zip(recipe.layers, recipe.kinds, strict=True)
        }
        require(all(mixer.size == spec.hidden_size for mixer in maps.values()), "a map is of another hidden size")
        arrays = [array for mixer in maps.values() for array in mixer.tensors().values()]
        require(all(np.isfinite(array).all() for array in arrays), "a map holds NaN or infinity")
    except (KeyError, ValueError, IndexError) as error:
        raise CorruptError(f"{file} is not the maps of this recipe ({error}); fetch it again") from error
    return maps


def _read(file: Path, recipe: Recipe) -> dict[int, dict[str, np.ndarray]]:
    """The tensors by layer and name."""
    from safetensors import SafetensorError, safe_open

    named = dict(zip(recipe.layers, recipe.kinds, strict=True))
    found: dict[int, dict[str, np.ndarray]] = {}
    try:
        check_inside(file, file.parent)
        if file.stat().st_size > _MOST_MAPS_BYTES or file_sha256(file) != recipe.maps:
            raise CorruptError(f"{file} is not the maps of this recipe: its hash is another; fetch both files again")
        with safe_open(str(file), framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  it is no dict
                match = _TENSOR.fullmatch(name)
                require(match is not None and named.get(int(match[1])) == match[2], f"{name} is of no layer of it")
                assert match is not None
                array = opened.get_tensor(name)
                require(array.dtype == np.float32, f"{name} is not float32")
                found.setdefault(int(match[1]), {})[match[3] + (f".{match[4]}" if match[4] else "")] = array
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise CorruptError(f"{file} is not the maps of this recipe ({error}); fetch it again") from error
    return found


def _joined(given: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a mixer: those given, or what is given added to those before."""
    if not before:
        return dict(given)
    joined = dict(before)
    for name, array in joined.items():
        added = given.get(name)
        if f"{name}.up" in given:
            up, down = given[f"{name}.up"], given[f"{name}.down"]
            require(
                up.ndim == down.ndim == 2 and up.shape[1] <= min(array.shape), f"{name} has factors of wrong shapes"
            )
            added = up @ down
        if added is not None:
            require(added.shape == array.shape, f"{name} has the wrong shape")
            joined[name] = array + added
    require({n.split(".")[0] for n in given} <= set(joined), "it has tensors of another kind")
    return joined
