"""Makes the NBL version of an existing decoder graph from any exporter, without checkpoint and torch.

DIR (or FILE.onnx) + maps.safetensors  ─►  recognise ─► rewrite ─►  OUT, renamed into place when it is complete
                                                                    nbl.json records inputs and replaced layers
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, RefusalError
from nbl_export.files import (
    file_sha256,
    friendly_os_errors,
    move_into_place,
    refuse_occupied,
    scratch_in,
    versions,
    write_json,
)
from nbl_export.graph.anatomy import cache_layers, find_block
from nbl_export.graph.caches import present_names
from nbl_export.graph.emitter import run_passes
from nbl_export.graph.external_graph import (
    check_graph_place,
    companions,
    config_dir_of,
    decoder_facts,
    logits_of,
    replaced_layers,
)
from nbl_export.graph.files import data_files, find_graph, load_graph, save_graph
from nbl_export.graph.names import ALL_LOGITS_FILE, MANIFEST, STATIC_GRAPH_FILE
from nbl_export.graph.passes.tail import PruneTail
from nbl_export.methods import method_of
from nbl_export.methods.base import Mixer, cacheless
from nbl_export.methods.maps_file import load_maps, maps_in
from nbl_export.methods.rewrite import rewrite, rewrite_model
from nbl_export.methods.rows import continuing_tokens
from nbl_export.options.goals import parse_layers
from nbl_export.records.decoder import MOST_LAYERS
from nbl_export.records.plan import TAPS, Plan
from nbl_export.run_directory import MAPS_FILE, PACKAGES, SCHEMA
from nbl_export.trust.contained import check_inside
from nbl_export.trust.model_settings import drop_code
from nbl_export.version import __version__

__all__ = ["rewrite_graph"]


def rewrite_graph(path: Path, maps_file: Path, layers: str | None, output: Path) -> Path:
    """Replace layers of the graph in `path` by their maps and write the directory `output`, which must be new.

    Args:
        path: an ONNX file, or a directory with one; never changed.
        maps_file: a maps file, or a run directory with one.
        layers: the layers whose maps are used ("0,7,24-29"); None means all maps.

    Raises:
        NblError: an input is missing or damaged, or `output` is occupied; nothing is written.
        RefusalError: the graph is not recognised; the message has layer and node.
    """
    refuse_occupied(output)
    if maps_file.is_dir():
        maps_file = check_inside(maps_file / MAPS_FILE, maps_file)
    check_graph_place(path)
    file = find_graph(path)
    if file.parent.resolve() in (output.resolve(), *output.resolve().parents):
        raise NblError(f"{output} lies inside {file.parent}, which must not change; choose another --output")
    stored, tap = maps_in(maps_file)
    model = load_graph(file)
    spec = decoder_facts(model.graph, find_block(model.graph, cache_layers(model.graph)[0]), config_dir_of(file))
    if spec["num_layers"] > MOST_LAYERS:
        raise NblError(f"the configuration beside {file} states {spec['num_layers']} layers; fetch the graph again")
    plan, maps = _plan(maps_file, stored, layers, tap or TAPS[0], spec)
    facts = _facts(model, file, maps_file, maps, plan)
    with friendly_os_errors(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with scratch_in(output.absolute().parent) as scratch:
            made = scratch / "made"
            _write(model, path, file, made, plan, maps)
            drop_code(made)
            write_json(made / MANIFEST, facts)
            return move_into_place(made, output)


def _plan(
    maps_file: Path, stored: tuple[int, ...], layers: str | None, tap: str, spec: dict[str, Any]
) -> tuple[Plan, dict[int, Mixer]]:
    """The plan, and the maps of its layers.

    Raises:
        NblError: no map is chosen, the file lacks a chosen map, or the maps would replace all of the graph's layers.
    """
    num_layers = spec["num_layers"]
    chosen = stored if layers is None else parse_layers(layers, num_layers)
    if isinstance(chosen, int):
        raise NblError(f"--layers {layers} is a count, but maps have no order; name the layers (0,7,24-29, or 8,)")
    missing = sorted(set(chosen) - set(stored))
    if missing:
        raise NblError(f"{maps_file} has no map of layer {missing[0]}; it has those of {', '.join(map(str, stored))}")
    if not chosen:
        raise NblError(f"{maps_file} holds no maps, so nothing would change")
    if chosen[-1] >= num_layers:
        raise NblError(f"{maps_file} has a map of layer {chosen[-1]}; this graph has layers 0 to {num_layers - 1}")
    if len(chosen) >= num_layers:
        raise NblError(f"{maps_file} has maps of all {num_layers} layers, but one must stay; choose with --layers")
    maps = load_maps(maps_file, chosen, spec["hidden_size"])
    return Plan.of(num_layers, {i: mixer.kind for i, mixer in maps.items()}, tap, "given"), maps


def _write(model: Any, path: Path, file: Path, made: Path, plan: Plan, maps: dict[int, Mixer]) -> None:
    """Write the new directory. A directory of nbl-export gets the full rewrite; another one gets a new graph file.

    With an exit layer this file gives the logits of the last token.
    """
    if (file.parent / ALL_LOGITS_FILE).is_file() or file.name == STATIC_GRAPH_FILE:
        rewrite(file.parent, made, maps, plan.tap)
        return
    files = list(companions(path, {file, *data_files(file, model)}))
    stops = continuing_tokens(mixer.reads for mixer in maps.values()) is not None
    if stops and logits_of(model.graph) != "all":
        raise RefusalError(None, "an exit layer needs the logits of all tokens, and it gives those of the last one")
    rewrite_model(model, maps, plan.tap)
    if stops:  # behind an exit layer, runtimes find the last token alone
        run_passes([PruneTail()], model)
    made.mkdir()
    for old, name in files:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(old, made / name)
    target = made / (file.relative_to(path) if path.is_dir() else file.name)
    target.parent.mkdir(exist_ok=True)
    save_graph(model, target)


def _facts(model: Any, file: Path, maps_file: Path, maps: dict[int, Mixer], plan: Plan) -> dict[str, Any]:
    """The content of the directory's nbl.json."""
    return {
        "schema": SCHEMA,
        "source": {"graph": file.name, "sha256": file_sha256(file), "producer": model.producer_name},
        "maps": {"name": maps_file.name, "sha256": file_sha256(maps_file)},
        "num_layers": plan.num_layers,
        "replaced_layers": sorted({*plan.layers, *replaced_layers(model.graph)}),
        "tap": plan.tap,
        "exit": method_of(maps).summary(maps),
        "caches": present_names(model.graph, without=cacheless(maps)),
        "versions": versions(PACKAGES),
        "nbl_export": __version__,
    }
