"""Resolves the inputs of stages from options and run directory: nothing else that runs stages reads options.

    options, manifest ─► Resolver ─► inputs of a stage: values, and `Lazy` values with what identifies them

Only stages that need the torch model, a text or the checkpoint's files load them. So `bench` and `report` work on a
machine with neither torch nor the checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nbl_export.errors import NblError
from nbl_export.files import key_of
from nbl_export.measure.cost import CostModel, cost_model
from nbl_export.options.command import describe_command
from nbl_export.options.options import JobOptions
from nbl_export.plan.inputs import Maps, Texts
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy, identity_of
from nbl_export.records.plan import Plan
from nbl_export.records.requests import Prepared
from nbl_export.run.facts import identity_of as facts_of
from nbl_export.run.facts import require_engine
from nbl_export.run.progress import Ui
from nbl_export.run_directory import CALIBRATION_FILE, CHECKPOINT, RunDirectory
from nbl_export.targets import load_engine
from nbl_export.targets.base import Target
from nbl_export.text.windows import (
    CALIBRATION_ROLES,
    DIVISION,
    SECOND_ROLES,
    Division,
    choosing_texts,
    divide,
    held_back_tokens,
    second_tokens,
)

__all__ = ["Resolver", "lazy"]

T = TypeVar("T")


def lazy(*names: str, shown: bool = False) -> Callable[[Callable[[Any], T]], functools.cached_property[Lazy[T]]]:
    """Make a `Lazy` of a method of `Resolver` that loads a value.

    Args:
        names: values and options that identify what is loaded, see `Resolver.value`.
        shown: the value only changes what is shown, so it has no identity.
    """

    def decorate(load: Callable[[Any], T]) -> functools.cached_property[Lazy[T]]:
        def get(self: Resolver) -> Lazy[T]:
            return Lazy(None if shown else [identity_of(self.value(name)) for name in names], lambda: load(self))

        return functools.cached_property(get)

    return decorate


class Resolver:
    """Values of one run, each loaded at first use.

    Args:
        asked: the request of the stage `eval`.
    """

    def __init__(self, options: JobOptions, run: RunDirectory, ui: Ui, asked: Prepared | None = None) -> None:
        self.options, self.run, self.ui = options, run, ui
        self.evaluation = asked
        self.keys: dict[str, str] = {}  # of the stages that are not left out, in order

    def value(self, name: str) -> Any:
        """The resolver's value of that name, or else the option."""
        return getattr(self, name) if hasattr(type(self), name) else getattr(self.options, name)

    def fill(self, kind: type[T], **given: Any) -> T:
        """Inputs of a stage: a frozen dataclass, whose fields are the values of their names unless they are given."""
        names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]  # a dataclass
        return kind(**{name: given[name] if name in given else self.value(name) for name in names})

    # -- checks and the manifest -------------------------------------------------------------------------------

    def check_inputs(self) -> None:
        """Read the calibration text and the quantised checkpoint, which checks them.

        Raises:
            NblError: an input is missing or damaged.
        """
        self.text, self.quantized  # noqa: B018  reading them is the check

    def identify(self) -> None:
        """Record model, text and options in the manifest; a new directory gets its manifest immediately.

        Raises:
            NblError: the directory holds a run of another model.
        """
        known = self.run.manifest.get("model")
        if known and known["fingerprint"] != self.source.fingerprint and self.run.stages:
            raise NblError(
                f"{self.run.path} holds a run of {known['name']}, not of this {self.source.name}; "
                "use another --output, or start over with --force"
            )
        found = facts_of(self.options, self.source, self.read_spec, self.text, self.hub_texts.facts)
        measured = {**found["calibration"], **self.run.manifest.get("calibration", {})}  # keep the counted tokens
        named = {key: found["calibration"][key] for key in ("name", "sha256", "parts", "hub")}
        self.run.note(**{**found, "calibration": {**measured, **named}})
        self.note_options(self.options)
        self.note_quantized()
        if not known:
            self.run.save()
        self.hub_texts.save()

    def note_options(self, options: JobOptions) -> None:
        """Record the options and their command line in the manifest."""
        self.run.note(options=options.to_json(), command=describe_command(options, self.run.path))

    def note_quantized(self) -> None:
        """Record place (for `located`) and fingerprint of the quantised checkpoint in the manifest."""
        from nbl_export.model.checkpoint import quantized

        if self.quantized is not None:
            self.run.note(quantized={"name": self.options.quantized_model, **quantized.describe(self.quantized)})

    # -- plain values ------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Target:
        return load_engine(self.options.engine, self.options.provider)

    @property
    def engine_name(self) -> str:
        return self.options.engine

    @property
    def spec(self) -> DecoderSpec:
        return DecoderSpec(**self.run.manifest["decoder"])

    @property
    def cache_length(self) -> int:
        """Most tokens of a sequence: the model's positions, or the length of fixed caches."""
        return self.options.cache_length(self.spec, compiled=self.engine.capabilities.static)

    @property
    def fingerprint(self) -> str:
        return str(self.run.manifest["model"]["fingerprint"])

    @property
    def text_sha256(self) -> str:
        return str(self.run.manifest["calibration"]["sha256"])

    @property
    def division(self) -> Any:
        """How windows are divided by use."""
        return DIVISION

    @property
    def saving(self) -> list[Any]:
        """Options that change the share of a prefill's arithmetic that replaced layers save."""
        return [self.options.kept_logits]

    @property
    def plan(self) -> Plan:
        """The plan that the manifest records."""
        return Plan.from_facts(self.run.manifest)

    def key(self, stage: str) -> str | None:
        """The key of an earlier stage; None if it is left out."""
        return self.keys.get(stage) or self.run.stages.get(stage, {}).get("key")

    # -- model -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def source(self) -> Any:
        """The `checkpoint.Source` of the options' model."""
        from nbl_export.model.checkpoint import source as checkpoint_source

        return checkpoint_source.resolve(self.options.model)

    @functools.cached_property
    def read_spec(self) -> DecoderSpec:
        """The decoder's sizes; `pipeline` sets those of a model that it has read."""
        return self.spec

    @functools.cached_property
    def quantized(self) -> Any:
        """The checkpoint whose codes the int4 graphs use; None if the builder quantises."""
        from nbl_export.model.checkpoint import quantized

        name = self.options.quantized_model
        return None if name is None else quantized.find(name, self.read_spec)

    @property
    def quantized_fingerprint(self) -> str | None:
        return self.run.manifest["quantized"]["fingerprint"] if self.options.quantized_model else None

    @lazy("quantized_fingerprint")
    def codes(self) -> Any:
        """`quantized` as an input."""
        return self.quantized

    @lazy("fingerprint")
    def checkpoint(self) -> Path:
        """A directory with safetensors and tokenizer."""
        from nbl_export.model.checkpoint import load

        self._origin()
        return load.materialise(self.source, self.run.path / CHECKPOINT)

    def _origin(self) -> Path:
        """The model itself: a GGUF file, or a directory with config.json."""
        if self.source.fingerprint != self.fingerprint:
            raise NblError(f"{self.options.model} is not the model that {self.run.path} was made from; restore it")
        return self.source.gguf or self.source.directory

    @lazy("fingerprint")
    def model(self) -> Any:
        """The torch model."""
        from nbl_export.model import memory
        from nbl_export.model.checkpoint import load

        memory.keep_freed_memory()
        return load.load_model(self.checkpoint.value).to(self.device.value)

    @lazy(shown=True)
    def choose(self) -> Callable[[int], Any]:
        """The function that gives the device for work of a size in bytes."""
        from nbl_export.model import device

        return functools.partial(device.chosen, self.options.device)

    @lazy(shown=True)
    def device(self) -> Any:
        """Where the torch model is. Tells the user, if torch sees a GPU."""
        from nbl_export.model import device
        from nbl_export.model.one_layer import float32_bytes

        found = device.told(self.options.device, float32_bytes(self.checkpoint.value), self.ui.say)
        self.run.note(torch_device=device.spoken(found))
        return found

    @lazy("compute_dtype")
    def narrow(self) -> bool:
        """Whether the torch model's products are in bfloat16 (`--compute-dtype`)."""
        from nbl_export.model import bfloat16, device

        place = device.chosen("cpu", 0) if self.shortage.value else self.model.value.device
        return bfloat16.chosen(self.options.compute_dtype, place)

    @lazy("fingerprint", "compute_dtype")
    def mixes(self) -> Callable[[Maps, str], Any]:
        """Maps and their tap -> the torch model, in which these maps can replace attention (`model.mixes.Mixes`)."""
        from nbl_export.model.streamed import StreamedModel
        from nbl_export.model.switched import SwitchedModel

        if self.shortage.value:
            self.ui.say(f"  one layer at a time: the weights are {self.shortage.value}")
            checkpoint, scratch = self.checkpoint.value, self.run.path
            return lambda maps, tap: StreamedModel(checkpoint, maps, tap, scratch, narrow=self.narrow.value)
        return lambda maps, tap: SwitchedModel(self.model.value, maps, tap, narrow=self.narrow.value)

    @lazy(shown=True)
    def shortage(self) -> str:
        """Why the torch model does not fit into this machine's memory, in words; "" if it fits."""
        if self.model.is_loaded:
            return ""
        from nbl_export.model.one_layer import shortage_of

        return shortage_of(self._origin())

    @property
    def trains(self) -> bool:
        """Whether maps are trained: asked for, and the model fits into memory."""
        return self.options.fit == "distilled" and not self.shortage.value

    @lazy("engine_name", "provider", "precision", "prompt_length", "saving")
    def cost(self) -> CostModel:
        """The cost model of the shipped graphs."""
        return cost_model(self.options, self.engine.capabilities, self.spec, self._origin())

    @lazy(shown=True)
    def setting(self) -> dict[str, Any]:
        """What modelled speed-ups are of."""
        options = self.options
        return {"engine": options.engine, "precision": options.precision, "tokens": options.prompt_length}

    @lazy("engine_name", "provider")
    def available(self) -> Target:
        """The engine. Raises NblError if it is not available here."""
        require_engine(self.options)
        return self.engine

    # -- texts -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def text(self) -> Any:
        from nbl_export.text import corpus, mixture

        if self.options.says_itself:
            name = f"sampled from the model itself (seed {self.options.seed}, temperature 1)"
            return corpus.Text(name, key_of("sampled", self.source.fingerprint, self.options.seed), ())
        return mixture.read_texts(self.options.calibration, self.hub_texts)

    @functools.cached_property
    def hub_texts(self) -> Any:
        """Texts of hub datasets, which the run directory keeps."""
        from nbl_export.text.mixture import HubTexts

        return HubTexts(self.run.path / CALIBRATION_FILE, self.run.manifest, self.ui.say)

    @functools.cached_property
    def second_text(self) -> Any:
        """The second text: nobody calibrates on it, and every machine has it."""
        from nbl_export.text import corpus

        return corpus.stdlib_text()

    @lazy(shown=True)
    def text_names(self) -> tuple[str, str]:
        return self.text.name, self.second_text.name

    def _tokenizer(self) -> Any:
        from nbl_export.model.checkpoint import load

        return load.load_tokenizer(self.checkpoint.value)

    @lazy("fingerprint", "text_sha256", "calibration_tokens", "context", "division")
    def windows(self) -> tuple[Any, Any]:
        """Token windows for calibration, and held-back token windows."""
        from nbl_export.text import windows as text_windows

        if self.text.sha256 != self.text_sha256:
            raise NblError(f"the calibration text {self.text.name} has changed since this run; restore it")
        if self.options.says_itself:
            return self._sampled()
        options, held_back = self.options, held_back_tokens(self.options.context)
        return text_windows.pack(
            self.text, self._tokenizer(), options.calibration_tokens, options.context, held_back, self.spec.vocab_size
        )

    def _sampled(self) -> tuple[Any, Any]:
        """Windows sampled from the model itself; sampled once and kept in the run directory."""
        from nbl_export.text import sampling

        options, context = self.options, self.options.context
        wanted, held = max(1, -(-options.calibration_tokens // context)), held_back_tokens(context) // context
        path, key = self.run.path / "sampled.safetensors", key_of(self.text_sha256, wanted, held, context)
        ids = sampling.load_windows(path, key)
        if ids is None:
            with self.ui.task("sampling") as progress:
                ids = sampling.sample_windows(self.model.value, wanted + held, context, options.seed, progress)
            sampling.save_windows(ids, key, path)
        return ids[:wanted], ids[wanted:]

    @lazy("windows")
    def held_back(self) -> Division:
        """The held-back windows by use."""
        return divide(self.windows.value[1], CALIBRATION_ROLES)

    @lazy("windows", "distill_tokens")
    def training(self) -> Any:
        """Token windows for distillation: the calibration windows, and more windows of the same text."""
        from nbl_export.text import windows as text_windows

        windows, options = self.windows.value[0], self.options
        if options.says_itself:
            return windows
        held_back = held_back_tokens(options.context)
        return text_windows.extend(windows, self.text, self._tokenizer(), options.distill_tokens, held_back)

    @lazy("fingerprint", "text_sha256", "context", "division")
    def second(self) -> Division | None:
        """Windows of the second text by use; None if it is the calibration text or has too few windows."""
        from nbl_export.text import windows as text_windows

        if self.second_text.sha256 == self.text_sha256:
            return None
        context, size = self.options.context, self.spec.vocab_size
        rows, _ = text_windows.pack(
            self.second_text, self._tokenizer(), second_tokens(context), context, vocab_size=size
        )
        return divide(rows, SECOND_ROLES) if len(rows) >= len(SECOND_ROLES) else None

    def _both(self, held_back: Any, part: str) -> Texts:
        """Name and windows of the calibration text, and of a part of the second text if there is one."""
        texts = [(f"held back from {self.text.name}", held_back)]
        if self.second.value is not None:
            texts.append((f"{self.second_text.name} (not calibrated on)", getattr(self.second.value, part)))
        return texts

    @lazy("windows", "second")
    def deciding(self) -> Texts:
        """Texts that decide how many layers a goal takes, see `text.windows`."""
        return self._both(self.held_back.value.deciding, "deciding")

    @lazy("windows", "second")
    def final(self) -> Texts:
        """Texts of the final figures."""
        return self._both(self.held_back.value.final, "final")

    @lazy("windows", "second")
    def choosing_parts(self) -> Texts:
        """Consecutive windows of both choosing parts, equally many of each."""
        own = self.held_back.value.choosing
        return [(name, windows[: len(own)]) for name, windows in self._both(own, "choosing")]

    @lazy("windows", "second", "says_itself")
    def choosing(self) -> Texts:
        """Texts that layers are chosen by."""
        own = self.held_back.value.choosing
        alone = [(f"held back from {self.text.name}", own)]  # the second text is not the model's own
        return choosing_texts(
            alone if self.options.says_itself else self._both(own, "choosing"), self.spec.max_positions
        )
