"""What is refused, as rows of three tables. `settle` applies them.

    CONTRADICTIONS   options that do not go together, or mean nothing, for any engine and any model
    REFUSED          what does not fit the engine or the model
    OF_DECODER       refused when the decoder's sizes are known

A row is a function of a `Case`: the options, the facts of the engine and the facts of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nbl_export.errors import NblError, UsageError
from nbl_export.options.goals import asked_increase, asked_layers, names_layers, read_layers
from nbl_export.options.option import ModelFacts
from nbl_export.options.options import (
    AUTO_EXIT,
    BUILDER_OPTIONS,
    CHECKPOINT_FIT,
    GPU_DECODE,
    NO_EXIT,
    NO_ORIGINAL,
    JobOptions,
    exit_refused,
)
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.destinations import ANYWHERE, DESTINATIONS, Destination
from nbl_export.records.plan import PREDICTED_KV

__all__ = ["CONTRADICTIONS", "OF_DECODER", "REFUSED", "Case", "Refusal"]


@dataclass(frozen=True)
class Case:
    """Everything that a rule may ask for."""

    options: JobOptions
    engine: Capabilities
    model: ModelFacts

    @property
    def is_nbl(self) -> bool:
        """Whether the model is an NBL checkpoint."""
        return self.options.fit == CHECKPOINT_FIT

    @property
    def is_named(self) -> bool:
        """Whether `--layers` names the layers."""
        return names_layers(self.options.layers)

    @property
    def builder_keys(self) -> tuple[str, ...]:
        """The keys of `builder_option`."""
        return tuple(word.partition("=")[0] for word in self.options.builder_option)

    @property
    def engine_with_provider(self) -> str:
        """The engine, and its provider if that is no CPU."""
        provider = self.options.provider
        return self.options.engine + ("" if provider == "cpu" else f" with --provider {provider}")

    @property
    def place(self) -> Destination:
        """The destination of `--for`."""
        return DESTINATIONS.get(self.options.destination or "", ANYWHERE)

    @property
    def decoder(self) -> DecoderSpec:
        """The decoder's sizes, which the rows of `OF_DECODER` need."""
        assert self.model.decoder is not None
        return self.model.decoder

    @property
    def cache_length(self) -> int:
        """Most tokens of a sequence."""
        return self.options.cache_length(self.decoder, compiled=self.engine.static)


# -- what is refused ----------------------------------------------------------------------------------------------

# An error, and a function that gives its sentence if the case has the fault.
Refusal = tuple[type[NblError], Callable[[Case], "str | bool"]]


CONTRADICTIONS: tuple[Refusal, ...] = (
    (UsageError, lambda c: (
        c.options.layers is not None and c.options.max_perplexity_increase is not None
        and "--layers and --max-perplexity-increase both set the number of layers; give one of them"
    )),
    (UsageError, lambda c: (
        c.options.layers is not None and read_layers(c.options.layers) == 0
        and "--layers 0 replaces nothing; ask for at least 1, or write 0, for the layer of that number"
    )),
    (UsageError, lambda c: (
        not asked_increase(c.options)
        and "--max-perplexity-increase 0% allows no replaced layer; allow more, such as 1%"
    )),
    (UsageError, lambda c: (
        not c.options.has_bias and c.options.tap != "normed"
        and f"key maps {c.options.maps} acts on the normed input; add the key tap = 'normed'"
    )),
)  # fmt: skip


def _wrong_builder_option(case: Case) -> str | bool:
    for word, key in zip(case.options.builder_option, case.builder_keys, strict=True):
        values = BUILDER_OPTIONS.get(key, ())
        if not values:
            return f"key builder_option {word}: expected KEY=VALUE with one of the keys {', '.join(BUILDER_OPTIONS)}"
        if word.partition("=")[2] not in values:
            return f"key builder_option {word}: the values of {key} are {', '.join(values)}"
        if case.builder_keys.count(key) > 1:
            return f"key builder_option {key} is given twice"
    return False


def _model_not_held(case: Case) -> str | bool:
    """A model, or named layers, that the destination does not run."""
    named = asked_layers(case.options, case.model.decoder) if case.is_named and case.model.decoder else ()
    return _not_there(case, case.model.architecture, () if isinstance(named, int) else named)


