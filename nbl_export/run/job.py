"""A settled job in its run directory, of which stages declare their inputs. Only declarations of stages read options.

    Settled + RunDirectory ─► Job ─► stage.declare(job) ─► inputs of a stage: a frozen dataclass

A value is in the inputs itself, or as a `Lazy` value with what identifies it. Only stages that need the torch model,
the text or the checkpoint's files load them. So `bench` and `report` work on a machine with neither torch nor the
checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from nbl_export.errors import NblError
from nbl_export.measure.cost import CostModel, cost_model, map_sizes
from nbl_export.methods import METHODS
from nbl_export.methods.base import Candidates, Maps
from nbl_export.methods.checkpoint.shape import read_shape
from nbl_export.options.command import describe_command
from nbl_export.records.inputs import Lazy, lazy
from nbl_export.records.plan import Plan
from nbl_export.records.requests import Subject
from nbl_export.run.progress import Ui
from nbl_export.run.settled import Settled, require_engine
from nbl_export.run.torch_model import TorchModel
from nbl_export.run_directory import TEXT_FILE, RunDirectory
from nbl_export.targets import load_engine
from nbl_export.targets.base import Engine
from nbl_export.text.parts import JobText, Texts

__all__ = ["Job"]

_COST_OPTIONS = ("engine", "provider", "precision", "prompt_length", "kept_logits")


class Job:
    """A job whose stages run in a directory.

    Args:
        asked: what the stage `eval` measures.

    Attributes:
        fingerprint: what identifies the model.
        torch: values that are made of the model's files.
        keys: of the stages that are not left out, in order.
    """

    def __init__(self, settled: Settled, run: RunDirectory, ui: Ui, asked: tuple[Subject, ...] = ()) -> None:
        self.settled = settled
        self.run = run
        self.ui = ui
        self.options = settled.options
        self.decoder = settled.decoder
        self.fingerprint = settled.fingerprint
        self.evaluation = asked
        self.torch = TorchModel(settled, run, ui)
        self.keys: dict[str, str] = {}

    # -- the manifest ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Give a new directory its manifest.

        Raises:
            NblError: the directory holds a run of another model.
        """
        known = self.run.manifest.get("model")
        settled = self.settled
        same = known and known["fingerprint"] == settled.fingerprint
        if known and not same and self.run.stages:
            raise NblError(
                f"{self.run.path} holds a run of {known['name']}, not of this {settled.source.value.name}; "
                "use another --output, or start over with --force"
            )
        if not same:
            self.note()
            self.run.save()

    def note(self) -> None:
        """Note model, options and text for the manifest; the next finished stage writes them."""
        self.run.note(**self.settled.facts, command=describe_command(self.settled.noted, self.run.path))
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
        return self.options.fit == "distilled" and not self.torch.shortage.value

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
        require_engine(self.options)
        return self.engine

    @property
    def cache_length(self) -> int:
        """Most tokens of a sequence: the model's positions, or the length of fixed caches."""
        return self.options.cache_length(self.decoder, compiled=self.engine.capabilities.static)

    @lazy(lambda job: [getattr(job.options, name) for name in _COST_OPTIONS])
    def cost(self) -> CostModel:
        """The cost model of the shipped graphs."""
        mlp = read_shape(self.torch.origin()).mlp
        return cost_model(self.options, self.engine.capabilities, self.decoder, mlp)

    @property
    def saved_work(self) -> Callable[[Maps, int], float]:
        """Maps and the tokens of a prompt -> the share of its arithmetic that these maps save."""
        costs = self.cost.value
        return lambda maps, tokens: dataclasses.replace(costs, tokens=tokens).prefill_saved(map_sizes(maps))

    # -- text --------------------------------------------------------------------------------------------------

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
