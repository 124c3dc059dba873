"""A model that is only a decoder graph: what a job on it can do, and what needs the torch model.

    DIR/model.onnx + tokenizer [+ genai_config.json, config.json]   ─►  moments, plan, rewrite, verification
    no torch checkpoint                                             ─►  no distillation, no greedy choice of layers

`options.options.GIVEN_GRAPH` is the name of this decoder source.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError, RefusalError
from nbl_export.graph.genai_config import check_genai_config
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE, MANIFEST
from nbl_export.records.decoder import DecoderSpec
from nbl_export.trust.contained import check_folder, check_inside, refuse_special

__all__ = [
    "check_graph_place",
    "companions",
    "copy_graph",
    "files_of",
    "graph_of",
    "has_graph",
    "home_of",
    "onnx_tools",
    "read_spec",
]

_CONFIG = GENAI_CONFIG


def graph_of(path: Path) -> Path | None:
    """The graph of a model without a torch checkpoint; None if the path has a checkpoint, or no graph.

    Raises:
        NblError: there are several graphs.
    """
    if path.is_file():
        return path if path.suffix == ".onnx" else None
    if not path.is_dir() or not has_graph(path) or any(path.glob("*.safetensors")) or any(path.glob("*.gguf")):
        return None
    return onnx_tools().files.find_graph(path)


def onnx_tools() -> Any:
    """The package `graph`, with the modules that need onnx.

    Raises:
        MissingPackageError: onnx or onnx_ir is not installed.
    """
    try:
        import nbl_export.graph.facts
        import nbl_export.graph.files
    except ImportError as error:
        raise MissingPackageError(str(error.name), "rewrite", "reading ONNX graphs") from error
    return nbl_export.graph


def files_of(graph: Path) -> list[Path]:
    """The graph's own files and its tokenizer, the input of a fingerprint.

    Raises:
        NblError: no tokenizer lies beside the graph.
        CorruptError: a file is missing or cut short.
    """
    source, home = onnx_tools().files, home_of(graph)
    tokenizer = [file for file in sorted(home.glob("tokenizer*")) if file.is_file()]
    if not tokenizer:
        raise NblError(f"{home} has no tokenizer beside {graph.name}, which calibration text needs")
    return [graph, *sorted(source.data_files(graph, source.load_graph(graph))), *tokenizer]


def read_spec(graph: Path) -> DecoderSpec:
    """Read the decoder's numbers from the graph and the configuration beside it.

    Raises:
        RefusalError: a layer is not understood, or layers have already been replaced.
        NblError: the graph does not give all logits, or a number is neither in the graph nor in the configuration.
    """
    tools = onnx_tools()
    from nbl_export.graph.anatomy import cache_layers, find_block
    from nbl_export.graph.caches import graph_states

    model = tools.files.load_graph(graph)
    if tools.facts.logits_of(model.graph) != "all":
        raise NblError(f"{graph} does not give the logits of all tokens, which verification needs; export all logits")
    layers = cache_layers(model.graph)
    if states := graph_states(model.graph):
        raise NblError(f"{graph} holds a state of layer {min(states)}, not a cache; give the checkpoint of the model")
    blocks = [find_block(model.graph, layer) for layer in layers]
    found = tools.facts.decoder_facts(model.graph, blocks, home_of(graph))
    if found["num_layers"] != len(layers) or layers != tuple(range(len(layers))):
        raise RefusalError(
            None, f"only {len(layers)} of its {found['num_layers']} layers have attention; give the original graph"
        )
    missing = [
        name for name, value in found.items() if value is None and name not in ("architecture", "sliding_window")
    ]
    if missing:
        raise NblError(f"neither {graph} nor a configuration beside it says {missing[0]}; add the model's config.json")
    full = tools.facts.full_layers(blocks)
    return DecoderSpec(**{**found, "architecture": found["architecture"] or "decoder", "full_layers": full})


def copy_graph(graph: Path, out: Path) -> None:
    """Write the original of a run: the graph as model.onnx, its data as model.onnx.data, and the files beside it.

    Raises:
        NblError: the runtimes of this run do not know the names of the caches.
    """
    tools = onnx_tools()
    from nbl_export.graph.anatomy import graph_caches

    model = tools.files.load_graph(graph)
    _check_shippable(graph, model, graph_caches(model.graph))
    data = tools.files.data_files(graph, model)
    out.mkdir()
    for file, name in companions(home_of(graph), {graph, *data}):
        if len(name.parts) == 1 and file.suffix != ".onnx":
            shutil.copyfile(file, out / name)
    if {file.name for file in data} <= {"model.onnx.data"}:
        for file, name in ((graph, GRAPH_FILE), *((file, file.name) for file in data)):
            shutil.copyfile(file, out / name)
    else:
        tools.files.save_graph(model, out / GRAPH_FILE)
    if (out / _CONFIG).is_file():
        settings = json.loads((out / _CONFIG).read_text(encoding="utf-8"))
        settings["model"]["decoder"]["filename"] = GRAPH_FILE
        (out / _CONFIG).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _check_shippable(graph: Path, model: Any, caches: dict[int, Any]) -> None:
    wanted = [f"past_key_values.{layer}.{part}" for layer in caches for part in ("key", "value")]
    names = [str(value.name) for pasts, _ in caches.values() for value in pasts]
    if names != wanted:
        raise NblError(
            f"{graph} calls its caches {names[0]}, which the runtimes of this run do not know; go on with "
            "nbl-export plan RUN, then nbl-export rewrite-graph MODEL --maps RUN/maps.safetensors --output OUT"
        )


_BESIDE_A_FILE = ("config.json", "generation_config.json", GENAI_CONFIG, "tokenizer.json", "tokenizer.model",
                  "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                  "chat_template.jinja")  # fmt: skip


def has_graph(path: Path) -> bool:
    """Whether a path is an ONNX file, or a directory that holds one; a run directory has graphs one level down."""
    return path.suffix == ".onnx" or any(any(path.glob(pattern)) for pattern in ("*.onnx", "onnx/*.onnx"))


def home_of(graph: Path) -> Path:
    """The directory of a graph's configuration and tokenizer: its own, or the parent if the graph lies in DIR/onnx."""
    inside = graph.parent.name == "onnx" and not (graph.parent / "config.json").is_file()
    return graph.parent.parent if inside else graph.parent


def check_graph_place(path: Path) -> None:
    """Check a folder, or a file and what is read beside it.

    Raises:
        CorruptError: names an entry that is a link out of the folder, a pipe, a socket or a device.
    """
    if path.is_dir():
        check_folder(path)
        return
    for file in (path, *(path.parent / name for name in _BESIDE_A_FILE)):
        refuse_special(file)
        check_inside(file, path.parent)


def companions(path: Path, skipped: set[Path]) -> Iterator[tuple[Path, Path]]:
    """Files that belong to the graph, and their names in the output.

    Raises:
        CorruptError: a file is a link that leads out of the directory.
        NblError: genai_config.json has a refused key.
    """
    check_genai_config(path.parent if path.is_file() else path)
    if path.is_file():
        files = [path.parent / name for name in _BESIDE_A_FILE if (path.parent / name).is_file()]
        directory = path.parent
    else:
        directory, files = path, [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in files:
        name = file.relative_to(directory)
        if file in skipped or str(name) == MANIFEST or any(part.startswith(".") for part in name.parts):
            continue
        yield check_inside(file, directory), name
