"""The Python door: the main job, finished runs, and estimates.

    export, open ─► Run: report, compare, to
    estimate     ─► the value of `nbl-export estimate --json`

`import nbl_export` has these names. Importing this module loads neither torch nor an engine, and of its functions
`export` alone needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.run_directory import DECODERS, RunDirectory

__all__ = ["NblError", "Run", "estimate", "export", "open"]

_FRAME = '<iframe title="NBL report" srcdoc="{}" sandbox width="100%" height="560" style="border:0"></iframe>'


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
    def report(self) -> Mapping[str, Any]:
        """The value of report.json: layers, loss, speed, caches, checks (docs/python.md).

        Raises:
            NblError: the run is not verified yet.
        """
        found = self._found()
        if found is None:
            raise NblError(f"{self.path} is not verified yet: run its command again ({self.manifest['command']})")
        return found

    def compare(self, prompt: str, new_tokens: int = 128, *, raw: bool = False, force: bool = False) -> dict[str, str]:
        """Answers of both decoders, one after the other: of "original" and of "nbl".

        Args:
            raw: no chat template. force: answer although verification failed.

        Raises:
            NblError: the engine does not run here, or the run is not finished.
        """
        from nbl_export.run.deployed import answers

        found = answers(self.path, tuple(DECODERS), prompt, new_tokens, raw=raw, force=force)
        return {name: "".join(pieces) for name, (_, pieces) in zip(DECODERS, found, strict=True)}

    def to(self, form: str, path: str | PathLike[str], *, force: bool = False, quiet: bool = False) -> Path:
        """Write the NBL model in a form that other engines read, as `nbl-export convert` does.

        Args:
            form: as --to of the command takes it: transformers, vllm, tensorrt-llm, ...
            path: a new directory.

        Raises:
            NblError: the model has no such form, or `path` is there already.
            ParityError: what was written is not the model.
        """
        from nbl_export.publish.convert import convert
        from nbl_export.run.progress import Ui

        target = Path(path)
        convert(self.path, form, target, Ui(quiet=quiet), force=force)
        return target

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.status}"

    def __str__(self) -> str:
        from nbl_export.report.outcome import outcome

        found = self._found()
        return "\n".join([repr(self), *(f"  {name:<13}{said}" for name, said in (outcome(found) if found else ()))])

    def _repr_html_(self) -> str | None:
        """The first screen of the report; None (and so the text) before verification."""
        from nbl_export.report.page import first_screen

        found = self._found()
        return None if found is None else _FRAME.format(escape(first_screen(found)))

    def _found(self) -> dict[str, Any] | None:
        from nbl_export.run.deployed import result

        return result(RunDirectory.existing(self.path))


def export(
    model: str | PathLike[str], output: str | PathLike[str], *, force: bool = False, quiet: bool = False,
    **options: Any,
) -> Run:  # fmt: skip
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
    from nbl_export.run.pipeline import run_job
    from nbl_export.run.progress import Ui

    asked = dict(_plain({"model": model, **options}))
    run_job(asked, Path(output), Ui(quiet=quiet), force=force)
    return Run(output)


def open(directory: str | PathLike[str]) -> Run:
    """A run that is there, finished or not. Loads neither torch nor an engine.

    Raises:
        NblError: the directory is not a run directory.
    """
    return Run(directory)


def estimate(model: str | PathLike[str], **options: Any) -> dict[str, Any]:
    """What the main job will take on this machine, and what it gains. Reads no weight.

    Args:
        model: hub id, checkpoint directory, config.json or GGUF file.

    Returns:
        seconds, memory_bytes, disk_bytes: of the whole job; memory is the least that it can run with.
        stages: the same of each stage. gains: the first token of prompts, by counted work.
        refused: why the job cannot end here, in a sentence; "" if nothing speaks against it.

    Raises:
        NblError: the model does not state its sizes, or an option does not fit.
    """
    from nbl_export.run.estimate import estimate as estimated

    return estimated(str(model), dict(_plain(options)))


def _plain(options: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options with texts in place of paths."""
    for name, value in options.items():
        if isinstance(value, (list, tuple)):
            yield name, [str(item) if isinstance(item, PathLike) else item for item in value]
        else:
            yield name, str(value) if isinstance(value, PathLike) else value
