"""What the steps look at: the run's engines, and the parts of the stack that run them.

Target ── directory, engines by subject, material
   └──── Parts      GPU, library, device memory, sessions, timer, clock: one place to exchange them
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.acceptance import material
from nbl_export.acceptance.material import Material
from nbl_export.acceptance.verdict import (
    DEFECT,
    RUNNER,
    Failed,
    Notes,
)
from nbl_export.targets.base import BuildSettings
from nbl_export.targets.gpu import Gpu, find_gpu
from nbl_export.targets.tensorrt.build import build_engine
from nbl_export.targets.tensorrt.contexts import Strategy
from nbl_export.targets.tensorrt.device import (
    CudaPython,
    Device,
    Torch,
    find_backend,
    open_device,
)
from nbl_export.targets.tensorrt.examine.bare import sum_plan
from nbl_export.targets.tensorrt.examine.examined import Examined
from nbl_export.targets.tensorrt.examine.timer import Timer, open_timer
from nbl_export.targets.tensorrt.library import Library, load_library
from nbl_export.targets.tensorrt.record import EngineRecord, read_record
from nbl_export.targets.tensorrt.runner import TrtSession, open_session
from nbl_export.targets.tensorrt.static.host import StaticDecoder

__all__ = ["Opened", "Parts", "Target"]


@dataclass(frozen=True)
class Parts:
    """The real parts for one of the two libraries; each step runs in a process of its own."""

    library: Library

    def gpu(self) -> Gpu | str:
        """See `targets.gpu.find_gpu`."""
        return find_gpu()

    def load(self) -> Any:
        """The imported library."""
        return load_library(self.library)

    def memory(self) -> dict[str, Callable[[], Device]] | str:
        """Packages that reach the device's memory, the one that the runner takes first; or what is missing."""
        chosen = find_backend()
        if isinstance(chosen, str):
            return chosen
        found: dict[str, Callable[[], Device]] = {chosen.title: chosen}
        if chosen is CudaPython:
            with contextlib.suppress(Exception):  # torch is not needed, and may be broken
                if importlib.import_module("torch").cuda.is_available():
                    found[Torch.title] = Torch
        return found

    def device(self) -> Device:
        """The device that the runner takes."""
        return open_device()

    def sum_plan(self, trt: Any) -> bytes:
        """A plan of y = x + x, built here."""
        return sum_plan(trt)

    def build(self, source: Path, out: Path, settings: BuildSettings) -> EngineRecord:
        """Build a graph of the static form here."""
        return build_engine(self.library, source, out, settings)

    def deployed(self, directory: Path) -> TrtSession:
        """A session as `generate` and `bench` open it."""
        return open_session(self.library, directory)

    def session(self, directory: Path, *, graphs: bool, kernels: str = "EAGER") -> TrtSession:
        """A session of the runner, see `Strategy`."""
        record, strategy = read_record(directory), Strategy(graphs=graphs, kernels=kernels)
        return TrtSession(self.library, directory, record, self.load(), self.device(), strategy)

    def timer(self, device: Device) -> Timer:
        """Events on the stream of a device."""
        return open_timer(device)

    def clock(self) -> float:
        """Seconds of this machine since a fixed moment."""
        return time.perf_counter()


@dataclass(frozen=True)
class Opened:
    """A session of one subject, its decoder, and a view into it."""

    subject: str
    record: EngineRecord
    decoder: StaticDecoder
    inside: Examined

    @property
    def session(self) -> TrtSession:
        return self.inside.session


@dataclass(frozen=True)
class Target:
    """What is accepted.

    Attributes:
        directory: of the run.
        engines: subject and engine directory, in the order of the checks.
        graphs: subject -> the directory with its graph and weights.
        values: acceptance.safetensors.
    """

    directory: Path
    engines: tuple[tuple[str, Path], ...]
    graphs: dict[str, Path]
    values: Path
    parts: Parts

    @functools.cached_property
    def material(self) -> Material:
        """What to compare with."""
        return material.load(self.values)

    @contextlib.contextmanager
    def opened(self, notes: Notes, *, graphs: bool) -> Iterator[Iterator[Opened]]:
        """Sessions of all subjects, one after the other; a session ends when the next one begins."""
        with contextlib.ExitStack() as stack:
            yield self._each(stack, notes, graphs)

    def _each(self, stack: contextlib.ExitStack, notes: Notes, graphs: bool) -> Iterator[Opened]:
        for subject, directory in self.engines:
            stack.close()
            yield stack.enter_context(self.open(subject, directory, notes, graphs=graphs))

    @contextlib.contextmanager
    def open(
        self, subject: str, directory: Path, notes: Notes, *, graphs: bool, kernels: str = "EAGER"
    ) -> Iterator[Opened]:
        """One session. An error inside is not hidden by an error of closing."""
        notes.doing(f"loading the engine of {subject}")
        session = self.parts.session(directory, graphs=graphs, kernels=kernels)
        try:
            inside = Examined(session, self.parts.load())
            yield Opened(subject, read_record(directory), StaticDecoder(session), inside)
        except BaseException:
            with contextlib.suppress(Exception):
                session.close()
            raise
        notes.doing(f"closing the engine of {subject}")
        try:
            session.close()
        except Exception as error:
            said = f"closing the engine of {subject} fails: {' '.join(str(error).split())[:300]}"
            raise Failed(said, RUNNER, DEFECT) from error
