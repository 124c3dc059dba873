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
from nbl_export.plan.inputs import Maps
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy, identity_of
from nbl_export.records.plan import Plan
from nbl_export.records.requests import Prepared
from nbl_export.run.facts import identity_of as facts_of
from nbl_export.run.facts import require_engine
from nbl_export.run.progress import Ui
from nbl_export.run_directory import CHECKPOINT, TEXT_FILE, RunDirectory
from nbl_export.targets import load_engine
from nbl_export.targets.base import Target
from nbl_export.text.parts import JobText

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
        self.noted = options  # as the user gave them, without places of this machine
        self.evaluation = asked
        self.recorded: JobOptions | None = None  # the options that those of this command change
        self.keys: dict[str, str] = {}  # of the stages that are not left out, in order

    def value(self, name: str) -> Any:
        """The resolver's value of that name, or else the option."""
        return getattr(self, name) if hasattr(type(self), name) else getattr(self.options, name)

    def fill(self, kind: type[T], **given: Any) -> T:
        """Inputs of a stage: a frozen dataclass, whose fields are the values of their names unless they are given."""
        names = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]  # a dataclass
        return kind(**{name: given[name] if name in given else self.value(name) for name in names})

    # -- checks and the manifest -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Give a new directory its manifest.

        Raises:
            NblError: the directory holds a run of another model.
        """
        known = self.run.manifest.get("model")
        same = known and known["fingerprint"] == self.source.fingerprint
        if known and not same and self.run.stages:
            raise NblError(
                f"{self.run.path} holds a run of {known['name']}, not of this {self.source.name}; "
                "use another --output, or start over with --force"
            )
        if not same:
            self.note()
            self.run.save()

    def note(self) -> None:
        """Note model, options and text for the manifest; the next finished stage writes them."""
        from nbl_export.model.checkpoint import quantized

        options, recorded = self.noted, self.recorded
        if recorded is None:
            self.run.note(**facts_of(options, self.source, self.read_spec), sources=self.sources)
        if options.quantized_model != (recorded and recorded.quantized_model) and self.quantized is not None:
            self.run.note(quantized={"name": options.quantized_model, **quantized.describe(self.quantized)})
        self.run.note(options=options.to_json(), command=describe_command(options, self.run.path))
        if text := self.run.manifest.get("text"):
            about = {"name": text["name"], "sha256": text["sha256"], "parts": text["mix"]}
            size = {"tokens": text["tokens"], "context": text["context"]}
            self.run.note(calibration={**self.run.manifest.get("calibration", {}), **about, **size})

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

    # -- text --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def sources(self) -> list[Any]:
        """What identifies the calibration text's sources: as the run records them, or as they are now."""
        from nbl_export.text.mixture import identify

        options = self.options
        return ["self"] if options.says_itself else identify(options.calibration)

    @lazy(shown=True)
    def documents(self) -> Any:
        """The calibration text; without documents if the model samples it."""
        from nbl_export.text import corpus, mixture

        options = self.options
        if options.says_itself:
            name = f"sampled from the model itself (seed {options.seed}, temperature 1)"
            return corpus.Text(name, key_of("sampled", self.source.fingerprint, options.seed), ())
        if mixture.identify(options.calibration) != self.sources:
            raise NblError("the calibration text has changed since this run; restore it")
        return mixture.read_texts(options.calibration, self.ui.say)

    @lazy(shown=True)
    def tokenizer(self) -> Any:
        from nbl_export.model.checkpoint import load

        return load.load_tokenizer(self.checkpoint.value)

    @property
    def text(self) -> JobText:
        """The rows that the stage `text` left."""
        if "text" not in self.run.manifest:
            raise NblError(f"{self.run.path} has no text yet: run its command again ({self.run.manifest['command']})")
        noted = self.run.manifest["text"]
        return JobText.of_file(self.run.path / TEXT_FILE, (noted["name"], noted["second"]), noted["parts"])
