"""One job on one run directory: its options, and the objects that stages share, loaded at first use.

Only stages that need the torch model, the calibration text or the checkpoint's files load them. So `bench` and
`report` work on a machine with neither torch nor the checkpoint.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.files import key_of
from nbl_export.options.goals import parse_layers
from nbl_export.options.options import GIVEN, JobOptions, describe_command
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import Plan
from nbl_export.records.requests import Prepared, SweepRequest
from nbl_export.run.facts import identity_of
from nbl_export.run.progress import Ui
from nbl_export.run_directory import CALIBRATION_FILE, RunDirectory
from nbl_export.targets import load_engine
from nbl_export.targets.base import Target
from nbl_export.text.held_back import FAR_ROLES, NEAR_ROLES, Division, divide, far_tokens, held_back_tokens

__all__ = ["Job"]


class Job:
    """Options, run directory and the lazily loaded parts."""

    def __init__(
        self, options: JobOptions, run: RunDirectory, ui: Ui, asked: SweepRequest | Prepared | None = None
    ) -> None:
        self.options = options
        self.run = run
        self.ui = ui
        self.sweep = asked if isinstance(asked, SweepRequest) else None
        self.evaluation = asked if isinstance(asked, Prepared) else None

    @property
    def engine(self) -> Target:
        return load_engine(self.options.engine, self.options.provider)

    @property
    def slots(self) -> int:
        """Most tokens of a sequence: the model's positions, or the length of fixed caches."""
        return self.options.slots(self.spec, compiled=self.engine.capabilities.static)

    @property
    def has_token_table(self) -> bool:
        """Whether graphs look up the output of leading linearized layers in a table per token.

        A run on an ONNX graph has no torch model to compute the table.
        """
        return self.options.token_table and self.graph is None

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
        found = identity_of(self.options, self.source, self.read_spec, self.text, self.hub_texts.facts)
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

    @functools.cached_property
    def source(self) -> Any:
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
    def codes(self) -> list[str]:
        """Fingerprint of the quantised checkpoint, an input of the decoder graph beside the model's weights."""
        return [self.run.manifest["quantized"]["fingerprint"]] if self.options.quantized_model else []

    def note_quantized(self) -> None:
        """Record place (for `located`) and fingerprint (for `codes`) of the quantised checkpoint in the manifest."""
        from nbl_export.model.checkpoint import quantized

        if self.quantized is not None:
            self.run.note(quantized={"name": self.options.quantized_model, **quantized.describe(self.quantized)})

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
        from nbl_export.text.kept import HubTexts

        return HubTexts(self.run.path / CALIBRATION_FILE, self.run.manifest, self.ui.say)

    @functools.cached_property
    def checkpoint(self) -> Path:
        """A directory with safetensors and tokenizer."""
        from nbl_export.model.checkpoint import materialise

        if self.source.fingerprint != self.fingerprint:
            raise NblError(f"{self.options.model} is not the model that {self.run.path} was made from; restore it")
        return materialise.materialise(self.source, self.run.path / "checkpoint")

    @functools.cached_property
    def windows(self) -> tuple[Any, Any]:
        """Token windows for calibration, and held-back token windows."""
        from nbl_export.model.checkpoint import load
        from nbl_export.text import windows as text_windows

        if self.text.sha256 != self.text_sha256:
            raise NblError(f"the calibration text {self.text.name} has changed since this run; restore it")
        if self.options.says_itself:
            return self._sampled
        tokenizer = load.load_tokenizer(self.checkpoint)
        options, size = self.options, self.spec.vocab_size
        held_back = held_back_tokens(options.context)
        return text_windows.pack(self.text, tokenizer, options.calibration_tokens, options.context, held_back, size)

    @functools.cached_property
    def held_back(self) -> Division:
        """The held-back windows by use."""
        return divide(self.windows[1], NEAR_ROLES)

    @functools.cached_property
    def training_windows(self) -> Any:
        """Token windows for distillation: the calibration windows, and more windows of the same text."""
        from nbl_export.model.checkpoint import load
        from nbl_export.text import windows as text_windows

        windows, _ = self.windows
        if self.options.says_itself:
            return windows
        tokenizer = load.load_tokenizer(self.checkpoint)
        held_back = held_back_tokens(self.options.context)
        return text_windows.extend(windows, self.text, tokenizer, self.options.distill_tokens, held_back)

    @functools.cached_property
    def far_text(self) -> Any:
        """The second text: nobody calibrates on it, and every machine has it."""
        from nbl_export.text import corpus

        return corpus.stdlib_text()

    @functools.cached_property
    def far(self) -> Division | None:
        """Windows of the second text by use; None if it is the calibration text or has too few windows."""
        from nbl_export.model.checkpoint import load
        from nbl_export.text import windows as text_windows

        if self.far_text.sha256 == self.text_sha256:
            return None
        tokenizer, context = load.load_tokenizer(self.checkpoint), self.options.context
        rows, _ = text_windows.pack(
            self.far_text, tokenizer, far_tokens(context), context, vocab_size=self.spec.vocab_size
        )
        return divide(rows, FAR_ROLES) if len(rows) >= len(FAR_ROLES) else None

    def texts(self, part: str) -> list[tuple[str, Any]]:
        """Name and windows of one part of both texts.

        Args:
            part: "deciding", "choosing" or "final", see `text.held_back`.
        """
        found = [(f"held back from {self.text.name}", getattr(self.held_back, part))]
        if self.far is not None:
            found.append((f"{self.far_text.name} (not calibrated on)", getattr(self.far, part)))
        return found

    @property
    def _sampled(self) -> tuple[Any, Any]:
        """Windows sampled from the model itself; sampled once and kept in the run directory."""
        from nbl_export.text import sampling

        options, context = self.options, self.options.context
        wanted, held = max(1, -(-options.calibration_tokens // context)), held_back_tokens(context) // context
        path, key = self.run.path / "sampled.safetensors", key_of(self.text_sha256, wanted, held, context)
        ids = sampling.load_windows(path, key)
        if ids is None:
            with self.ui.task("sampling") as progress:
                ids = sampling.sample_windows(self.model, wanted + held, context, options.seed, progress)
            sampling.save_windows(ids, key, path)
        return ids[:wanted], ids[wanted:]

    @property
    def graph(self) -> Path | None:
        """The decoder graph if the model is only a graph, else None."""
        return self.source.graph if self.options.decoder_source == GIVEN else None

    @functools.cached_property
    def model(self) -> Any:
        """The torch model, kept until `forget_model`.

        Raises:
            NblError: the model is only a graph.
        """
        from nbl_export.model import allocator
        from nbl_export.model.checkpoint import load

        if self.graph is not None:
            raise NblError(f"this needs the torch model, and {self.options.model} is an ONNX graph")

        allocator.keep_freed_memory()
        return load.load_model(self.checkpoint)

    @property
    def narrow(self) -> bool:
        """Whether the torch model's products are in bfloat16 (`--compute-dtype`)."""
        from nbl_export.model import bfloat16

        return bfloat16.chosen(self.options.compute_dtype, self.model.device)

    def forget_model(self) -> None:
        """Free the torch model's memory, or drop a changed model. The next use loads the model again."""
        self.__dict__.pop("model", None)

    @functools.cached_property
    def shortage(self) -> str:
        """Why the torch model does not fit into this machine's memory, in words; "" if it fits."""
        from nbl_export.model.one_layer import shortage_of

        if self.graph is not None or "model" in self.__dict__:  # a graph's weights stay in their file
            return ""
        return shortage_of(self.checkpoint)

    @functools.cached_property
    def request(self) -> int | tuple[int, ...] | None:
        """What `--layers` asks for; None if it is not given."""
        return None if self.options.layers is None else parse_layers(self.options.layers, self.spec.num_layers)

    @property
    def plan(self) -> Plan:
        """The plan that the manifest records."""
        return Plan.from_facts(self.run.manifest)
