"""The stages that make graphs: activation-aware scales, the original and the NBL decoder, and compiled engines.

    (quantize) ─► scales ─► rescaled model ─► decoder ─► original/ ─► rewrite ─► model/, which can be deployed alone

Scales are one for each channel that matrices read, from the calibration text (`calibrate.awq`). Calibration, plan and
distillation use the model as it is. From the decoder graph on, matrices are the rescaled ones, and maps behind a norm
read the rescaled norm's output.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.files import versions, write_json
from nbl_export.graph.names import MANIFEST
from nbl_export.mixers.base import Mixer
from nbl_export.options.options import public_facts
from nbl_export.records.inputs import Lazy
from nbl_export.records.results import CheckResult
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages.common import LeftOut, Place
from nbl_export.run_directory import DECODERS, PACKAGES, SCALES_FILE
from nbl_export.targets.base import BuildSettings, ExportSettings, Target
from nbl_export.version import __version__

__all__ = ["DecoderInputs", "ExportedModel", "QuantizeInputs", "RewriteInputs", "check_rescaled", "declare_decoder",
           "declare_quantize", "declare_rewrite", "exported", "run_decoder", "run_quantize", "run_rewrite"]  # fmt: skip

METRIC = "rescaled model: max abs logit difference"
READ_TOKENS = 8192  # tokens whose magnitudes are averaged
_ROWS = 256  # rows on which the rounding is judged
_BLOCK = 32  # the GenAI builder's default
_DEPLOYED_FACTS = ("schema", "model", "decoder", "options", "calibration", "num_layers", "replaced_layers", "kinds",
                   "tap", "select", "fit", "scores", "logits")  # fmt: skip


@dataclass(frozen=True)
class QuantizeInputs:
    """What scales follow from. windows: of the calibration text. block: elements of a row with one scale."""

    method: str
    windows: Lazy[Any]
    block: int
    model: Lazy[Any]


def declare_quantize(r: Resolver) -> QuantizeInputs | LeftOut:
    """The inputs of the stage; left out without `--quantize awq`."""
    options = r.options
    if options.quantize != "awq":
        return LeftOut()
    read = max(1, READ_TOKENS // options.context)
    fewer = min(options.calibration_tokens, READ_TOKENS)  # more tokens do not change the first ones
    identity = [r.fingerprint, r.text_sha256, fewer, options.context, r.division]
    windows = Lazy(identity, lambda: r.windows.value[0][:read])
    block = next((int(w.split("=")[1]) for w in options.builder_option if w.startswith("block_size=")), _BLOCK)
    return QuantizeInputs("awq", windows, block, r.model)


def run_quantize(inputs: QuantizeInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write the scales; returns the facts for the manifest."""
    from nbl_export.calibrate.awq import choose, groups_of, observe, save_scales

    model, ids = inputs.model.value, inputs.windows.value
    groups = list(groups_of(model))
    with place.ui.task("activations") as progress:
        seen = observe(model, groups, ids, _ROWS, progress)
    with place.ui.task("scales") as progress:
        found = choose(groups, seen, inputs.block, progress)
    save_scales({name: choice.scale_C for name, choice in found.items()}, out / SCALES_FILE)
    errors = [choice.error for choice in found.values()]
    place.ui.say(
        f"  error of rounded products on its rows: {statistics.geometric_mean(errors):.2f} of plain rounding's"
    )
    about = {name: {k: v for k, v in dataclasses.asdict(c).items() if k != "scale_C"} for name, c in found.items()}
    return {"quantize": {"method": "awq", "tokens": int(ids.numel()), "rows": _ROWS, "groups": about}}


# -- the model that graphs are made from -----------------------------------------------------------------------


@dataclass(frozen=True)
class ExportedModel:
    """The run's model, or the same function with activation-aware scales (method "awq")."""

    method: str | None
    model: Lazy[Any]
    checkpoint: Lazy[Path]

    def scales(self, place: Place) -> dict[str, Any]:
        """Scales by the name of a group; none without a method."""
        from nbl_export.calibrate.awq import load_scales

        return load_scales(place.run.path / SCALES_FILE) if self.method == "awq" else {}

    def rescaled(self, place: Place) -> Any:
        """The torch model with the matrices that graphs are made from, kept until the model is forgotten."""
        from nbl_export.calibrate.awq import rescale

        scales = self.scales(place)
        if scales:
            self.model.forget()
            rescale(self.model.value, scales)
        return self.model.value

    @contextlib.contextmanager
    def directory(self, place: Place) -> Iterator[Path]:
        """A directory with the checkpoint that graphs are made from."""
        from nbl_export.targets.export.finish import add_text_files

        if self.method != "awq":
            yield self.checkpoint.value
            return
        with place.run.scratch() as scratch:
            directory = scratch / "checkpoint"
            self.rescaled(place).save_pretrained(directory)
            self.model.forget()
            add_text_files(self.checkpoint.value, directory)
            yield directory

    def maps(self, place: Place) -> dict[int, Mixer]:
        """The maps of this model: behind a norm, columns are multiplied by the norm's scale."""
        maps = place.maps()
        if place.plan.tap != "normed":
            return maps
        return _rescaled_maps(maps, self.scales(place))


def exported(r: Resolver) -> ExportedModel:
    """The model that the graphs of a run are made from."""
    return ExportedModel("awq" if r.options.quantize == "awq" else None, r.model, r.checkpoint)


def _rescaled_maps(maps: Mapping[int, Mixer], scales: Mapping[str, Any]) -> dict[int, Mixer]:
    named = {i: scales.get(f"layers.{i}.qkv") for i in maps}
    return {i: m if (scale := named[i]) is None else m.scaled_input(scale.numpy()) for i, m in maps.items()}


