"""The torch model of a job: its files, its device, and the forms in which stages read it, each loaded at first use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.methods.base import Maps
from nbl_export.model import processes
from nbl_export.records.inputs import lazy
from nbl_export.run.progress import Ui
from nbl_export.run.settled import Settled
from nbl_export.run_directory import CHECKPOINT, RunDirectory

__all__ = ["TorchModel"]


def _shown(_model: TorchModel) -> None:
    """The identity of a value that changes no result."""


def _files(model: TorchModel) -> str:
    """The identity of a value that is made of the model's files."""
    return model.fingerprint


class TorchModel:
    """Values that are made of the model's files. Building it loads nothing."""

    def __init__(self, settled: Settled, run: RunDirectory, ui: Ui) -> None:
        self._source = settled.source
        self._options = settled.options
        self._run = run
        self._ui = ui
        self._is_short_elsewhere = False
        self.fingerprint = settled.fingerprint

    def origin(self) -> Path:
        """The model itself: a GGUF file, or a directory with config.json.

        Raises:
            NblError: the run was made from other files.
        """
        source = self._source.value
        if source.fingerprint != self.fingerprint:
            raise NblError(f"{self._options.model} is not the model that {self._run.path} was made from; restore it")
        return source.gguf or source.directory

    @lazy(_files)
    def checkpoint(self) -> Path:
        """A directory with safetensors and tokenizer."""
        from nbl_export.methods.checkpoint import load

        self.origin()
        return load.materialise(self._source.value, self._run.path / CHECKPOINT)

    @lazy(_files)
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from nbl_export.methods.checkpoint import load

        return load.load_tokenizer(self.checkpoint.value)

    @lazy(_files)
    def model(self) -> Any:
        """The whole model in memory."""
        from nbl_export.methods.checkpoint import load
        from nbl_export.model import memory

        memory.keep_freed_memory()
        return load.load_model(self.checkpoint.value).to(self.device.value)

    @lazy(_files)
    def mapped(self) -> Any:
        """The model with the weights of one block at a time in memory, for a machine that cannot hold it."""
        from nbl_export.model.mapped import mapped_model

        return mapped_model(self.checkpoint.value)

    @lazy(_shown)
    def device(self) -> Any:
        """Where the model is. Tells the user, if torch sees a GPU."""
        from nbl_export.model import device
        from nbl_export.model.mapped import float32_bytes

        found = device.choose_and_describe(self._options.device, float32_bytes(self.checkpoint.value), self._ui.say)
        self._run.note(torch_device=device.describe_device(found))
        return found

    @lazy(_shown)
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

    @lazy(lambda model: model._options.compute_dtype)
    def bf16_matmul(self) -> bool:
        """Whether the model's products are in bfloat16 (`compute_dtype`)."""
        from nbl_export.model import bfloat16, device

        place = device.choose_device("cpu", 0) if self.shortage.value else self.model.value.device
        return bfloat16.use_bf16(self._options.compute_dtype, place)

    @lazy(lambda model: [model.fingerprint, model._options.compute_dtype])
    def partial(self) -> Callable[[Maps, str], Any]:
        """Maps and their tap -> the model in which these maps replace attention (`PartialReplacement`)."""
        from nbl_export.methods.losses import PartialReplacement
        from nbl_export.model.mapped import mapped_model

        if not self.shortage.value:
            return lambda maps, tap: PartialReplacement(self.model.value, maps, tap, bf16_matmul=self.bf16_matmul.value)
        self._ui.say(f"  one layer at a time: the weights are {self.shortage.value}")

        def mixed(maps: Maps, tap: str) -> PartialReplacement:
            model = mapped_model(self.checkpoint.value, head=True)
            return PartialReplacement(model, maps, tap, bf16_matmul=self.bf16_matmul.value, scratch=self._run.path)

        return mixed
