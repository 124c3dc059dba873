"""The steps of the acceptance, in order: each rests on what the steps before it have shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbl_export.acceptance.steps import genai
from nbl_export.acceptance.steps.behind import behind_positions, prefill_against_steps
from nbl_export.acceptance.steps.bindings import bindings
from nbl_export.acceptance.steps.clock import clock_against_events
from nbl_export.acceptance.steps.graphs import graphs_against_plain
from nbl_export.acceptance.steps.inspector import look_at_layers
from nbl_export.acceptance.steps.plain import plain
from nbl_export.acceptance.steps.stack import machine, one_layer, sum_on_device
from nbl_export.acceptance.steps.strategies import strategies
from nbl_export.acceptance.verdict import (
    CAPTURE,
    CLOCK,
    DEFECT,
    GENAI,
    GRAPH,
    KERNELS,
    LIBRARY,
    MACHINE,
    MEMORY,
    RUNNER,
    Notes,
)

__all__ = ["GENAI_STEPS", "STATIC_STEPS", "Step"]

_VERSION = "Try another version of the library"
_REPORT = "Report it with acceptance.json."
_OTHER_NUMBERS = f"{_VERSION}, or --precision bf16. {_REPORT}"
_OTHER_GENAI = f"Try other versions of onnxruntime-gpu and onnxruntime-genai-cuda, or --engine trt-rtx. {_REPORT}"


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        name: short, for messages and files.
        layer: the layer of the stack that is at fault if the step fails and does not know better.
        advice: what to do then.
        run: the work on a target; a function of a module, so that it can be sent to another process.
        needed: later steps are not run if this step fails.
        last: the step runs only if no step has failed.
    """

    name: str
    title: str
    layer: str
    advice: str
    run: Callable[[Any, Notes], None]
    needed: bool = False
    last: bool = False


STATIC_STEPS = (
    Step("machine", "GPU, driver, library and versions", MACHINE, "See nbl-export doctor.", machine, True),
    Step(
        "sum", "A sum on the device", MEMORY,
        "Reinstall cuda-python and the library for the driver's CUDA version; see nvidia-smi for a broken GPU.",
        sum_on_device, True,
    ),
    Step("bindings", "Inputs, outputs and shared caches", RUNNER, DEFECT, bindings, True),
    Step("layer", "One layer against its float32 twin", GRAPH, _OTHER_NUMBERS, one_layer),
    Step("plain", "The decoder without CUDA graphs", GRAPH, _OTHER_NUMBERS, plain, True),
    Step(
        "behind", "Slots behind the positions", KERNELS, f"{_VERSION}. {_REPORT}", behind_positions,
    ),
    Step(
        "prefill", "Prefill against single steps", KERNELS, f"{_VERSION}, or another --prefill-chunk. {_REPORT}",
        prefill_against_steps,
    ),
    Step("graphs", "CUDA graphs against plain steps", CAPTURE, DEFECT, graphs_against_plain),
    Step("strategies", "Kernels that are compiled on the GPU", KERNELS, f"{_VERSION}. {_REPORT}", strategies),
    Step(
        "inspector", "Layers of the engine", LIBRARY, f"It computes right, and slower than it could. {_REPORT}",
        look_at_layers,
    ),
    Step("clock", "Events against the clock", CLOCK, DEFECT, clock_against_events),
)  # fmt: skip

GENAI_STEPS = (
    Step("machine", "GPU, driver, provider and versions", MACHINE, "See nbl-export doctor.", genai.machine, True),
    Step("plain", "Chunks and single tokens", GENAI, _OTHER_GENAI, genai.texts, True),
    Step("prefill", "Prefill against single steps", GENAI, _OTHER_GENAI, genai.prefill),
    Step("launches", "Text with and without waiting for each kernel", GENAI, _OTHER_GENAI, genai.launches),
    Step("clock", "Steps that have ended when they return", CLOCK, DEFECT, genai.clock),
)  # fmt: skip
