"""One job on one run directory: its options, and what stages share, fetched when first needed.

The torch model, the calibration text and even the checkpoint's files are touched only by stages that need
them, so that `bench` and `report` work on a machine that has neither torch nor the checkpoint.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

from nbl_export.artifacts import RunDirectory
from nbl_export.engines import load_engine
from nbl_export.errors import NblError
from nbl_export.plan import parse_layers
from nbl_export.progress import Ui
from nbl_export.records import DecoderSpec, JobOptions, Plan

__all__ = ["HELD_BACK_TOKENS", "Job", "describe_command"]

HELD_BACK_TOKENS = 4096


class Job:
    """Options, run directory and the lazily fetched parts."""

    def __init__(self, options: JobOptions, run: RunDirectory, ui: Ui) -> None:
        self.options = options
        self.run = run
        self.ui = ui

    @property
    def engine(self) -> ModuleType:
        return load_engine(self.options.engine)

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

    def identify(self) -> None:
        """Write who we are to the manifest.

        Raises:
            NblError: the directory belongs to another model.
        """
        known = self.run.manifest.get("model")
        if known and known["fingerprint"] != self.source.fingerprint:
            raise NblError(
                f"{self.run.path} holds a run of {known['name']}, not of this {self.source.name}; "
                "use another --output, or start over with --force"
            )
        spec = (known and self.run.manifest.get("decoder")) or dataclasses.asdict(self.read_spec)
        self.run.save(
            model={
                "name": self.options.model,
                "revision": self.source.revision,
                "architecture": spec["architecture"],
                "fingerprint": self.source.fingerprint,
            },
            decoder=spec,
            calibration={
                "name": self.text.name,
                "sha256": self.text.sha256,
                "tokens": self.options.calibration_tokens,
                "context": self.options.context,
            },
            options=self.options.to_json(),
            command=describe_command(self.options, self.run.path),
            num_layers=spec["num_layers"],
        )

    # -- parts ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def source(self) -> Any:
        from nbl_export import checkpoint

        return checkpoint.resolve(self.options.model)

    @functools.cached_property
    def read_spec(self) -> DecoderSpec:
        from nbl_export import checkpoint

        return checkpoint.read_spec(self.source)

    @functools.cached_property
    def text(self) -> Any:
        from nbl_export import corpus

        return corpus.read_text(self.options.calibration)

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
        tokenizer = checkpoint.load_tokenizer(self.checkpoint)
        return corpus.pack(
            self.text, tokenizer, self.options.calibration_tokens, self.options.context, HELD_BACK_TOKENS
        )

    @functools.cached_property
    def model(self) -> Any:
        """The torch model. `del job.model` frees it."""
        from nbl_export import checkpoint

        return checkpoint.load_model(self.checkpoint)

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


def describe_command(options: JobOptions, output: Path) -> str:
    """The command line that gives this run again; defaults are left out."""
    defaults = {f.name: f.default for f in dataclasses.fields(JobOptions)}
    spelling = {"depths": "depth"}
    words = ["nbl-export", "--model", options.model, "--engine", options.engine]
    for name, value in options.to_json().items():
        default = defaults[name]
        if (
            name in ("model", "engine")
            or value is None
            or value == (list(default) if isinstance(default, tuple) else default)
        ):
            continue
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{spelling.get(name, name).replace('_', '-')}", shown]
    return shlex.join([*words, "--output", str(output)])
