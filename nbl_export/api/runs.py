"""Runs in Python: the main job, and what a finished run says. Nothing here needs torch but making a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.measure.estimate import Gain, Needs
from nbl_export.publish.convert import convert
from nbl_export.records.quality import Interval
from nbl_export.report.estimate import describe_totals
from nbl_export.report.outcome import outcome
from nbl_export.report.page import first_screen
from nbl_export.run.deployed import answers, result
from nbl_export.run.estimate import estimate as estimated
from nbl_export.run.pipeline import run_job
from nbl_export.run.progress import Ui
from nbl_export.run_directory import RunDirectory

__all__ = ["Answers", "Estimate", "Loss", "Point", "Run", "Speed", "estimate", "export", "open"]

_PHASES = {"pp": "prefill", "tg": "decode"}
_FRAME = '<iframe title="NBL report" srcdoc="{}" sandbox width="100%" height="560" style="border:0"></iframe>'


@dataclass(frozen=True)
class Loss:
    """Quality loss on a text that neither fitted nor chose anything. Intervals are of 95%, over its windows.

    Attributes:
        increase: of perplexity, as a share: 0.1 is +10%. kl: in nats. top1: share of equal first choices.
    """

    text: str
    tokens: int
    perplexity_original: float | None
    perplexity_nbl: float | None
    increase: Interval
    kl: Interval
    top1: Interval


@dataclass(frozen=True)
class Speed:
    """Speed of a test: `phase` (prefill or decode) of `tokens` tokens behind `depth` cached ones.

    Attributes:
        ratio: NBL tokens a second over the original's, with its interval.
        verdict: faster, slower, or why there is neither.
        original, nbl: tokens a second, median of the rounds.
    """

    phase: str
    tokens: int
    depth: int
    ratio: Interval
    verdict: str
    original: float
    nbl: float


@dataclass(frozen=True)
class Point:
    """A number of layers: what its increase of perplexity is on each text, and what speed is modelled.

    Attributes:
        increase: text -> share; None if it is not finite.
    """

    layers: tuple[int, ...]
    increase: Mapping[str, float | None]
    prefill: float
    decode: float


@dataclass(frozen=True)
class Answers:
    """What both decoders say to a prompt."""

    prompt: str
    original: str
    nbl: str

    def __str__(self) -> str:
        return f"original:\n{self.original}\nNBL:\n{self.nbl}"

    def _repr_html_(self) -> str:
        cell = '<td style="text-align:left;vertical-align:top;white-space:pre-wrap">{}</td>'
        row = "".join(cell.format(escape(text)) for text in (self.original, self.nbl))
        return f"<table><tr><th>original</th><th>NBL</th></tr><tr>{row}</tr></table>"


@dataclass(frozen=True)
class Estimate:
    """What the main job will take on this machine.

    Attributes:
        memory_bytes: the least that it can run with, beside Python and its libraries.
        seconds: if nothing else runs.
        busy_seconds: beside what runs on this machine now.
        expected: the method, its gain and what limits its loss, in sentences.
        replaced: the number of layers that time, disk and gain are counted for.
        gains: the first token of prompts, original and NBL, by counted work.
        refused: why the job cannot end here, in a sentence; "" if nothing speaks against it.
    """

    seconds: float
    busy_seconds: float
    memory_bytes: float
    disk_bytes: float
    expected: tuple[str, ...]
    replaced: int
    gains: tuple[Gain, ...]
    stages: tuple[Needs, ...]
    refused: str

    def __str__(self) -> str:
        said = describe_totals(vars(self))
        return f"{said}; {self.refused}" if self.refused else said


class Run:
    """A run directory. `open` and `export` give one; it is read anew at each question.

    Attributes:
        path: the directory; `path / "model"` is the decoder that is deployed.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.path = Path(directory)
        RunDirectory.existing(self.path)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The value of nbl.json: options, plan, stages, versions."""
        return RunDirectory.existing(self.path).manifest

    @property
    def status(self) -> str:
        """verified, failed, or incomplete."""
        return str(self.manifest["status"])

    @property
    def layers(self) -> tuple[int, ...]:
        """The replaced layers.

        Raises:
            NblError: they are not chosen yet.
        """
        if "replaced_layers" not in self.manifest:
            raise self._unfinished("plan")
        return tuple(self.manifest["replaced_layers"])

    @property
    def loss(self) -> tuple[Loss, ...]:
        """Quality loss on each text.

        Raises:
            NblError: the run is not verified yet.
        """
        return tuple(_loss(row) for row in self._result()["quality_loss"])

    @property
    def speed(self) -> tuple[Speed, ...]:
        """Speed of NBL over the original, a value a test; empty if no benchmark was run.

        Raises:
            NblError: the run is not verified yet.
        """
        found = self._result()
        medians = {_place(row): row["tokens_per_second_median"] for row in found["rows"]}
        return tuple(
            Speed(
                _PHASES[row["kind"]],
                row["tokens"],
                row["depth"],
                Interval(row["ratio"], row["low"], row["high"]),
                row["verdict"],
                medians[_place(row, row["base"])],
                medians[_place(row)],
            )
            for row in found["ratios"]
        )

    @property
    def cache_bytes_per_token(self) -> Mapping[str, int]:
        """Bytes of the KV cache for each token, of "original" and of "nbl"."""
        found: Mapping[str, int] = self._result()["cache_bytes_per_token"]
        return found

    def curve(self) -> list[Point]:
        """Other numbers of layers, which were measured while layers were chosen; empty if layers were named."""
        curve = self.manifest.get("curve") or {"texts": [], "points": []}
        return [
            Point(
                tuple(p["replaced_layers"]),
                dict(zip(curve["texts"], p["increases"], strict=True)),
                p["prefill"],
                p["decode"],
            )
            for p in curve["points"]
        ]

    def compare(self, prompt: str, new_tokens: int = 128, *, raw: bool = False, force: bool = False) -> Answers:
        """Answers of both decoders, one after the other.

        Args:
            raw: no chat template. force: answer although verification failed.

        Raises:
            NblError: the engine does not run here, or the run is not finished.
        """
        found = answers(self.path, ("original", "nbl"), prompt, new_tokens, raw=raw, force=force)
        original, nbl = ("".join(pieces) for _, pieces in found)
        return Answers(prompt, original, nbl)

    def to(self, form: str, path: str | PathLike[str], *, force: bool = False, quiet: bool = False) -> Path:
        """Write the NBL model in a form that other engines read: transformers, nemotron-nas, mlx or edge-llm.

        Args:
            form: or an engine that reads one: vllm, tensorrt-llm, tensorrt-edge-llm, mlx-lm.
            path: a new directory.

        Raises:
            NblError: the model has no such form, or `path` is there already.
            ParityError: what was written is not the model.
        """
        target = Path(path)
        convert(self.path, form, target, Ui(quiet=quiet), force=force)
        return target

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.status}"

    def __str__(self) -> str:
        found = self._found()
        return "\n".join([repr(self), *(f"  {name:<13}{said}" for name, said in (outcome(found) if found else ()))])

    def _repr_html_(self) -> str | None:
        """The first screen of the report; None (and so the text) before verification."""
        found = self._found()
        return None if found is None else _FRAME.format(escape(first_screen(found)))

    def _found(self) -> dict[str, Any] | None:
        return result(RunDirectory.existing(self.path))

    def _result(self) -> dict[str, Any]:
        found = self._found()
        if found is None:
            raise self._unfinished("verification")
        return found

    def _unfinished(self, stage: str) -> NblError:
        return NblError(f"{self.path} has no {stage} yet: run its command again ({self.manifest['command']})")


def export(
    model: str | PathLike[str], output: str | PathLike[str], *, force: bool = False, quiet: bool = False, **options: Any
) -> Run:
    """Make a verified and measured NBL decoder in a directory. An interrupted run goes on where it was.

    Args:
        model: hub id, safetensors directory, or GGUF file.
        output: the run directory.
        force: start over: remove the run in `output` first.
        quiet: no progress on stderr.
        options: those of the command line, by their names with underscores (docs/usage.md). A number may be given
            where the command line takes text (layers=8), and a list for several (layers=[7, 9]).

    Raises:
        NblError: what the user can correct, in a sentence: what, where, what to do.
        ParityError: the NBL graph does not compute what the original graph computes with these layers.
    """
    run_job({"model": model, **options}, Path(output), Ui(quiet=quiet), force=force)
    return Run(output)


def open(directory: str | PathLike[str]) -> Run:
    """A run that is there, finished or not. Loads neither torch nor an engine.

    Raises:
        NblError: the directory is not a run directory.
    """
    return Run(directory)


def estimate(model: str | PathLike[str], **options: Any) -> Estimate:
    """What the main job will take on this machine, and what it gains. Reads no weight.

    Args:
        model: hub id, checkpoint directory, config.json or GGUF file.

    Raises:
        NblError: the model does not state its sizes, or an option does not fit.
    """
    found = estimated(str(model), options)
    values = {field.name: found[field.name] for field in dataclasses.fields(Estimate)}
    gains, stages = (tuple(kind(**row) for row in found[name]) for kind, name in ((Gain, "gains"), (Needs, "stages")))
    return Estimate(**{**values, "gains": gains, "stages": stages})


def _loss(row: Mapping[str, Any]) -> Loss:
    def interval(value: str, ends: str) -> Interval:
        return Interval(row[value], *(row[ends] or (None, None)))

    return Loss(
        row["text"],
        row["tokens"],
        row["perplexity_original"],
        row["perplexity_nbl"],
        interval("increase", "increase_interval"),
        interval("kl_mean", "kl_interval"),
        interval("top1_agreement", "top1_interval"),
    )


def _place(row: Mapping[str, Any], variant: str = "") -> tuple[Any, ...]:
    return variant or row["variant"], row["test"], row["depth"]
