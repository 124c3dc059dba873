"""Where the time of a shipped graph goes, operator by operator: `bench DIR --profile`.

    prefill of pp tokens, some times ┐  ONNX Runtime's profile: one event a run,  ─► by operator: calls, ms, share
    decode steps behind it           ┘  one a node                                ─► the dearest nodes

The first run of a kind is a warm-up. Decoders are profiled one after the other, and a profiled run is slower than
another one (two clock readings a node): this says where time goes; what is faster is said by `bench` without it.
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
from rich.console import Group
from rich.table import Table

from nbl_export.errors import NblError, UsageError
from nbl_export.progress import Ui
from nbl_export.records import JobOptions
from nbl_export.serving import Located, available_engine, is_model_directory, locate

__all__ = ["Run", "check_request", "profile", "profile_table", "read_trace", "summarise"]

_PREFILLS = 5
_DECODE_STEPS = 16
_TOP_NODES = 10
_RARE = 0.001  # share of time below which operators share one line of the table
_KERNEL = "_kernel_time"
_PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Run:
    """One run of a graph: microseconds in all, and (node, operator, microseconds) of its kernels in their order."""

    total_us: int
    kernels: tuple[tuple[str, str, int], ...]


def check_request(
    directories: Sequence[Path], against: Path | None, changes: Mapping[str, Any], *others: object
) -> None:
    """Refuse options that a profile has no use for.

    Args:
        changes: options of the benchmark that were given, by their names in JobOptions.
        others: formats and files.

    Raises:
        UsageError: several directories, options of a comparison, or more than one setting.
    """
    if len(directories) > 1 or against is not None:
        raise UsageError("--profile is of one directory; name one, without --against")
    if any(others):
        raise UsageError("--profile has a table and --json; leave --format and --output out")
    for name, flag in (("depths", "--depth"), ("batches", "--batch"), ("generate_tokens", "--generate-tokens")):
        if name in changes:
            raise UsageError(f"{flag} is not for --profile, which runs --prompt-tokens and decode steps behind them")
    for name, flag in (("prompt_tokens", "--prompt-tokens"), ("threads", "--threads")):
        if len(changes.get(name, ())) > 1:
            raise UsageError(f"--profile is of one setting; give {flag} one number")


def profile(directory: Path, options: JobOptions, ui: Ui, *, force: bool = False) -> dict[str, Any]:
    """Profile the original/ and the model/ of a run directory, or a deployable directory by itself.

    Args:
        options: first of prompt_tokens, repetitions (runs of prefill, default 5), first of threads, seed.

    Raises:
        NblError: nothing to run there, not for ONNX Runtime's CPU provider, or a prompt beyond the context.
    """
    from nbl_export.engines.ort import GenaiSettings

    decoders = _decoders(directory, force)
    prompt, steps = options.prompt_length, _DECODE_STEPS
    threads = options.first_threads
    for located in decoders.values():
        if (located.engine, located.provider) != ("ort", "cpu"):
            raise NblError(f"--profile is of ONNX Runtime on the CPU, {located.path} is for {_spoken(located)}")
        threads = threads or available_engine(located).default_threads()
        context = GenaiSettings.read(located.path).context_length
        if prompt + 1 + steps > context:
            raise NblError(
                f"{prompt} tokens and {1 + steps} decode steps are more than the context of {located.path}, {context}; "
                "use a smaller --prompt-tokens"
            )
    found = {}
    for name, located in decoders.items():
        vocab = GenaiSettings.read(located.path).vocab_size
        ids = np.random.default_rng(options.seed).integers(0, vocab, prompt).tolist()
        with ui.task(f"profiling {name}") as progress:
            runs = _run(located.path, ids, options.repetitions or _PREFILLS, int(threads or 1), progress)
        found[name] = {"path": str(located.path), **{phase: summarise(of) for phase, of in runs.items()}}
    return {"prompt_tokens": prompt, "threads": threads, "decoders": found}


def _decoders(directory: Path, force: bool) -> Mapping[str, Located]:
    if is_model_directory(directory):
        return {directory.name or str(directory): locate(directory)}
    return {"original": locate(directory, original=True), "nbl": locate(directory, force=force)}


def _spoken(located: Located) -> str:
    return located.engine if located.provider == "cpu" else f"--provider {located.provider}"


def _run(directory: Path, ids: Sequence[int], repetitions: int, threads: int, progress: Any) -> dict[str, list[Run]]:
    """Runs of both phases, warm-ups left out."""
    from nbl_export.engines.ort_profile import ProfiledDecoder

    total = 2 + repetitions + _DECODE_STEPS
    with tempfile.TemporaryDirectory(prefix="nbl-export-profile-") as traces:
        decoder = ProfiledDecoder(directory, threads, len(ids) + 1 + _DECODE_STEPS, Path(traces))
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
    """The runs of ONNX Runtime's trace, in the order they ran; loading the model is no run.

    Raises:
        NblError: there are no events of nodes.
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
        raise NblError("ONNX Runtime's profile has no events of nodes; another version of it may write others")
    return [Run(int(duration), tuple(own)) for (_, duration), own in zip(whole, kernels, strict=True)]


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """What runs of the same kind have in common: milliseconds a run, by operator and of the dearest nodes.

    share: of the time of all kernels. The rest of a run (`run_ms` less `kernels_ms`) is ONNX Runtime's own. run_ms is a
    median, all others are means.
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


# -- for people ------------------------------------------------------------------------------------------


def profile_table(found: Mapping[str, Any]) -> Group:
    """`profile` for people: decoders side by side by operator, then the dearest nodes of each."""
    titles = {"prefill": f"Prefill of {found['prompt_tokens']} tokens", "decode": "One decode step behind it"}
    tables: list[Table] = []
    for phase in _PHASES:
        tables.append(_operators(titles[phase], {name: d[phase] for name, d in found["decoders"].items()}))
    for name, decoder in found["decoders"].items():
        for phase in _PHASES:
            table = Table("node", "operator", "ms", "share", title=f"Dearest nodes: {name}, {phase}")
            for node in decoder[phase]["nodes"]:
                table.add_row(node["node"], node["operator"], f"{node['ms']:.2f}", f"{100 * node['share']:.1f}%")
            tables.append(table)
    return Group(*tables)


def _operators(title: str, of_decoders: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("operator", title=title)
    for name in of_decoders:
        for column in (f"{name}: calls", "ms", "share"):
            table.add_column(column, justify="right")
    rows = {name: {o["operator"]: o for o in d["operators"]} for name, d in of_decoders.items()}
    spent = {o: max(r.get(o, {"ms": 0.0})["ms"] for r in rows.values()) for own in rows.values() for o in own}
    rare = {o for o in spent if all(own.get(o, {"share": 0.0})["share"] < _RARE for own in rows.values())}
    for operator in sorted(spent.keys() - rare, key=lambda o: -spent[o]):
        cells: list[str] = []
        for own in rows.values():
            o = own.get(operator)
            cells += ["", "", ""] if o is None else [f"{o['calls']:g}", f"{o['ms']:.2f}", f"{100 * o['share']:.1f}%"]
        table.add_row(operator, *cells)
    if rare:
        left = [sum(own[o]["ms"] for o in rare if o in own) for own in rows.values()]
        table.add_row(f"{len(rare)} others", *(cell for ms in left for cell in ("", f"{ms:.2f}", "")))
    table.add_section()
    kernels = [cell for d in of_decoders.values() for cell in ("", f"{d['kernels_ms']:.2f}", "")]
    whole = [cell for d in of_decoders.values() for cell in (f"{d['runs']} runs", f"{d['run_ms']:.2f}", "")]
    table.add_row("all kernels", *kernels)
    table.add_row("a run, median", *whole)
    return table