def _not_there(case: Case, architecture: str, layers: tuple[int, ...]) -> str | bool:
    options = case.options
    if options.destination is None:
        return False
    kinds = case.model.kinds or {options.method}
    why = case.place.refuses(kinds, case.engine.kinds, architecture, layers)
    if not why:
        return False
    of_kinds = case.place.refuses(kinds, case.engine.kinds, "", ())
    of_model = case.place.refuses(kinds, case.engine.kinds, architecture, ())
    use = "leave --exit-layer out" if of_kinds else "leave --for out" if of_model else "name other layers"
    return f"--for {options.destination} is not possible: {why}; {use}"


def _not_made(case: Case) -> str | bool:
    """Precision against decoder source."""
    options = case.options
    sources = case.engine.sources
    if options.precision in sources[options.decoder_source]:
        return False
    others = [
        f"the key decoder_source = '{name}'"
        for name, made in sources.items()
        if options.precision in made and name not in case.model.not_from
    ]
    return (
        f"the decoder source {options.decoder_source} makes no {options.precision} graph; "
        f"use {' or '.join([*others, '--precision ' + ', '.join(sources[options.decoder_source])])}"
    )


def _beside_exit(case: Case) -> str | bool:
    """What --exit-layer does not go with."""
    options = case.options
    if not options.predicts:
        return False
    if options.exit_layer != AUTO_EXIT and not (options.exit_layer.isascii() and options.exit_layer.isdigit()):
        return f"--exit-layer {options.exit_layer!r}: write a layer (20), auto or none"
    for given, flag in (
        (options.layers, "--layers"),
        (options.logits == "all", "key logits all"),
        (options.fit != "independent", f"--fit {options.fit}"),
        (options.select, "key select"),
    ):
        if given:
            return f"--exit-layer does not go with {flag}; give one of them"
    if options.exit_layer != AUTO_EXIT and options.max_perplexity_increase:
        return (
            f"--exit-layer {options.exit_layer} names the exit layer, and --max-perplexity-increase chooses it; "
            "give one of them"
        )
    return False


_OUT = "; leave --exit-layer out, and layers become linear"


def _kv_not_predicted(case: Case) -> str | bool:
    """A model, or a graph of it, whose keys cannot be predicted; names decoder sources with which they can."""
    options = case.options
    if not options.predicts:
        return False
    if why := case.model.no_exit.get(options.destination or "", ""):
        return f"--exit-layer does not go with --for {options.destination} and {case.model.architecture}: {why}{_OUT}"
    why = exit_refused(options.decoder_source, options.precision, case.model)
    others = [
        name
        for name, made in case.engine.sources.items()
        if options.precision in made
        and name not in case.model.not_from
        and not exit_refused(name, options.precision, case.model)
    ]
    instead = f"; use the key decoder_source = {others[0]!r}" if others else _OUT
    return why and f"--exit-layer is not possible for {case.model.architecture or 'this model'}: {why}{instead}"


REFUSED: tuple[Refusal, ...] = (
    (UsageError, _wrong_builder_option),
    (UsageError, lambda c: (
        c.place.engine not in ("", c.options.engine)
        and f"--for {c.options.destination} needs --engine {c.place.engine}, not {c.options.engine}; leave --engine out"
    )),
    (UsageError, lambda c: (
        bool(c.place.engine) and c.options.provider != c.place.provider
        and f"--for {c.options.destination} needs --provider {c.place.provider}, not {c.options.provider}; leave "
        "--provider out"
    )),
    (UsageError, lambda c: (
        bool(c.model.maps_tap) and not c.is_nbl
        and f"--fit {c.options.fit} needs the original model: {NO_ORIGINAL}"
    )),
    (NblError, _kv_not_predicted),
    (UsageError, lambda c: _not_there(c, "", ())),  # kinds of layers alone
    (UsageError, _beside_exit),
    (UsageError, lambda c: (
        c.options.precision not in c.engine.precisions
        and f"--precision {c.options.precision} is not for engine {c.engine_with_provider}; it takes "
        f"{', '.join(c.engine.precisions)}"
    )),
    (UsageError, lambda c: (
        c.options.decoder_source not in c.engine.sources
        and f"key decoder_source {c.options.decoder_source} is not for engine {c.engine_with_provider}; it takes "
        f"{', '.join(c.engine.sources)}"
    )),
    (UsageError, _not_made),
    # These rows need the model's files.
    (NblError, _model_not_held),
    (UsageError, lambda c: (
        c.is_nbl and bool(c.model.architecture) and not c.model.maps_tap
        and f"--fit {CHECKPOINT_FIT} is for a checkpoint with maps (nbl-export convert)"
    )),
    (UsageError, lambda c: (
        bool(missing := [kind for kind in c.model.kinds if not c.engine.holds(kind)])
        and f"{c.options.model} has layers of kind {min(missing)}, which engine {c.engine_with_provider} does not run"
    )),
    (UsageError, lambda c: (
        PREDICTED_KV in c.model.kinds
        and f"{c.options.model} has predicted KV, which a job makes from the original model alone; give that model"
    )),
    (UsageError, lambda c: (
        c.model.maps_tap not in ("", c.options.tap)
        and f"key tap {c.options.tap}: the maps of {c.options.model} have the tap {c.model.maps_tap}; leave key tap out"
    )),
    (NblError, lambda c: (
        c.options.tap not in c.model.taps
        and f"key tap {c.options.tap} is not possible for {c.model.architecture}: no norm stands in front of its "
        f"attention; use {c.model.taps[0]}"
    )),
    (NblError, lambda c: (
        c.options.decoder_source in c.model.not_from
        and f"key decoder_source {c.options.decoder_source} is not possible for {c.model.architecture}: "
        f"{c.model.not_from[c.options.decoder_source]}"
    )),
)  # fmt: skip

