"""Values that follow from options and decoder: engine, cache slots, prefill chunk, and paths of the inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nbl_export.cost import model
from nbl_export.graph.given import GIVEN
from nbl_export.model.checkpoint.nbl import GIVEN_FIT
from nbl_export.model.checkpoint.source import Source, gguf_of
from nbl_export.records.asked import Case
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.options import JobOptions
from nbl_export.run_directory import RunDirectory
from nbl_export.targets import load_engine
from nbl_export.targets.base import Target
from nbl_export.text.corpus import Text
from nbl_export.text.mixture import absolute_sources

__all__ = ["case_of", "chunk_of", "cost_model", "engine_of", "identity_of", "located", "slots_of"]

DEFAULT_SLOTS, DEFAULT_CHUNK = 2048, 512


def engine_of(options: JobOptions) -> Target:
    """The engine of the options."""
    return load_engine(options.engine, options.provider)


def case_of(options: JobOptions, *, sweeps: bool = False, place: str | None = None) -> Case:
    """What decides which options apply.

    Args:
        place: path of the model, if a run has recorded one.
    """
    capabilities = engine_of(options).capabilities
    return Case(
        options,
        compiles=capabilities.static,
        proposes=bool(capabilities.proposers),
        is_graph=options.decoder_source == GIVEN,
        is_gguf=gguf_of(Path(place or options.model).expanduser()) is not None,
        is_nbl=options.fit == GIVEN_FIT,
        sweeps=sweeps,
    )


def slots_of(options: JobOptions, spec: DecoderSpec) -> int:
    """See `Job.slots`."""
    if not engine_of(options).capabilities.static:
        return spec.max_positions
    return options.max_seq_len or min(DEFAULT_SLOTS, spec.max_positions)


def chunk_of(options: JobOptions, spec: DecoderSpec) -> int:
    """Most prefill tokens in one step of a compiled engine."""
    return options.prefill_chunk or min(DEFAULT_CHUNK, slots_of(options, spec))


def located(options: JobOptions, run: RunDirectory) -> JobOptions:
    """Options with the recorded absolute paths of model and texts, so that the working directory does not matter."""
    places = run.manifest.get("places", {})
    texts = places.get("calibration") or options.calibration
    noted, quantized = run.manifest.get("quantized") or {}, options.quantized_model
    return dataclasses.replace(
        options,
        model=places.get("model") or options.model,
        quantized_model=(noted.get("place") if quantized == noted.get("name") else None) or quantized,
        calibration=tuple(texts),
    )


def cost_model(options: JobOptions, spec: DecoderSpec, checkpoint: Path, *, token_table: bool) -> model.CostModel:
    """The cost model of the shipped graphs.

    Args:
        checkpoint: a directory with the model's config.json.
    """
    capabilities = engine_of(options).capabilities
    size = model.weight_bytes(options.precision)
    return model.CostModel(
        spec,
        model.read_intermediate_size(checkpoint),
        size,
        2.0 if capabilities.static and options.precision == "int4" else size,  # the static form keeps its head in fp16
        capabilities.cache_itemsize(options.precision),
        options.prompt_length,
        all_logits=options.kept_logits == "all",
        tail_pruned=options.kept_logits == "last",
        token_table=token_table,
    )


def identity_of(
    options: JobOptions, source: Source, spec: DecoderSpec, text: Text, hub: dict[str, Any]
) -> dict[str, Any]:
    """The manifest's facts about model, decoder and calibration text, with their paths.

    Args:
        hub: facts about the hub datasets in the text, see `text.kept`.
    """
    return {
        "model": {
            "name": options.model,
            "title": source.title,
            "revision": source.revision,
            "architecture": spec.architecture,
            "fingerprint": source.fingerprint,
        },
        "decoder": dataclasses.asdict(spec),
        "calibration": {
            "tokens": options.calibration_tokens,
            "context": options.context,
            "name": text.name,
            "sha256": text.sha256,
            "parts": [dataclasses.asdict(part) for part in text.parts],
            "hub": hub,
        },
        "places": {"model": source.place, "calibration": absolute_sources(options.calibration)},
        "num_layers": spec.num_layers,
    }
