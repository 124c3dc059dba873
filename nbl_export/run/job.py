"""A settled job in its run directory, of which stages declare their inputs. Only declarations of stages read options.

    settle_job, settle_run ─► Job ─► stage.declare(job) ─► inputs of a stage: a frozen dataclass

A value is in the inputs itself, or as a `Lazy` value with what identifies it. Only stages that need the torch model,
the text or the checkpoint's files load them. So `bench` and `report` work on a machine with neither torch nor the
checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.measure.cost import CostModel, cost_model, map_sizes
from nbl_export.methods import METHODS
from nbl_export.methods.base import Candidates, Maps
from nbl_export.methods.checkpoint.shape import read_shape
from nbl_export.methods.checkpoint.source import Source
from nbl_export.model import processes
from nbl_export.options.command import describe_command
from nbl_export.options.options import JobOptions
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy, lazy
from nbl_export.records.plan import Plan
from nbl_export.records.requests import Subject
from nbl_export.run.progress import Ui
from nbl_export.run_directory import CHECKPOINT, TEXT_FILE, RunDirectory
from nbl_export.targets import load_engine
from nbl_export.targets.base import Engine
from nbl_export.text.corpus import Corpus
from nbl_export.text.mixture import identify, read_texts
from nbl_export.text.parts import JobText, Texts

__all__ = ["Job", "require_engine"]

_COST_OPTIONS = ("engine", "provider", "precision", "prompt_length", "kept_logits")


def require_engine(options: JobOptions, *, for_verification: bool = False) -> Engine:
    """The engine, which is available on this machine.

    Args:
        for_verification: check the engine of verification, which differs for compiled engines.

    Raises:
        NblError: the engine is not available; the message has the reason.
    """
    engine = load_engine(options.engine, options.provider)
    name = (engine.capabilities.verified_by if for_verification else "") or options.engine
    found = (engine if name == options.engine else load_engine(name)).probe()
    if not found.available:
        raise NblError(f"engine {name} is not available here: {found.reason}")
    return engine


def _of_files(job: Job) -> str:
    """The identity of a value that is made of the model's files."""
    return job.fingerprint


def _only_shown(_job: Job) -> None:
    """The identity of a value that changes no result."""


