"""A model that is nothing but a decoder graph: what a job on it can do, and what needs the torch model.

    DIR/model.onnx + tokenizer [+ genai_config.json, config.json]   ─►  moments, plan, rewrite, verification
    no torch checkpoint                                             ─►  no distillation, no greedy choice of layers

`GIVEN` is the decoder source of such a job.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError, RefusalError, UsageError
from nbl_export.records import DecoderSpec, JobOptions

__all__ = ["GIVEN", "adapted", "check_given", "copy_graph", "files_of", "graph_of", "read_spec", "refuse_changes"]

GIVEN = "given"
PRECISIONS = ("fp32", "fp16", "int8", "int4")
_CONFIG = "genai_config.json"


def graph_of(path: Path) -> Path | None:
    """The graph of a model that has no torch checkpoint; None where there is one, or no graph.

    Raises:
        NblError: there are several graphs.
    """
    from nbl_export.given_graph import has_graph

    if path.is_file():
        return path if path.suffix == ".onnx" else None
    if not path.is_dir() or not has_graph(path) or any(path.glob("*.safetensors")) or any(path.glob("*.gguf")):
        return None
    return _onnx().source.find_graph(path)


def _onnx() -> Any:
    try:
        import nbl_export.rewrite.facts
        import nbl_export.rewrite.source
    except ImportError as error:
        raise MissingPackageError(str(error.name), "rewrite", "reading ONNX graphs") from error
    return nbl_export.rewrite


def files_of(graph: Path) -> list[Path]:
    """The graph's own files and its tokenizer, of which a fingerprint is made.

    Raises:
        NblError: it has no tokenizer beside it.
        CorruptError: a file is missing or cut.
    """
    from nbl_export.given_graph import home_of

    source, home = _onnx().source, home_of(graph)
    tokenizer = [file for file in sorted(home.glob("tokenizer*")) if file.is_file()]
    if not tokenizer:
        raise NblError(f"{home} has no tokenizer beside {graph.name}, which calibration text needs")
    return [graph, *sorted(source.data_files(graph, source.load_graph(graph))), *tokenizer]


def read_spec(graph: Path) -> DecoderSpec:
    """The decoder's numbers, from the graph and what lies beside it.

    Raises:
        RefusalError: a layer is not understood, or layers have been replaced already.
        NblError: neither graph nor configuration say a number.
    """
    rewriting = _onnx()
    from nbl_export.given_graph import home_of
    from nbl_export.rewrite.anatomy import cache_layers, find_block

    model = rewriting.source.load_graph(graph)
    if rewriting.facts.logits_of(model.graph) != "all":
        raise NblError(f"{graph} does not give the logits of all tokens, which verification needs; export it so")
    layers = cache_layers(model.graph)
    blocks = [find_block(model.graph, layer) for layer in layers]
    found = rewriting.facts.decoder_facts(model.graph, blocks, home_of(graph))
    if layers != tuple(range(found["num_layers"])):
        raise RefusalError(
            None, f"of its {found['num_layers']} layers only {len(layers)} have attention; give the original"
        )
    missing = [
        name for name, value in found.items() if value is None and name not in ("architecture", "sliding_window")
    ]
    if missing:
        raise NblError(f"neither {graph} nor a configuration beside it says {missing[0]}; add the model's config.json")
    full = rewriting.facts.full_layers(blocks)
    return DecoderSpec(**{**found, "architecture": found["architecture"] or "decoder", "full_layers": full})


def adapted(options: JobOptions) -> JobOptions:
    """Options of a job whose model is a graph: its source, and the precision that it has. Others as they are.

    Raises:
        UsageError: another precision is asked for.
        NblError: the graph is not one that this tool works on.
    """
    graph = graph_of(Path(options.model).expanduser())
    if graph is None:
        if options.decoder_source == GIVEN:
            raise UsageError(f"--decoder-source {GIVEN} is for a model that is an ONNX graph; leave it out")
        return options
    from nbl_export.given_graph import describe_graph

    _check_engine(options)
    precision = describe_graph(graph)["precision"]
    if precision not in PRECISIONS:
        raise NblError(f"the matrices of {graph} are {precision}; those of a model are {', '.join(PRECISIONS)}")
    if options.precision not in (precision, "fp32"):
        raise UsageError(f"--precision {options.precision}: {graph} is {precision}, and stays so; leave it out")
    return dataclasses.replace(options, decoder_source=GIVEN, precision=precision)


def check_given(options: JobOptions) -> None:
    """Refuse what needs the torch model.

    Raises:
        UsageError: which option.
    """
    wants = {
        "--fit distilled": options.fit == "distilled", "--select greedy": options.select == "greedy",
        "--method wo-wv": options.method == "wo-wv", "--data-free": options.data_free,
        "--max-perplexity-increase": options.max_perplexity_increase is not None, "--layer-wise": options.layer_wise,
    }  # fmt: skip
    asked = [name for name, wanted in wants.items() if wanted]
    if asked:
        raise UsageError(f"{asked[0]} needs the torch model, and {options.model} is an ONNX graph; give the checkpoint")
    _check_engine(options)
    others = ("max_seq_len", "max_batch", "prefill_chunk", "builder_option", "quantized_model")
    idle = [name for name in others if getattr(options, name)]
    if options.map_bits is not None and options.precision not in ("int8", "int4"):
        idle.append("map_bits")
    if idle:
        flag = f"--{idle[0].replace('_', '-')}"
        raise UsageError(f"{flag} has nothing to do on {options.model}, which is an ONNX graph of {options.precision}")


def _check_engine(options: JobOptions) -> None:
    if options.engine != "ort" or options.provider != "cpu":
        raise UsageError(f"{options.model} is an ONNX graph, which only --engine ort with --provider cpu takes")


def refuse_changes(recorded: JobOptions, options: JobOptions) -> None:
    """A run on a graph stays one, at its precision; any other does not become one.

    Raises:
        UsageError: it would change.
    """
    if GIVEN not in (recorded.decoder_source, options.decoder_source):
        return
    for name in ("decoder_source", "precision"):
        if getattr(recorded, name) != getattr(options, name):
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)} cannot be chosen for this run's graph"
            )


def copy_graph(graph: Path, out: Path) -> None:
    """The original of a run: the graph as model.onnx, its data as model.onnx.data, and the files beside it.

    Raises:
        NblError: its caches are called what this run's runtimes do not know.
    """
    rewriting = _onnx()
    from nbl_export.given_graph import companions, home_of
    from nbl_export.rewrite.anatomy import graph_caches

    model = rewriting.source.load_graph(graph)
    _check_shippable(graph, model, graph_caches(model.graph))
    data = rewriting.source.data_files(graph, model)
    out.mkdir()
    for file, name in companions(home_of(graph), {graph, *data}):
        if len(name.parts) == 1 and file.suffix != ".onnx":
            shutil.copyfile(file, out / name)
    if {file.name for file in data} <= {"model.onnx.data"}:
        for file, name in ((graph, "model.onnx"), *((file, file.name) for file in data)):
            shutil.copyfile(file, out / name)
    else:
        rewriting.source.save_graph(model, out / "model.onnx")
    if (out / _CONFIG).is_file():
        settings = json.loads((out / _CONFIG).read_text(encoding="utf-8"))
        settings["model"]["decoder"]["filename"] = "model.onnx"
        (out / _CONFIG).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _check_shippable(graph: Path, model: Any, caches: dict[int, Any]) -> None:
    wanted = [f"past_key_values.{layer}.{part}" for layer in caches for part in ("key", "value")]
    names = [str(value.name) for pasts, _ in caches.values() for value in pasts]
    if names != wanted:
        raise NblError(
            f"{graph} calls its caches {names[0]}, which the runtimes of this run do not know; go on with "
            "nbl-export plan RUN, then nbl-export rewrite --onnx MODEL --maps RUN/maps.safetensors --output OUT"
        )
