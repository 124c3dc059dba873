"""The time of a shipped graph by operator: `nbl-export profile DIR`.

    prefill of pp tokens, repeated ┐  ONNX Runtime's profile: one event for each  ─► by operator: calls, ms, share
    decode steps after it          ┘  run and each node                           ─► the slowest nodes

The first run of each kind is a warm-up. Decoders are profiled one after the other. Two clock readings for each node
slow a profiled run down, so `bench` and not `profile` compares the speed of decoders.
"""

from __future__ import annotations

import bisect
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError, UsageError
from nbl_export.options.options import JobOptions
from nbl_export.run.deployed import Located, available_engine, is_model_directory, locate
from nbl_export.run.progress import Ui

__all__ = ["Run", "check_request", "profile", "read_trace", "summarise"]

_PREFILLS = 5


_DECODE_STEPS = 16


_TOP_NODES = 10


_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class Run:
    """One run of a graph: total microseconds, and (node, operator, microseconds) of each kernel in run order."""

    total_us: int
    kernels: tuple[tuple[str, str, int], ...]


def check_request(asked: Mapping[str, Any]) -> None:
    """Refuse lists of numbers, because a profile measures one setting.

    Args:
        asked: the given options, by the field names of JobOptions.

    Raises:
        UsageError: an option has several numbers.
    """
    for name, flag in (("prompt_tokens", "--prompt-tokens"), ("threads", "--threads")):
        if len(asked.get(name, ())) > 1:
            raise UsageError(f"a profile measures one setting; give {flag} one number")


def profile(directory: Path, options: JobOptions, ui: Ui, *, force: bool = False) -> dict[str, Any]:
    """Profile original/ and model/ of a run directory, or a single deployable directory.

    Args:
        options: the first of prompt_tokens, repetitions (runs of prefill, default 5), and the first of threads.

    Raises:
        NblError: there is no decoder, the decoder is not for ONNX Runtime's CPU provider, or the prompt exceeds the
            context.
    """
    decoders = _decoders(directory, force)
    prompt, steps = options.prompt_length, _DECODE_STEPS
    threads = options.threads[0] if options.threads else None
    for located in decoders.values():
        if not located.target.capabilities.profiled:
            raise NblError(f"profile needs ONNX Runtime on the CPU, but {located.path} is for {_spoken(located)}")
        threads = threads or available_engine(located).default_threads()
        context = located.target.facts(located.path).context_length
        if prompt + 1 + steps > context:
            raise NblError(
                f"{prompt} tokens and {1 + steps} decode steps exceed the context length of {located.path}, {context}; "
                "use a smaller --prompt-tokens"
            )
    found = {}
    for name, located in decoders.items():
        vocab = located.target.facts(located.path).vocab_size
        ids = np.random.default_rng(0).integers(0, vocab, prompt).tolist()
        with ui.task(f"profiling {name}") as progress:
            runs = _run(located, ids, options.repetitions or _PREFILLS, int(threads or 1), progress)
        found[name] = {"path": str(located.path), **{phase: summarise(of) for phase, of in runs.items()}}
    return {"prompt_tokens": prompt, "threads": threads, "decoders": found}


def _decoders(directory: Path, force: bool) -> Mapping[str, Located]:
    if is_model_directory(directory):
        return {directory.name or str(directory): locate(directory)}
    return {"original": locate(directory, "original"), "nbl": locate(directory, force=force)}


def _spoken(located: Located) -> str:
    return located.engine if located.provider == "cpu" else f"--provider {located.provider}"


def _run(located: Located, ids: Sequence[int], repetitions: int, threads: int, progress: Any) -> dict[str, list[Run]]:
    """Runs of both phases without warm-ups."""
    total = 2 + repetitions + _DECODE_STEPS
    with tempfile.TemporaryDirectory(prefix="nbl-export-profile-") as traces:
        decoder = located.target.open_profiled(located.path, threads, len(ids) + 1 + _DECODE_STEPS, Path(traces))
        for done in range(1 + repetitions):
            decoder.begin()
            decoder.run(ids)
            progress(done + 1, total)
        for done in range(1 + _DECODE_STEPS):
            decoder.run(ids[:1])
            progress(1 + repetitions + done + 1, total)
        runs = read_trace(decoder.trace())
    return {"prefill": runs[1 : 1 + repetitions], "decode": runs[2 + repetitions :]}


# -- the trace -------------------------------------------------------------------------------------------


def read_trace(events: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The runs in ONNX Runtime's trace, in run order; loading the model is not a run.

    Raises:
        NblError: the trace has no events of nodes.
    """
    whole = sorted((e["ts"], e["dur"]) for e in events if e.get("name") == "model_run")
    starts = [start for start, _ in whole]
    kernels: list[list[tuple[str, str, int]]] = [[] for _ in whole]
    nodes = (e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith(_KERNEL))
    for event in sorted(nodes, key=lambda e: e["ts"]):
        run = bisect.bisect_right(starts, event["ts"]) - 1
        if run >= 0:
            name = str(event["name"]).removesuffix(_KERNEL)
            kernels[run].append((name, str(event["args"]["op_name"]), int(event["dur"])))
    if not any(kernels):
        raise NblError("ONNX Runtime's profile has no events of nodes; this version may write other events")
    return [Run(int(duration), tuple(own)) for (_, duration), own in zip(whole, kernels, strict=True)]


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Milliseconds a run over runs of the same kind: in total, by operator, and of the slowest nodes.

    share: of the time of all kernels. The rest of a run (`run_ms` minus `kernels_ms`) is ONNX Runtime's overhead.
    run_ms is a median, all other figures are means.
    """
    operators: dict[str, list[int]] = {}
    nodes: dict[tuple[str, str], int] = {}
    for run in runs:
        for name, operator, duration in run.kernels:
            operators.setdefault(operator, []).append(duration)
            nodes[name, operator] = nodes.get((name, operator), 0) + duration
    total = max(1, sum(map(sum, operators.values())))
    count = 1000 * len(runs)
    dearest = sorted(nodes.items(), key=lambda item: -item[1])[:_TOP_NODES]
    return {
        "runs": len(runs),
        "run_ms": statistics.median(run.total_us for run in runs) / 1000,
        "kernels_ms": total / count,
        "operators": [
            {"operator": o, "calls": len(times) / len(runs), "ms": sum(times) / count, "share": sum(times) / total}
            for o, times in sorted(operators.items(), key=lambda item: -sum(item[1]))
        ],
        "nodes": [
            {"node": name, "operator": operator, "ms": us / count, "share": us / total}
            for (name, operator), us in dearest
        ],
    }