def check_rescaled(source: ExportedModel, place: Place, row: tuple[int, ...]) -> list[CheckResult]:
    """Check structure: the rescaled model gives the original's logits, within the float32 tolerance.

    Args:
        row: held-back token ids.
    """
    from nbl_export.verify.ladder import TOLERANCES
    from nbl_export.verify.torch_reference import row_logits

    if source.method != "awq":
        return []
    source.model.forget()
    before = row_logits(source.model.value, row)
    away = float(np.abs(row_logits(source.rescaled(place), row) - before).max())
    source.model.forget()
    allowed = TOLERANCES["fp32"].limit
    return [CheckResult("structure", "original", METRIC, away, allowed, away <= allowed, f"{len(row)} tokens")]


# -- the original ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderInputs:
    """What the original graph follows from.

    Attributes:
        engine: exports the decoder. kept_logits: "last" or "all".
        slots: most tokens of a sequence, for graphs with fixed caches.
        codes: a checkpoint with quantised matrices of the same model, or None. tap: with which it must agree.
        gguf: the file whose codes the graph takes over.
    """

    exported: ExportedModel
    engine: Lazy[Target]
    decoder_source: str
    precision: str
    builder_option: tuple[str, ...]
    kept_logits: str
    cache_length: int
    codes: Lazy[Any]
    tap: str | None
    gguf: Lazy[Path | None]


def declare_decoder(r: Resolver) -> DecoderInputs:
    """The inputs of the stage."""
    options = r.options
    tap = options.tap if options.quantized_model else None
    engine = Lazy([r.engine.capabilities.source, options.provider], lambda: r.engine)
    return r.fill(DecoderInputs, exported=exported(r), engine=engine, tap=tap)


def _codes(inputs: DecoderInputs) -> Path | None:
    """Directory of the quantised checkpoint, after a check that it is of this model; None without one."""
    from nbl_export.model.checkpoint import quantized

    found = inputs.codes.value
    if found is None or inputs.tap is None:
        return None
    quantized.check_same(found, inputs.exported.checkpoint.value, inputs.tap)
    return Path(found.directory)


def run_decoder(inputs: DecoderInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write original/."""
    inputs.exported.model.forget()  # the exporter loads its own copy
    engine = inputs.engine.value
    original = out / DECODERS["original"]
    settings = ExportSettings(
        inputs.decoder_source, inputs.precision, inputs.cache_length, inputs.builder_option, _codes(inputs),
        inputs.gguf.value,
    )  # fmt: skip
    with inputs.exported.directory(place) as checkpoint:
        engine.export(checkpoint, original, settings)
    if inputs.kept_logits == "last":
        engine.keep_last_token(original)
    return {"logits": inputs.kept_logits}


# -- the NBL decoder -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewriteInputs:
    """What the NBL graph follows from, beside plan, maps and the original graph.

    engine: replaces the layers.
    """

    exported: ExportedModel
    engine: Lazy[Target]


def declare_rewrite(r: Resolver) -> RewriteInputs:
    """The inputs of the stage."""
    engine = Lazy([r.engine.capabilities.dense_caches], lambda: r.engine)
    return r.fill(RewriteInputs, exported=exported(r), engine=engine)


def run_rewrite(inputs: RewriteInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write model/ with a manifest of its own."""
    plan, target = place.plan, out / DECODERS["nbl"]
    original = place.run.path / DECODERS["original"]
    engine = inputs.engine.value
    opened = lambda: inputs.exported.rescaled(place).cpu()  # noqa: E731  exporters trace on the CPU
    engine.linearize(original, target, plan, inputs.exported.maps(place), opened)
    inputs.exported.model.forget()  # a target may have changed it
    facts = {k: place.run.manifest[k] for k in _DEPLOYED_FACTS}
    if engine.capabilities.dense_caches:
        facts["cache_layers"] = list(plan.kept)  # layers of the cache ids 0..K-1
    facts = public_facts(facts, place.run.manifest)  # the folder may be published: no paths of this machine
    write_json(target / MANIFEST, {**facts, "versions": versions(PACKAGES), "nbl_export": __version__})
    return {"versions": {"nbl-export": __version__, **versions(PACKAGES)}}


# -- compiled engines ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildInputs:
    """What compiled engines follow from. library: its version."""

    available: Lazy[Target]
    library: str
    max_batch: int
    prefill_chunk: int


def declare_build(r: Resolver) -> BuildInputs | LeftOut:
    """The inputs of the stage; left out if the engine compiles nothing."""
    if not r.engine.capabilities.static:
        return LeftOut()
    chunk, batch = r.options.chunk(r.spec), r.options.max_batch or 1
    return r.fill(BuildInputs, library=r.engine.library_version(), max_batch=batch, prefill_chunk=chunk)


def run_build(inputs: BuildInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write engine/; returns the records of the engines for the manifest."""
    engine = inputs.available.value
    settings, engines = BuildSettings(inputs.max_batch, inputs.prefill_chunk), {}
    for subject, name in DECODERS.items():
        with place.ui.task(f"compiling {name}"):
            record = engine.build(place.run.path / name, out / "engine" / name, settings)
        place.ui.say(f"  {name}: {record['plan_bytes'] / 2**20:,.0f} MiB in {record['build_seconds']:.1f} s")
        engines[subject] = {k: v for k, v in record.items() if k not in ("inputs", "outputs", "schema")}
    return {"engines": engines, "status": place.verdict}