_LEAST_SLOTS = 32  # of verification
_LEAST_DECODE = 16  # tokens of the decode test of a large model (`measure.benchmark.decode_tokens`)


def _too_short(case: Case) -> str | bool:
    options = case.options
    shortest = min(options.depths) + min(*options.prompt_tokens, options.generate_tokens or _LEAST_DECODE)
    return shortest > case.cache_length and (
        f"nothing to measure: the shortest test ends at {shortest} tokens, the model has {case.cache_length} "
        "positions; use a smaller --depth, --prompt-tokens or --generate-tokens"
    )


def _too_deep(case: Case) -> str | bool:
    """A depth of a compiled engine that leaves no room for a test: the slots are part of the graph."""
    options = case.options
    depth = max(case.options.depths)
    room = case.cache_length - min(*options.prompt_tokens, options.generate_tokens or GPU_DECODE)
    return (
        case.engine.static
        and depth > max(0, room)
        and (
            f"--depth {depth} leaves no room for a test in {case.cache_length} slots; "
            f"use at most --depth {max(0, room)}, or export with a larger --max-seq-len"
        )
    )


def _wrong_exit(case: Case) -> str | bool:
    options = case.options
    layers = case.decoder.num_layers
    positions = case.decoder.max_positions
    if options.exit_layer not in (AUTO_EXIT, NO_EXIT) and not 1 <= int(options.exit_layer) < layers:
        return f"--exit-layer {options.exit_layer}: this model has layers 0 to {layers - 1}; exit at 1 or above"
    if options.exit_layer == AUTO_EXIT and layers == 1:
        return f"--exit-layer {AUTO_EXIT}: this model has one layer, and none stands below it; use --exit-layer none"
    beyond = options.recent_tokens is not None and options.recent_tokens >= positions
    return beyond and f"--recent-tokens {options.recent_tokens} is beyond the model's {positions} positions"


_LEAST_CHUNK = 512  # tokens of a step in verification, which an engine takes as one step too


def _chunk_too_short(case: Case) -> str | bool:
    """An exit layer depends on the borders of steps, and a short step saves little."""
    options = case.options
    if not case.engine.static or not options.predicts:
        return False
    least = min(max(_LEAST_CHUNK, 2 * min(options.recent_choices)), case.cache_length)
    chunk = options.chunk(case.decoder)
    return chunk < least and (
        f"key prefill_chunk {chunk} is too short for --exit-layer; use at least {least}, or --exit-layer none"
    )


OF_DECODER: tuple[Refusal, ...] = (
    (NblError, _wrong_exit),
    (NblError, _chunk_too_short),
    (NblError, lambda c: (
        c.engine.static and c.cache_length > c.decoder.max_positions
        and f"--max-seq-len {c.cache_length} is beyond the model's {c.decoder.max_positions} positions"
    )),
    (NblError, lambda c: (
        c.engine.static and c.cache_length < _LEAST_SLOTS
        and f"--max-seq-len {c.cache_length} is too short for verification; use at least {_LEAST_SLOTS}"
    )),
    (NblError, lambda c: (
        c.engine.static and (c.options.prefill_chunk or 0) > c.cache_length
        and f"key prefill_chunk {c.options.prefill_chunk} is beyond --max-seq-len {c.cache_length}"
    )),
    (NblError, lambda c: (
        c.options.context > c.decoder.max_positions
        and f"key context {c.options.context} is beyond the model's {c.decoder.max_positions} positions"
    )),
    (NblError, _too_short),
    (NblError, _too_deep),
)  # fmt: skip
