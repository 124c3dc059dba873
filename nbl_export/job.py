"""One job on one run directory: its options, and what stages share, fetched when first needed.

The torch model, the calibration text and even the checkpoint's files are touched only by stages that need
them, so that `bench` and `report` work on a machine that has neither torch nor the checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from pathlib import Path
from typing import Any

from nbl_export import nbl_checkpoint
from nbl_export.architectures import check_asked
from nbl_export.artifacts import RunDirectory, key_of
from nbl_export.engines import load_engine
from nbl_export.errors import NblError
from nbl_export.goals import check_size
from nbl_export.graph_source import GIVEN
from nbl_export.held_back import FAR_ROLES, NEAR_ROLES, Division, divide, far_tokens, held_back_tokens
from nbl_export.mixture import absolute_sources
from nbl_export.plan import parse_layers
from nbl_export.progress import Ui
from nbl_export.records import DecoderSpec, JobOptions, Plan

__all__ = [
    "OF_CALIBRATE",
    "Job",
    "check_options",
    "chunk_of",
    "describe_command",
    "engine_of",
    "located",
    "slots_of",
]

DEFAULT_SLOTS, DEFAULT_CHUNK = 2048, 512
_LEAST_SLOTS = 32
_MEMORY_SHARE = 0.6  # of the available memory that the weights may take
OF_CALIBRATE = (
    "calibration",
    "data_free",
    "seed",
    "calibration_tokens",
    "context",
    "tap",
    "shard",
    "layer_wise",
)  # options


class Job:
    """Options, run directory and the lazily fetched parts."""

    def __init__(self, options: JobOptions, run: RunDirectory, ui: Ui, evaluation: Any = None) -> None:
        self.options = options
        self.run = run
        self.ui = ui
        self.sweep_to: int | None = None  # the most layers of a sweep, where one is asked for
        self.evaluation = evaluation

    @property
    def engine(self) -> Any:
        return engine_of(self.options)

    @property
    def slots(self) -> int:
        """Tokens that a sequence can have: the model's positions, or the length of fixed caches."""
        return slots_of(self.options, self.spec)

    @property
    def has_token_table(self) -> bool:
        """Whether graphs look up what replaced layers at the bottom of the stack make of a token.

        A graph that was given has no torch model to say what that is.
        """
        return self.options.token_table and self.graph is None

    # -- identity: from the manifest where it knows, else from the files -----------------------------------

    @property
    def fingerprint(self) -> str:
        return str(self.run.manifest["model"]["fingerprint"])

    @property
    def text_sha256(self) -> str:
        return str(self.run.manifest["calibration"]["sha256"])

    @property
    def spec(self) -> DecoderSpec:
        return DecoderSpec(**self.run.manifest["decoder"])

    def check_inputs(self) -> None:
        """Read what can be read of model and text without loading them, and hold the options against it. Those of an
        NBL checkpoint say from here on that it is one.

        Raises:
            NblError: missing, damaged or unsupported, or options that do not fit.
        """
        self.options = nbl_checkpoint.adapted(self.options, self.source)
        self.text, self.quantized  # noqa: B018  reading them is the check
        check_options(self.options, self.read_spec)

    def identify(self) -> None:
        """Note who we are in the manifest; a new directory gets one at once.

        Raises:
            NblError: the directory belongs to another model.
        """
        known = self.run.manifest.get("model")
        if known and known["fingerprint"] != self.source.fingerprint and self.run.stages:
            raise NblError(
                f"{self.run.path} holds a run of {known['name']}, not of this {self.source.name}; "
                "use another --output, or start over with --force"
            )
        spec, source, options = self.read_spec, self.source, self.options
        measured = {"tokens": options.calibration_tokens, "context": options.context}
        self.run.note(
            model={
                "name": options.model,
                "title": source.title,
                "revision": source.revision,
                "architecture": spec.architecture,
                "fingerprint": source.fingerprint,
            },
            decoder=dataclasses.asdict(spec),
            calibration={
                **measured,
                **self.run.manifest.get("calibration", {}),
                "name": self.text.name,
                "sha256": self.text.sha256,
                "parts": [dataclasses.asdict(part) for part in self.text.parts],
            },
            places={"model": source.place, "calibration": absolute_sources(options.calibration)},
            num_layers=spec.num_layers,
        )
        self.note_options(options)
        self.note_quantized()
        if not known:
            self.run.save()

    def note_options(self, options: JobOptions) -> None:
        """Note options and the command line that asks for them."""
        self.run.note(options=options.to_json(), command=describe_command(options, self.run.path))

    # -- parts ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def source(self) -> Any:
        from nbl_export import checkpoint

        return checkpoint.resolve(self.options.model)

    @functools.cached_property
    def read_spec(self) -> DecoderSpec:
        """The decoder's numbers, from the manifest where it is of the same model (transformers takes seconds)."""
        from nbl_export import checkpoint

        if self.run.manifest and self.fingerprint == self.source.fingerprint:
            return self.spec
        return checkpoint.read_spec(self.source)

    @functools.cached_property
    def quantized(self) -> Any:
        """The checkpoint whose codes int4 graphs are made of; None where the builder quantises."""
        from nbl_export import quantized

        name = self.options.quantized_model
        return None if name is None else quantized.find(name, self.read_spec)

    @property
    def codes(self) -> list[str]:
        """What a decoder graph depends on beside the model's own weights."""
        return [self.run.manifest["quantized"]["fingerprint"]] if self.options.quantized_model else []

    def note_quantized(self) -> None:
        """Note the quantised checkpoint as it is now: where `located` finds it, and what `codes` knows it by."""
        from nbl_export import quantized

        if self.quantized is not None:
            self.run.note(quantized={"name": self.options.quantized_model, **quantized.describe(self.quantized)})

    @functools.cached_property
    def text(self) -> Any:
        from nbl_export import corpus, mixture

        if self.options.data_free:
            name = f"sampled from the model itself (seed {self.options.seed}, temperature 1)"
            return corpus.Text(name, key_of("sampled", self.source.fingerprint, self.options.seed), ())
        return mixture.read_texts(self.options.calibration)

    @functools.cached_property
    def checkpoint(self) -> Path:
        """A directory with safetensors and tokenizer."""
        from nbl_export import checkpoint

        if self.source.fingerprint != self.fingerprint:
            raise NblError(f"{self.options.model} is not the model that {self.run.path} was made from; restore it")
        return checkpoint.materialise(self.source, self.run.path / "checkpoint")

    @functools.cached_property
    def windows(self) -> tuple[Any, Any]:
        """Token windows for calibration, and held back ones."""
        from nbl_export import checkpoint, corpus

        if self.text.sha256 != self.text_sha256:
            raise NblError(f"the calibration text {self.text.name} has changed since this run; restore it")
        if self.options.data_free:
            return self._sampled
        tokenizer = checkpoint.load_tokenizer(self.checkpoint)
        options, size = self.options, self.spec.vocab_size
        held_back = held_back_tokens(options.context)
        return corpus.pack(self.text, tokenizer, options.calibration_tokens, options.context, held_back, size)

    @functools.cached_property
    def held_back(self) -> Division:
        """The held back windows by what they are for."""
        return divide(self.windows[1], NEAR_ROLES)

    @functools.cached_property
    def training_windows(self) -> Any:
        """Token windows to distil on: those of calibration, and more of the same text."""
        from nbl_export import checkpoint, corpus

        windows, _ = self.windows
        if self.options.data_free:
            return windows
        tokenizer = checkpoint.load_tokenizer(self.checkpoint)
        held_back = held_back_tokens(self.options.context)
        return corpus.extend(windows, self.text, tokenizer, self.options.distill_tokens, held_back)

    @functools.cached_property
    def far_text(self) -> Any:
        """A text that nobody calibrates on, and that is on every machine."""
        from nbl_export import corpus

        return corpus.stdlib_text()

    @functools.cached_property
    def far(self) -> Division | None:
        """Windows of that text by what they are for; None where it is the text of calibration, or where its windows
        are too few for that."""
        from nbl_export import checkpoint, corpus

        if self.far_text.sha256 == self.text_sha256:
            return None
        tokenizer, context = checkpoint.load_tokenizer(self.checkpoint), self.options.context
        rows, _ = corpus.pack(self.far_text, tokenizer, far_tokens(context), context, vocab_size=self.spec.vocab_size)
        return divide(rows, FAR_ROLES) if len(rows) >= len(FAR_ROLES) else None

    def texts(self, part: str) -> list[tuple[str, Any]]:
        """Name and windows of one part of both texts.

        Args:
            part: "deciding", "choosing" or "final", as `held_back` has them.
        """
        found = [(f"held back from {self.text.name}", getattr(self.held_back, part))]
        if self.far is not None:
            found.append((f"{self.far_text.name} (not calibrated on)", getattr(self.far, part)))
        return found

    @property
    def _sampled(self) -> tuple[Any, Any]:
        """Windows that the model says itself; sampled once and kept in the run directory."""
        from nbl_export import sampling

        context, path = self.options.context, self.run.path / "sampled.safetensors"
        wanted, held = max(1, -(-self.options.calibration_tokens // context)), held_back_tokens(context) // context
        key = key_of(self.text_sha256, wanted, held, context)
        ids = sampling.load_windows(path, key)
        if ids is None:
            with self.ui.task("sampling") as progress:
                ids = sampling.sample_windows(self.model, wanted + held, context, self.options.seed, progress)
            sampling.save_windows(ids, key, path)
        return ids[:wanted], ids[wanted:]

    @property
    def graph(self) -> Path | None:
        """The decoder graph, where that is all there is of the model."""
        return self.source.graph if self.options.decoder_source == GIVEN else None

    @functools.cached_property
    def model(self) -> Any:
        """The torch model. `del job.model` frees it.

        Raises:
            NblError: there is only a graph.
        """
        from nbl_export import allocator, checkpoint

        if self.graph is not None:
            raise NblError(f"this needs the torch model, and {self.options.model} is an ONNX graph")

        allocator.keep_freed_memory()
        return checkpoint.load_model(self.checkpoint)

    @functools.cached_property
    def shortage(self) -> str:
        """Why the torch model is too large for this machine's memory, in words; "" where it is not."""
        import psutil

        from nbl_export import layerwise

        if self.graph is not None:  # its weights stay in their file
            return ""
        needed, available = layerwise.float32_bytes(self.checkpoint), psutil.virtual_memory().available
        if "model" in self.__dict__ or needed <= _MEMORY_SHARE * available:
            return ""
        return f"{needed / 2**30:.1f} GiB in float32, {available / 2**30:.1f} GiB of memory available"

    @functools.cached_property
    def request(self) -> int | tuple[int, ...]:
        return parse_layers(self.options.layers, self.spec.num_layers)

    @property
    def plan(self) -> Plan:
        """The plan that the manifest records."""
        from nbl_export.records import LayerScore

        facts = self.run.manifest
        scores = tuple(LayerScore(**score) for score in facts["scores"])
        return Plan(facts["num_layers"], tuple(facts["replaced_layers"]), facts["tap"], facts["select"], scores)


def engine_of(options: JobOptions) -> Any:
    """The engine that options ask for."""
    return load_engine(options.engine, options.provider)


def check_options(options: JobOptions, spec: DecoderSpec) -> None:
    """Hold options against the decoder that they are for.

    Raises:
        NblError: layers it does not have, or more tokens than it has positions for.
    """
    parse_layers(options.layers, spec.num_layers)
    check_size(options, spec)
    if options.decoder_source != GIVEN:  # a graph says itself what it has
        check_asked(options, spec.architecture)
    engine = engine_of(options)
    if engine.CAPABILITIES.static:
        engine.check_model(spec, options.precision)
        _check_lengths(options, spec)
    if options.context > spec.max_positions:
        raise NblError(f"--context {options.context} is beyond the model's {spec.max_positions} positions")
    shortest = min(options.depths) + min(*options.prompt_tokens, options.generate_tokens)
    if shortest > slots_of(options, spec):
        raise NblError(
            f"nothing to measure: the shortest test ends at {shortest} tokens, the model has {slots_of(options, spec)} "
            "positions; use a smaller --depth, --prompt-tokens or --generate-tokens"
        )


def slots_of(options: JobOptions, spec: DecoderSpec) -> int:
    """See `Job.slots`."""
    if not engine_of(options).CAPABILITIES.static:
        return spec.max_positions
    return options.max_seq_len or min(DEFAULT_SLOTS, spec.max_positions)


def chunk_of(options: JobOptions, spec: DecoderSpec) -> int:
    """Most prefill tokens of one step of a compiled engine."""
    return options.prefill_chunk or min(DEFAULT_CHUNK, slots_of(options, spec))


def _check_lengths(options: JobOptions, spec: DecoderSpec) -> None:
    slots = slots_of(options, spec)
    if slots > spec.max_positions:
        raise NblError(f"--max-seq-len {slots} is beyond the model's {spec.max_positions} positions")
    if slots < _LEAST_SLOTS:
        raise NblError(f"--max-seq-len {slots} leaves no room for verification; use {_LEAST_SLOTS} at least")
    if chunk_of(options, spec) > slots:
        raise NblError(f"--prefill-chunk {options.prefill_chunk} is beyond --max-seq-len {slots}")


def located(options: JobOptions, run: RunDirectory) -> JobOptions:
    """Options with model and text where they were, whatever the working directory is now."""
    places = run.manifest.get("places", {})
    texts = places.get("calibration") or options.calibration
    noted, quantized = run.manifest.get("quantized") or {}, options.quantized_model
    return dataclasses.replace(
        options,
        model=places.get("model") or options.model,
        quantized_model=(noted.get("place") if quantized == noted.get("name") else None) or quantized,
        calibration=(texts,) if isinstance(texts, str) else tuple(texts),
    )


def describe_command(options: JobOptions, output: Path) -> str:
    """The command line that gives this run again; defaults are left out."""
    defaults = {f.name: f.default for f in dataclasses.fields(JobOptions)}
    spelling = {"depths": "depth", "batches": "batch"}
    words = ["nbl-export", "--model", options.model, "--engine", options.engine]
    if options.shard:
        words[1:] = ["calibrate", "--model", options.model]
    for name, value in options.to_json().items():
        if options.shard and name not in OF_CALIBRATE:
            continue
        default = defaults[name]
        if (
            name in ("model", "engine")
            or value is None
            or value == (list(default) if isinstance(default, tuple) else default)
        ):
            continue
        flag = f"--{spelling.get(name, name).replace('_', '-')}"
        if name in ("calibration", "builder_option"):
            words += [word for item in value for word in (flag, item)]
            continue
        if value is True:
            words.append(flag)
            continue
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [flag, shown]
    return shlex.join([*words, "--output", str(output)])
