"""The NBL version of a decoder graph that exists already, whoever exported it: no checkpoint, no torch.

DIR (or FILE.onnx) + maps.safetensors  ─►  recognise ─► rewrite ─►  OUT, renamed into place when it is whole
                                                                    nbl.json says what was done to what
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbl_export import __version__
from nbl_export.artifacts import (
    SCHEMA,
    file_sha256,
    friendly_os_errors,
    move_into_place,
    refuse_occupied,
    versions,
    write_json,
)
from nbl_export.contained import check_inside, refuse_links_out
from nbl_export.errors import MissingPackageError, NblError, UsageError
from nbl_export.genai_config import check_genai_config
from nbl_export.plain_files import refuse_special
from nbl_export.plan import load_maps, maps_in, parse_layers
from nbl_export.records import TAPS, AffineMap, Plan

__all__ = ["companions", "describe_graph", "has_graph", "home_of", "rewrite_given"]

_PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "safetensors", "numpy")
_BESIDE_A_FILE = ("config.json", "generation_config.json", "genai_config.json", "tokenizer.json", "tokenizer.model",
                  "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                  "chat_template.jinja")  # fmt: skip


def has_graph(path: Path) -> bool:
    """Whether a path is an ONNX file, or a directory that holds one (a run directory has them one level down)."""
    return path.suffix == ".onnx" or any(any(path.glob(pattern)) for pattern in ("*.onnx", "onnx/*.onnx"))


def home_of(graph: Path) -> Path:
    """Where configuration and tokenizer of a graph lie: its directory, or that above where it is in DIR/onnx."""
    inside = graph.parent.name == "onnx" and not (graph.parent / "config.json").is_file()
    return graph.parent.parent if inside else graph.parent


def describe_graph(path: Path) -> dict[str, Any]:
    """What is recognised in a graph, see `rewrite.facts.graph_facts`.

    Raises:
        NblError: no graph, not a whole one, or not a decoder with caches.
    """
    source = _need_onnx()
    _check_folder(path)
    file = source.find_graph(path)
    from nbl_export.rewrite.facts import graph_facts

    model = source.load_graph(file)
    size = file.stat().st_size + sum(data.stat().st_size for data in source.data_files(file, model))
    return {"graph": str(file), "bytes": size, **graph_facts(model, home_of(file))}


def rewrite_given(
    path: Path, maps_file: Path, layers: str | None, tap: str | None, output: Path, *, map_bits: int | None = None
) -> Path:
    """Replace layers of the graph in `path` by their maps and write the directory `output`, which must be new.

    Args:
        path: an ONNX file, or a directory that holds one; never changed.
        layers: which of the maps ("0,7,24-29"); None is all of them.
        tap: what the maps act on; None is what the maps file says.
        map_bits: of the maps in an int8 or int4 graph, 32 for float32; None is as its other matrices.

    Raises:
        NblError: something is missing, damaged or in the way; nothing is written.
        RefusalError: the graph is not understood, with layer and node.
    """
    source = _need_onnx()
    from nbl_export.rewrite.anatomy import cache_layers, find_block
    from nbl_export.rewrite.facts import decoder_facts

    refuse_occupied(output)
    _check_folder(path)
    file = source.find_graph(path)
    _refuse_inside(output, file.parent)
    stored, stated = maps_in(maps_file)
    model = source.load_graph(file)
    spec = decoder_facts(model.graph, [find_block(model.graph, cache_layers(model.graph)[0])], home_of(file))
    plan, maps = _plan(maps_file, stored, layers, _tap(tap, stated, maps_file), spec["num_layers"])
    _check_width(spec["hidden_size"], maps, maps_file)
    facts = _facts(model, file, maps_file, maps, plan)
    with friendly_os_errors(output):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=output.absolute().parent))
        try:
            made = scratch / "made"
            _write(model, path, file, made, plan, maps, map_bits)
            write_json(made / "nbl.json", facts)
            return move_into_place(made, output)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _check_folder(path: Path) -> None:
    """Nothing that is read of a folder, or beside a file, leads elsewhere or has no end.

    Raises:
        CorruptError: which entry.
    """
    beside = () if path.is_dir() else [path.parent / name for name in _BESIDE_A_FILE]
    for place in (path, *beside):
        refuse_special(place)
    if path.is_dir():
        refuse_links_out(path)
    for file in beside:
        check_inside(file, path.parent)


def _need_onnx() -> Any:
    try:
        from nbl_export.rewrite import source
    except ImportError as error:
        raise MissingPackageError(str(error.name), "rewrite", "reading ONNX graphs") from error
    return source


def _refuse_inside(output: Path, directory: Path) -> None:
    here = directory.resolve()
    if here in (output.resolve(), *output.resolve().parents):
        raise NblError(f"{output} lies inside {directory}, which is only read; choose another --output")


def _tap(asked: str | None, stated: str | None, maps_file: Path) -> str:
    if asked is not None and asked not in TAPS:
        raise UsageError(f"--tap is {' or '.join(TAPS)}, not {asked!r}")
    if asked and stated and asked != stated:
        raise NblError(f"{maps_file} holds maps of the {stated} tap, not of {asked}; leave --tap out")
    return asked or stated or TAPS[0]


def _plan(
    maps_file: Path, stored: tuple[int, ...], layers: str | None, tap: str, num_layers: int
) -> tuple[Plan, dict[int, AffineMap]]:
    """Which maps are put in, and what they are.

    Raises:
        NblError: none, one that the file does not hold, or all of the graph's layers.
    """
    chosen = stored if layers is None else parse_layers(layers, num_layers)
    if isinstance(chosen, int):
        raise NblError(f"--layers {layers} is a count, and maps have no order; name the layers (0,7,24-29, or 8,)")
    missing = sorted(set(chosen) - set(stored))
    if missing:
        raise NblError(f"{maps_file} has no map of layer {missing[0]}; it has those of {', '.join(map(str, stored))}")
    if not chosen:
        raise NblError(f"{maps_file} holds no maps, so nothing would change")
    if chosen[-1] >= num_layers:
        raise NblError(f"{maps_file} has a map of layer {chosen[-1]}; this graph has layers 0 to {num_layers - 1}")
    if len(chosen) >= num_layers:
        raise NblError(f"{maps_file} has maps of all {num_layers} layers, of which one must stay; choose with --layers")
    return Plan(num_layers, tuple(chosen), tap, "given"), load_maps(maps_file, chosen)


def _check_width(width: int | None, maps: dict[int, AffineMap], maps_file: Path) -> None:
    for layer, affine in maps.items():
        if width is not None and affine.weight.shape != (width, width):
            size = " x ".join(map(str, affine.weight.shape))
            raise NblError(f"{maps_file}: the map of layer {layer} is {size}, the graph is {width} wide")


def companions(path: Path, skipped: set[Path]) -> Iterator[tuple[Path, Path]]:
    """Files that go with the graph, and their names in the output.

    Raises:
        CorruptError: one is a link that leads out of the directory.
        NblError: the settings for ONNX Runtime GenAI are not to be handed on.
    """
    check_genai_config(path.parent if path.is_file() else path)
    if path.is_file():
        files = [path.parent / name for name in _BESIDE_A_FILE if (path.parent / name).is_file()]
        directory = path.parent
    else:
        directory, files = path, [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        name = file.relative_to(directory)
        if file in skipped or str(name) == "nbl.json" or any(part.startswith(".") for part in name.parts):
            continue
        yield check_inside(file, directory), name


def _write(
    model: Any, path: Path, file: Path, made: Path, plan: Plan, maps: dict[int, AffineMap], map_bits: int | None
) -> None:
    """The new directory: one of ours as it is always rewritten, any other with the graph in its place."""
    from nbl_export.engines.onnx_decoder import ALL_LOGITS_FILE
    from nbl_export.rewrite import rewrite, rewrite_model, source

    if (file.parent / ALL_LOGITS_FILE).is_file() or file.name == "decoder.onnx":
        rewrite(file.parent, made, plan, maps, map_bits=map_bits)
        return
    files = list(companions(path, {file, *source.data_files(file, model)}))
    rewrite_model(model, plan, maps, map_bits)
    made.mkdir()
    for old, name in files:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(old, made / name)
    target = made / (file.relative_to(path) if path.is_dir() else file.name)
    target.parent.mkdir(exist_ok=True)
    source.save_graph(model, target)


def _facts(model: Any, file: Path, maps_file: Path, maps: dict[int, AffineMap], plan: Plan) -> dict[str, Any]:
    """What nbl.json says of the directory."""
    from nbl_export.rewrite.cache_pairs import present_names
    from nbl_export.rewrite.facts import replaced_layers

    return {
        "schema": SCHEMA,
        "source": {"graph": file.name, "sha256": file_sha256(file), "producer": model.producer_name},
        "maps": {"name": maps_file.name, "sha256": file_sha256(maps_file), "ranks": _ranks(maps)},
        "num_layers": plan.num_layers,
        "replaced_layers": sorted({*plan.replaced, *replaced_layers(model.graph)}),
        "tap": plan.tap,
        "caches": present_names(model.graph, without=plan.replaced),
        "versions": versions(_PACKAGES),
        "nbl_export": __version__,
    }


def _ranks(maps: dict[int, AffineMap]) -> dict[str, int]:
    return {str(layer): m.up.shape[1] for layer, m in maps.items() if m.up is not None}
