"""Finds the decoder of a run directory or of a deployable directory, opens it for text, and describes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, UsageError
from nbl_export.graph.names import MANIFEST
from nbl_export.methods import cache_layers
from nbl_export.records.decoder import DecoderSpec
from nbl_export.run_directory import CHECKPOINT, DECODERS, MADE_BY, MAPS_FILE, SUMS_FILE, RunDirectory
from nbl_export.targets import all_targets, load_engine, owner_of
from nbl_export.targets.base import Engine
from nbl_export.targets.runners import TextRunner
from nbl_export.trust.contained import check_folder, refuse_special

__all__ = ["Located", "answers", "describe", "examine_engines", "locate", "result"]


@dataclass(frozen=True)
class Located:
    """A deployable directory, and the engine and provider that run it."""

    path: Path
    engine: str
    provider: str = "cpu"

    @property
    def target(self) -> Engine:
        """The target of that name. It is not a field, since a process that measures gets this value."""
        return load_engine(self.engine, self.provider)

    def available(self) -> Engine:
        """The target.

        Raises:
            NblError: the engine does not run on this machine.
        """
        engine = self.target
        found = engine.probe(run=True)
        if not found.available:
            asked = f"engine {self.engine}" if self.provider == "cpu" else f"provider {self.provider}"
            raise NblError(f"{asked} is not available here: {found.reason}")
        return engine

    def open(self, directory: Path, threads: int | None) -> TextRunner:
        """Load a directory on this engine, if the engine runs here. A process that measures calls this too."""
        return self.available().open_runner(directory, threads)


def answers(
    directory: Path, variants: Sequence[str], prompt: str, new_tokens: int, *, raw: bool = False, force: bool = False
) -> Iterator[tuple[str, Iterator[str]]]:
    """Title and streamed answer of some decoders of a run (`DECODERS`), of which one at a time is in memory.

    Raises:
        UsageError: several are asked of a directory that holds one decoder.
        NblError: the prompt is not UTF-8, or the engine is not available on this machine; also the errors of `locate`.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NblError("the prompt is not text in UTF-8; convert it first") from error
    if len(variants) > 1 and owner_of(directory) is not None:
        raise UsageError(f"{directory} holds one decoder, and two are compared; name the run directory")
    for name in variants:
        found = locate(directory, DECODERS[name], force=force)
        with found.open(found.path, None) as runner:
            yield _TITLES[name], runner.stream(runner.encode(prompt, chat=not raw), new_tokens)


_TITLES = {"original": "original", "nbl": "NBL"}


def locate(directory: Path, name: str = "model", *, force: bool = False) -> Located:
    """The decoder of DIR/model (or `name`), or of DIR if it holds a decoder itself. Its files are checked.

    Raises:
        NblError: there is no decoder to run, or verification failed (unless `force`).
        CorruptError: a file is missing or has changed since it was written.
    """
    refuse_special(directory)
    if (owner := owner_of(directory)) is not None:
        check_folder(directory)
        return Located(directory, owner.capabilities.name, owner.capabilities.provider)
    if not directory.exists():
        raise NblError(f"{directory} does not exist; nbl-export --output makes a run directory")
    if not (directory / MANIFEST).is_file():
        raise NblError(f"{directory} is neither a run directory nor a model directory; nbl-export --output makes one")
    run = RunDirectory.peek(directory)
    options = run.options
    stage = MADE_BY[name]
    found = Located(directory / name, options.engine, options.provider)
    if found.target.capabilities.static:
        stage = "build"
        found = dataclasses.replace(found, path=directory / "engine" / name)
    run.require(stage)
    run.refuse_failed(force=force or name != "model")
    run.check(stage)
    return found


# -- as JSON values --------------------------------------------------------------------------------------------

_RESULT = ("status", "num_layers", "replaced_layers", "exit", "fit", "goal", "rows", "ratios", "cache_bytes_per_token",
           "quality_loss", "long_range")  # fmt: skip


def result(run: RunDirectory) -> dict[str, Any] | None:
    """Speed and loss of a run, as report.json has them; None before verification.

    Raises:
        CorruptError: a file of the run has not the values that its stage writes.
    """
    from nbl_export.report import page

    return page.of_run(run) if "verify" in run.stages else None


def describe(directory: Path) -> dict[str, Any]:
    """Plan, stages, sizes, caches and results of a run directory.

    Raises:
        NblError: the directory is not a run directory. CorruptError: its results cannot be read.
    """
    from nbl_export.report.page import codes_of

    run = RunDirectory.existing(directory)
    facts = run.manifest
    found = result(run)
    options = run.options
    spec = run.decoder
    itemsize = load_engine(options.engine, options.provider).capabilities.cache_itemsize(options.precision)
    kept = len(cache_layers(run.plan)) if "replaced_layers" in facts else spec.num_layers
    return {
        "model": facts["model"],
        "decoder": facts["decoder"],
        "status": facts["status"],
        "precision": options.precision,
        "codes": codes_of(facts),
        "logits": facts.get("logits"),
        "replaced_layers": facts.get("replaced_layers"),
        "exit": facts.get("exit"),
        "num_layers": spec.num_layers,
        "tap": facts.get("tap"),
        "stages": {name: record["seconds"] for name, record in facts["stages"].items()},
        "variants": {
            "original": _variant(directory / "original", spec, spec.num_layers, itemsize),
            "nbl": _variant(directory / "model", spec, kept, itemsize),
        },
        "engines": facts.get("engines", {}),
        "files": {n: _size(directory / n) for n in (SUMS_FILE, MAPS_FILE, CHECKPOINT)},
        "scores": facts.get("scores", []),
        "command": facts["command"],
        "result": found and {name: found[name] for name in _RESULT},
    }


def _variant(directory: Path, spec: DecoderSpec, kept: int, itemsize: int) -> dict[str, Any] | None:
    if not directory.is_dir():
        return None
    return {
        "path": str(directory),
        "cache_layers": kept,
        "kv_cache_bytes_per_token": spec.cache_bytes_per_token(kept, itemsize),
        "model_bytes": _size(directory),
    }


def _size(path: Path) -> int | None:
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else None


def examine_engines() -> dict[str, Any]:
    """Availability of every engine and provider, with the reason if one is not available."""
    found = {}
    for target in all_targets():
        about = target.capabilities
        own = about.provider == "cpu"
        answer = target.probe() if own else target.probe(run=True)
        name = about.name if own else f"{about.name} --provider {about.provider}"
        found[name] = {"title": about.title, "available": answer.available, "reason": answer.reason}
    return found
