"""The bench stage: both decoders measured side by side."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.files import write_json
from nbl_export.graph.names import GENAI_CONFIG
from nbl_export.measure.benchmark import BenchSetting, side_by_side
from nbl_export.measure.cost import CostModel, map_sizes
from nbl_export.measure.roofline import limits_of
from nbl_export.measure.rounds import Variant
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages.common import LeftOut, Place
from nbl_export.run_directory import BENCH_FILE, DECODERS
from nbl_export.targets.base import Target

__all__ = ["BenchInputs", "declare", "run"]


@dataclass(frozen=True)
class BenchInputs:
    """What is measured, beside the graphs; names as in the options. limits: costs for the limits of the hardware."""

    available: Lazy[Target]
    engine_name: str
    provider: str
    precision: str
    spec: DecoderSpec
    cache_length: int
    depths: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    generate_tokens: int | None
    threads: tuple[int, ...] | None
    batches: tuple[int, ...]
    repetitions: int | None
    limits: Lazy[CostModel]


def declare(r: Resolver) -> BenchInputs | LeftOut:
    """The inputs of the stage; left out if the graphs do not run on this machine or in the timed runtime."""
    if r.is_graph and not (r.run.path / DECODERS["original"] / GENAI_CONFIG).is_file():
        return LeftOut("ONNX Runtime GenAI cannot time the model, which has no genai_config.json")
    if r.engine.capabilities.cross:
        found = r.engine.probe_run()
        if not found.available:
            return LeftOut(f"the graphs do not run on this machine: {found.reason}")
    return r.fill(BenchInputs, limits=Lazy(None, lambda: r.cost.value))


def run(inputs: BenchInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write bench.json."""
    engine, spec = inputs.available.value, inputs.spec
    capabilities = engine.capabilities
    setting = BenchSetting(
        vocab_size=spec.vocab_size,
        context_length=inputs.cache_length,
        engine=inputs.engine_name,
        provider=inputs.provider,
        threads=engine.default_threads(),
        gpu=capabilities.static or inputs.provider != "cpu",
    )
    root = place.run.path / ("engine" if capabilities.static else "")
    token_bytes = functools.partial(spec.cache_bytes_per_token, itemsize=capabilities.cache_itemsize(inputs.precision))
    variants = {
        subject: Variant(root / name, engine.open_runner, token_bytes(kept))
        for (subject, name), kept in zip(DECODERS.items(), (spec.num_layers, len(place.plan.kept)), strict=True)
    }
    with place.ui.task("rounds") as progress:
        result = side_by_side(variants, inputs, setting, progress, place.ui.say)
    said = {subject: engine.arithmetic(variant.directory) for subject, variant in variants.items()}
    arithmetic = {"arithmetic": said} if any(said.values()) else {}
    write_json(out / BENCH_FILE, {**result, **_limits(inputs, place, result), **arithmetic})
    return {"status": place.verdict}


def _limits(inputs: BenchInputs, place: Place, bench: Mapping[str, Any]) -> dict[str, Any]:
    if not inputs.available.value.capabilities.measures_limits:
        return {}
    return limits_of(bench, lambda: inputs.limits.value, map_sizes(place.maps()), inputs.precision)
