"""What a step of the acceptance reports: what it saw, and if it failed, which layer of the stack is at fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import NblError

__all__ = [
    "CAPTURE",
    "CLOCK",
    "DEFECT",
    "GENAI",
    "GRAPH",
    "KERNELS",
    "LIBRARY",
    "MACHINE",
    "MEMORY",
    "PLAN",
    "RUNNER",
    "CannotRun",
    "Emit",
    "Failed",
    "LeftOut",
    "Notes",
    "Outcome",
]

# Layers of the stack, from the machine upwards.
MACHINE = "the machine: its GPU, driver or packages"
MEMORY = "device memory and stream: cuda-python or torch, or the driver below"
LIBRARY = "NVIDIA's library: its builder or its runtime"
PLAN = "the plan: it was not built from this run's graph, or with other settings"
KERNELS = "the kernels that NVIDIA's library chose"
GRAPH = "the exported graph, or what NVIDIA's library made of it"
RUNNER = "the runner of nbl-export"
CAPTURE = "CUDA graphs: what was captured is not what runs"
CLOCK = "the timing of nbl-export: the clock is read before the GPU is done"
GENAI = "ONNX Runtime GenAI or its execution provider"

DEFECT = "This is a defect of nbl-export: report it with acceptance.json."

Emit = Callable[[str, Any], None]  # kind of an event, and its value


class Failed(NblError):
    """What a step looked at is wrong.

    Args:
        said: what was seen, as a sentence without a full stop.
        layer: of the stack; "" is the step's own.
        advice: what to do, as a sentence; "" is the step's own.
    """

    def __init__(self, said: str, layer: str = "", advice: str = "") -> None:
        super().__init__(said)
        self.layer, self.advice = layer, advice


class LeftOut(NblError):
    """A step has nothing to look at here."""


class CannotRun(NblError):
    """Nothing can run on this machine; exit status 1."""


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "left out" or "cannot run"."""

    verdict: str
    said: str = ""
    layer: str = ""
    advice: str = ""


class Notes:
    """What a step tells while it works. Each note leaves the process at once, so a crash loses none."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    def doing(self, what: str) -> None:
        """Say what begins now; a crash is reported with the last of these."""
        self._emit("doing", what)

    def see(self, name: str, value: object, limit: float | None = None) -> None:
        """Record a figure or a fact."""
        finite = not isinstance(value, float) or math.isfinite(value)
        self._emit("saw", {"name": name, "value": value if finite else str(value), "limit": limit})

    def said(self, message: str) -> None:
        """Record a message of a library."""
        self._emit("said", message)
