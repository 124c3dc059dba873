"""Tables of the first page of results: a table a model, engines with loss beside speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tables_quality import TASKS, increase, rise
from tables_speed import decided, describe_pair, measured, paired

from nbl_export.records.paired import PairedRatio
from nbl_export.records.plan import describe_layers

Rows = list[Sequence[str]]
Read = Callable[[str], Any]
_HEAD = (("replaced layers, maps", "perplexity, first text", "Python's docs", "LAMBADA, ARC-Easy, PIQA", "prefill 512",
          "prefill 2,048", "decode after 2,048", "cache"), "lrrrrrrr")  # fmt: skip
_TESTS = (("pp512", 0), ("pp2048", 0), ("tg", 2048))
_NO_TESTS = ("", "", "")


@dataclass(frozen=True)
class Found:
    """A set of layers, and where the raw results have its figures."""

    maps: str
    layers: Sequence[int]
    losses: Sequence[str]
    speeds: Sequence[str] = _NO_TESTS
    tasks: str = ""  # empty: not measured


def _row(found: Found, num_layers: int) -> Sequence[str]:
    layers = describe_layers(tuple(found.layers)) or "none"
    cache = f"−{100 * len(found.layers) / num_layers:.1f}%" if found.layers else "0%"
    return f"{layers}; {found.maps}", *found.losses, found.tasks, *found.speeds, cache


def _job(run: Mapping[str, Any], maps: str, losses: Sequence[str], layers: Sequence[int] = ()) -> Found:
    """A job, with the speeds that were measured."""
    return Found(maps, layers, losses, [measured(run, *test) for test in _TESTS])


def _exits(read: Read, model: str) -> list[Found]:
    """The jobs of a model with predicted KV, of `bench/exit_layers.py`."""
    found = []
    for run in read("exit-layers")["rows"]:
        title, _, how = run["title"].partition(", ")
        losses = [increase(loss) for loss in run["losses"]]
        stop = run["exit"]
        maps = f"predicted KV from layer {stop['layer']} on, {stop['recent_tokens']} recent tokens, {how}"
        found += [_job(run, maps, losses)] if title == model else []
    return found


def _staged(run: Mapping[str, Any]) -> Found:
    """A job of `bench/stages.py`. Its raw results have no samples of speed."""
    losses = [increase(loss) for loss in run["quality_loss"]]
    speeds = [_stated(run["ratios"], *test) for test in _TESTS]
    return Found("closed form, by a job", run["replaced_layers"], losses, speeds)


def _stated(ratios: Sequence[Mapping[str, Any]], test: str, depth: int) -> str:
    """The ratio of a test whose samples were not kept; empty if there is none."""
    names = ("ratio", "low", "high", "confidence", "loads")
    found = (row for row in ratios if row["test"].startswith(test) and row["depth"] == depth)
    return next((describe_pair(PairedRatio(**{name: row[name] for name in names})) for row in found), "")


def _losses(by_text: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    return f"C4 {rise(by_text['c4 rest'])}", rise(by_text["python pydoc_data/topics.py"])


def _points(tasks: Mapping[str, Any], row: str) -> str:
    return _describe_changes({name: tasks[name]["rows"][row]["acc"]["change"] for name in TASKS})


def _describe_changes(changes: Mapping[str, float]) -> str:
    return ", ".join(f"{100 * changes[name]:+.1f}".replace("-", "−") for name in TASKS)


def _ordered(read: Read, name: str, kind: str, maps: str, tasks: str = "") -> Found:
    """A set in closed form that a rule chose, by `bench/quality.py orders`."""
    run = read(f"orders-{name}")
    layers = next(layers for layers, of in run["sets"].items() if of == kind)
    named = [int(i) for i in layers.split(",")]
    return Found(maps, named, _losses(run["residual"][layers]), tasks=tasks)


def qwen(read: Read) -> Rows:
    """Qwen2.5-Coder-0.5B: predicted KV, a limit of 10%, and sets of three, six and nine layers."""
    tasks, speeds = read("tasks-qwen")["tasks"], read("ladder-qwen-fp32")
    found = [*_exits(read, "Qwen2.5-Coder-0.5B"), _staged(read("stages-qwen"))]
    for i, (count, name) in enumerate((("3", "distill-qwen-3"), ("6", "distill-qwen"), ("9", "distill-qwen-9"))):
        run, points = read(name)["distill"], "" if count == "9" else _points(tasks, f"ours {count}")
        chosen = _ordered(read, "qwen", f"efficient {count}", "closed form", points)
        prefill = measured(speeds, "pp512", 0, list(speeds["variants"])[i + 1])
        found.append(replace(chosen, speeds=(prefill, "", "")))
        trained = _points(tasks, "distilled 6") if count == "6" else ""
        found.append(Found("distilled", run["layers"], _losses(run["distilled"]), tasks=trained))
    for count in ("3", "6", "9"):
        points = "" if count == "9" else _points(tasks, f"paper {count}")
        found.append(_ordered(read, "qwen", f"cca {count}", "the paper's choice", points))
    return [*_HEAD, *(_row(one, 24) for one in found)]


def smollm2(read: Read) -> Rows:
    """SmolLM2-135M: predicted KV, a limit of 10%, eight linear layers, and sets of four, eight and twelve layers."""
    eight = read("demo-smollm2-fp32")
    losses = [increase(loss) for loss in eight["quality_loss"]]
    tasks, trained = read("tasks-smollm2")["tasks"], read("tasks-distilled-smollm2")["tasks"]
    bias = read("distill-affine-smollm2")["distill"]
    table = read("graph-tasks-smollm2")["table"]
    shipped = _describe_changes({r["task"]: r["differences"][0]["value"] for r in table if r["metric"] == "acc"})
    found = [
        *_exits(read, "SmolLM2-135M"),
        _staged(read("stages-smollm2")),
        _job(eight, "closed form, calibrated on 65,536 tokens", losses, eight["replaced_layers"]),
        Found("closed form", bias["layers"], _losses(bias["independent"]), tasks=shipped),
        Found("distilled", bias["layers"], _losses(bias["distilled"])),
    ]
    for count in ("4", "8", "12"):
        row = f"distilled {count}"
        layers = trained["piqa"]["rows"][row]["layers"]
        found.append(Found("distilled", layers, ("", ""), tasks=_points(trained, row)))
    for count in ("4", "8"):
        found.append(_ordered(read, "smollm2", f"cca {count}", "the paper's choice", _points(tasks, f"cca {count}")))
    return [*_HEAD, *(_row(one, 30) for one in found)]


def seen(read: Read) -> Rows:
    """Perplexity of default jobs and of sets of linear layers, beside the change of tasks in points."""
    heads = ("model and kind", "perplexity, first text", "Python's documentation", *(TASKS[task] for task in _CHOICES))
    rows: Rows = [heads, "lrrrr"]
    for run in read("exit-layers")["rows"]:
        if decided(run):
            changes = {row["task"]: row["differences"][0]["value"] for row in run["tasks"] if row["metric"] == "acc"}
            rows.append((f"{run['title']}, predicted KV", *map(increase, run["losses"]), *_changes(changes)))
    for title, name, kind, row in _SEEN:
        tasks = read(f"tasks-{name}")["tasks"]
        changes = {task: tasks[task]["rows"][row]["acc"]["change"] for task in _CHOICES}
        rows.append((title, *_ordered(read, name, kind, "").losses, *_changes(changes)))
    bias = read("distill-affine-smollm2")["distill"]
    table = read("graph-tasks-smollm2")["table"]
    changes = {row["task"]: row["differences"][0]["value"] for row in table if row["metric"] == "acc"}
    rows.append(("SmolLM2-135M, eight linear layers", *_losses(bias["independent"]), *_changes(changes)))
    return rows


_CHOICES = ("arc_easy", "piqa")
_SEEN = (
    ("Qwen2.5-Coder-0.5B, three linear layers", "qwen", "efficient 3", "ours 3"),
    ("Qwen2.5-Coder-0.5B, six linear layers", "qwen", "efficient 6", "ours 6"),
    ("SmolLM2-135M, four linear layers (`cca`)", "smollm2", "cca 4", "cca 4"),
)


def _changes(by_task: Mapping[str, float]) -> list[str]:
    """The change of each task with choices in points."""
    found = (by_task.get(task) for task in _CHOICES)
    return ["not measured" if value is None else f"{100 * value:+.1f}".replace("-", "−") for value in found]


def engines(read: Read) -> Rows:
    """Speed over the original of the same engine and precision, beside the loss of the same layers."""
    rows: Rows = [("engine", "weights", "layers replaced", "perplexity", "prefill 512", "prefill 2,048",
                   "decode after 512"), "lllrrrr"]  # fmt: skip
    for model, name in (("SmolLM2", "int4-smollm2"), ("Qwen", "int4-qwen")):
        rows.append(_ort(read(name), model))
    return rows


def _ort(run: Any, model: str) -> Sequence[str]:
    """ONNX Runtime: a decoder in int4 over the original in int4."""
    tests = {(r["test"], r["depth"]) for r in run["rows"]}
    (figures,) = [r["figures"] for r in run["quality"] if r["task"] == "perplexity:c4"]
    loss = f"C4 {100 * (figures['nbl']['value'] / figures['original']['value'] - 1):+.0f}%"
    asked = (("pp512", 0), ("pp2048", 0), ("tg48", 512))
    shown = [describe_pair(paired(run, "int4, NBL", *test)) if test in tests else "" for test in asked]
    return ("ONNX Runtime", "int4", f"{model}, {len(run['made']['layers'][0])}", loss, *shown)