@dataclass
class Job:
    """A job whose stages run in a directory. Making it loads nothing.

    Attributes:
        options: with places of this machine.
        fingerprint: what identifies the model.
        source: the model, if it is on this machine.
        codes: a checkpoint whose codes the int4 graphs use, or None.
        sources: what identifies the calibration text, see `text.mixture.identify`.
        facts: what the manifest will say of all this.
        evaluation: what the stage `eval` measures.
        converted: where a GGUF or NBL checkpoint is converted; None: in the run.
        keys: of the stages that are not left out, in order.
    """

    run: RunDirectory
    ui: Ui
    options: JobOptions
    decoder: DecoderSpec
    fingerprint: str
    source: Lazy[Source]
    codes: Lazy[Source | None]
    sources: list[str]
    facts: Mapping[str, Any]
    evaluation: tuple[Subject, ...] = ()
    converted: Path | None = None
    keys: dict[str, str] = field(default_factory=dict, init=False)
    _is_short_elsewhere: bool = field(default=False, init=False)

    # -- the manifest ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Give a new directory its manifest.

        Raises:
            NblError: the directory holds a run of another model.
        """
        known = self.run.manifest.get("model")
        if known and known["fingerprint"] == self.fingerprint:
            return
        if known and self.run.stages:
            raise NblError(
                f"{self.run.path} holds a run of {known['name']}, not of this {self.source.value.name}; "
                "use another --output, or start over with --force"
            )
        self.note()
        self.run.save()

    def note(self) -> None:
        """Note model, options and text for the manifest; the next finished stage writes them."""
        self.run.note(**self.facts)
        self.run.note(command=describe_command(self.run.options, self.run.path))
        if text := self.run.manifest.get("text"):
            about = {"name": text["name"], "sha256": text["sha256"], "parts": text["mix"]}
            size = {"tokens": text["tokens"], "context": text["context"]}
            self.run.note(calibration={**self.run.manifest.get("calibration", {}), **about, **size})

    def files_of(self, stage: str) -> Any:
        """What identifies the files of a finished stage: their hashes."""
        return self.run.stages[stage]["files"]

    @property
    def plan(self) -> Plan:
        return self.run.plan

    # -- options and model -------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether maps are trained: asked for, and the model fits into memory."""
        return self.options.fit == "distilled" and not self.shortage.value

    @functools.cached_property
    def candidates(self) -> Candidates:
        """What the method may replace."""
        name = self.options.method
        sums = self.run.manifest.get("sums", {})
        known = sums["collected"] if sums.get("method") == name else {}
        return METHODS[name].candidates(self.options, self.decoder, known)

    # -- engine ------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        return load_engine(self.options.engine, self.options.provider)

    @lazy(lambda job: [job.options.engine, job.options.provider])
    def available(self) -> Engine:
        """The engine. Raises NblError if it is not available here."""
        return require_engine(self.options)

    @property
    def cache_length(self) -> int:
        """Most tokens of a sequence: the model's positions, or the length of fixed caches."""
        return self.options.cache_length(self.decoder, compiled=self.engine.capabilities.static)

    @lazy(lambda job: [getattr(job.options, name) for name in _COST_OPTIONS])
    def cost(self) -> CostModel:
        """The cost model of the shipped graphs."""
        mlp = read_shape(self.origin()).mlp
        return cost_model(self.options, self.engine.capabilities, self.decoder, mlp)

    @property
    def saved_work(self) -> Callable[[Maps, int], float]:
        """Maps and the tokens of a prompt -> the share of its arithmetic that these maps save."""
        costs = self.cost.value
        return lambda maps, tokens: dataclasses.replace(costs, tokens=tokens).prefill_saved(map_sizes(maps))

    # -- text --------------------------------------------------------------------------------------------------

    @lazy(_only_shown)
    def documents(self) -> Corpus:
        """The calibration text; without documents if the model samples it."""
        if identify(self.options.calibration) != self.sources:
            raise NblError("the calibration text has changed since this run; restore it")
        return read_texts(self.options.calibration, self.ui.say)

    @property
    def text(self) -> JobText:
        """The rows that the stage `text` left."""
        if "text" not in self.run.manifest:
            raise NblError(f"{self.run.path} has no text yet: run its command again ({self.run.manifest['command']})")
        noted = self.run.manifest["text"]
        return JobText.of_file(self.run.path / TEXT_FILE, (noted["name"], noted["second"]), noted["parts"])

    @property
    def selection(self) -> Lazy[Texts]:
        """Texts that layers are chosen by."""
        return self.text.selection(self.decoder.max_positions)

    # -- torch model -------------------------------------------------------------------------------------------

    def origin(self) -> Path:
        """The model itself: a GGUF file, or a directory with config.json.

        Raises:
            NblError: the run was made from other files.
        """
        source = self.source.value
        if source.fingerprint != self.fingerprint:
            raise NblError(f"{self.options.model} is not the model that {self.run.path} was made from; restore it")
        return source.gguf or source.directory

    @lazy(_of_files)
    def checkpoint(self) -> Path:
        """A directory with safetensors and tokenizer."""
        from nbl_export.methods.checkpoint import load

        self.origin()
        return load.materialise(self.source.value, self.converted or self.run.path / CHECKPOINT)

    @lazy(_of_files)
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from nbl_export.methods.checkpoint import load

        return load.load_tokenizer(self.checkpoint.value)

    @lazy(_of_files)
    def model(self) -> Any:
        """The whole model in memory."""
        from nbl_export.methods.checkpoint import load
        from nbl_export.model import memory

        memory.keep_freed_memory()
        return load.load_model(self.checkpoint.value).to(self.device.value)

    @lazy(_of_files)
    def mapped(self) -> Any:
        """The model with the weights of one block at a time in memory, for a machine that cannot hold it."""
        from nbl_export.model.mapped import mapped_model

        return mapped_model(self.checkpoint.value)

    @lazy(_only_shown)
    def device(self) -> Any:
        """Where the model is. Tells the user, if torch sees a GPU."""
        from nbl_export.model import device
        from nbl_export.model.mapped import float32_bytes

        found = device.choose_and_describe(self.options.device, float32_bytes(self.checkpoint.value), self.ui.say)
        self.run.note(torch_device=device.describe_device(found))
        return found

    @lazy(_only_shown)
    def shortage(self) -> str:
        """Why the model does not fit into this machine's memory, in words; "" if it fits."""
        if self.model.is_loaded:
            return ""
        from nbl_export.model.mapped import shortage_of
        from nbl_export.model.memory import WEIGHTS_SHARE

        found = shortage_of(self.origin(), WEIGHTS_SHARE / processes.local())
        return found or ("too large for another process" if self._is_short_elsewhere else "")

    def agree(self) -> None:
        """Call the model too large if it is too large for one process. None loads it before all have looked."""
        short = bool(self.shortage.value)
        if processes.any_rank(short) and not short:
            self._is_short_elsewhere = True
            self.shortage.forget()

    @lazy(lambda job: job.options.compute_dtype)
    def bf16_matmul(self) -> bool:
        """Whether the model's products are in bfloat16 (`compute_dtype`)."""
        from nbl_export.model import bfloat16, device

        place = device.choose_device("cpu", 0) if self.shortage.value else self.model.value.device
        return bfloat16.use_bf16(self.options.compute_dtype, place)

    @lazy(lambda job: [job.fingerprint, job.options.compute_dtype])
    def partial(self) -> Callable[[Maps, str], Any]:
        """Maps and their tap -> the model in which these maps replace attention (`PartialReplacement`)."""
        from nbl_export.methods.losses import PartialReplacement
        from nbl_export.model.mapped import mapped_model

        if not self.shortage.value:
            return lambda maps, tap: PartialReplacement(self.model.value, maps, tap, bf16_matmul=self.bf16_matmul.value)
        self.ui.say(f"  one layer at a time: the weights are {self.shortage.value}")

        def mixed(maps: Maps, tap: str) -> PartialReplacement:
            model = mapped_model(self.checkpoint.value, head=True)
            return PartialReplacement(model, maps, tap, bf16_matmul=self.bf16_matmul.value, scratch=self.run.path)

        return mixed
