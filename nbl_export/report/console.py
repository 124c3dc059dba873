"""What commands print: tables of a run directory, a graph, a measurement, and this machine's engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from nbl_export.measure.instruments import spoken_background
from nbl_export.measure.paired import spoken_test
from nbl_export.quality import spoken_interval
from nbl_export.records.plan import spoken_layers
from nbl_export.report import quality, speed
from nbl_export.report.table import Column, Shown, Table, facts

__all__ = [
    "METHOD_NAMES",
    "checks_table",
    "describe_table",
    "doctor_table",
    "engines_table",
    "eval_table",
    "graph_table",
    "ladder_table",
    "profile_table",
    "scores_table",
    "speculative_table",
    "speed_table",
    "sweep_table",
]

METHOD_NAMES = {"nbl": "NBL", "drop": "dropped", "distilled": "distilled"}  # of a sweep's points
_LOGITS = {"last": "of the last token", "all": "of all tokens", None: "no output of that name"}
_RARE = 0.001  # share of time below which operators share one line of the table
_PHASES = ("prefill", "decode")
speculative_table = speed.speculative_table


# -- a run directory, a graph, engines ------------------------------------------------------------------------------


def describe_table(found: dict[str, Any]) -> Shown:
    """A run directory, see `run.describe`."""
    logits = found["logits"]
    head = facts([
        ("model", found["model"]["name"]),
        ("decoder", _decoder(found["decoder"])),
        ("precision", ", ".join(filter(None, (found["precision"], found["codes"])))),
        ("logits", f"{_LOGITS[logits]}, in both decoders" if logits in ("last", "all") else "not built yet"),
        ("replaced layers", _layers(found["replaced_layers"])),
        *_looked_up(found["token_table"]),
        ("status", found["status"]),
        ("stages", ", ".join(f"{n} {s:.1f} s" for n, s in found["stages"].items()) or "none finished"),
        ("command", found["command"]),
    ])  # fmt: skip
    columns = ("decoder", *Column.numbers("layers with cache", "cache bytes a token", "size on disk"))
    rows = ((name, *_variant(variant)) for name, variant in found["variants"].items())
    graphs = Table.of(columns, rows, "Graphs")
    return (head, graphs, engines_table(found["engines"])) if found["engines"] else (head, graphs)


def _decoder(decoder: Mapping[str, Any]) -> str:
    known = {name: "?" if value is None else value for name, value in decoder.items()}
    return (
        f"{decoder['architecture'] or 'unnamed'}, {known['num_layers']} layers, hidden size {known['hidden_size']}, "
        f"{known['num_heads']} query and {known['num_kv_heads']} key/value heads of {known['head_dim']}"
    )


def _looked_up(table: dict[str, Any] | None) -> list[tuple[str, str]]:
    return [("looked up", f"{_layers(table['layers'])}: a table of tokens, {_mib(table['bytes'])}")] if table else []


def _layers(replaced: list[int] | None) -> str:
    return "not planned yet" if replaced is None else ", ".join(map(str, replaced)) or "none"


def _variant(variant: Mapping[str, Any] | None) -> tuple[Any, ...]:
    if variant is None:
        return "not built yet", "", ""
    return variant["cache_layers"], f"{variant['kv_cache_bytes_per_token']:,}", _mib(variant["model_bytes"])


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def engines_table(engines: dict[str, Any]) -> Table:
    """What the build stage made."""
    columns = ("engine", "made by", "precision", *Column.numbers("size", "built in", "caches of all slots"))
    return Table.of(columns, [
        (name, f"{made['engine']} {made['version']}", made["precision"], _mib(made["plan_bytes"]),
         f"{made['build_seconds']:.1f} s", _mib(made["cache_bytes"]))
        for name, made in engines.items()
    ], "Engines")  # fmt: skip


def graph_table(found: dict[str, Any]) -> Shown:
    """`rewrite.describe.describe_graph`: the decoder, its caches, what can be done to each layer."""
    opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in found["opsets"].items())
    weights = ", ".join(f"{count} {kind}" for kind, count in found["weights"].items())
    vocabulary = "?" if found["decoder"]["vocab_size"] is None else found["decoder"]["vocab_size"]
    head = facts([
        ("graph", f"{found['graph']} ({_mib(found['bytes'])} with its data)"),
        ("made by", found["producer"] or "it does not say"),
        ("operators", f"{found['nodes']} nodes, {opsets}"),
        ("decoder", f"{_decoder(found['decoder'])}, vocabulary {vocabulary}"),
        ("replaced", ", ".join(map(str, found["replaced_layers"])) or "no layer"),
        ("inputs", ", ".join(found["inputs"])),
        ("precision", f"{found['precision'] or 'unknown'} ({weights} matrices)"),
        ("logits", _LOGITS[found["logits"]]),
        ("last token only", "possible" if found["tail"] is None else f"not possible: {found['tail']}"),
    ])  # fmt: skip
    return head, Table.of(("layers", "caches", "shape", "can become a map"), _attention(found), "Attention layers")


def _attention(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for neighbours that can be rewritten alike."""
    caches = {cache["layer"]: cache for cache in found["caches"]}
    for (taps, reason), group in groupby(found["layers"], key=lambda f: (tuple(f["taps"]), f["reason"])):
        layers = [row["layer"] for row in group]
        cache = caches[layers[0]]
        shape = "?" if cache["shape"] is None else " x ".join(map(str, cache["shape"]))
        rewrite = f"no: {reason}" if reason else f"yes, of {' or '.join(taps)} input"
        yield spoken_layers(layers), ", ".join(cache["inputs"]), f"{shape} {cache['dtype']}", rewrite


def doctor_table(found: dict[str, Any], gpu: str) -> Shown:
    """`examine_engines` for people, over a line about the GPU."""
    rows = ((f"{name} ({answer['title']})", "works" if answer["available"] else "no", answer["reason"])
            for name, answer in found.items())  # fmt: skip
    return Table.of(("engine", "", ""), rows, "Engines on this machine"), gpu


# -- plan and sweep -------------------------------------------------------------------------------------------------


def scores_table(manifest: dict[str, Any]) -> Table:
    """Per-layer scores, replaced layers marked."""
    columns = (*Column.numbers("layer", "CCA bound", "NMSE", "relative error"), "")
    rows = ((s["layer"], f"{s['bound']:.3f}", f"{s['nmse']:.4f}", f"{s['relative_error']:.5f}",
             "replaced" if s["layer"] in manifest["replaced_layers"] else "")
            for s in sorted(manifest["scores"], key=lambda s: (s["bound"], s["layer"])))  # fmt: skip
    return Table.of(columns, rows, "Layers, smallest bound first")


def sweep_table(sweep: Mapping[str, Any]) -> Table:
    """Quality and modelled speed, a row for each number of layers."""
    texts = (name for text in sweep["texts"] for name in (f"perplexity {text}", "KL"))
    columns = ("", *Column.numbers("layers", "prefill", "tail-pruned", "decode", *texts), "")
    rows = (_point(point, sweep["recommended"]) for point in sweep["points"])
    title = f"Quality against modelled speed, layers in the order {', '.join(map(str, sweep['order']))}"
    return Table.of(columns, rows, title)


def _point(point: Mapping[str, Any], advice: Mapping[str, Any] | None) -> tuple[str, ...]:
    together = point.get("distilled_for", point["layers"])
    name = METHOD_NAMES[point["method"]] + (f" for {together}" if together != point["layers"] else "")
    chosen = advice is not None and (point["method"], point["layers"]) == (advice["method"], advice["layers"])
    speeds = (f"x{point[name]:.2f}" for name in ("prefill", "prefill_tail_pruned", "decode"))
    losses = (cell for quality_loss in point["quality_losses"] for cell in _loss(quality_loss))
    return name, str(point["layers"]), *speeds, *losses, "recommended" if chosen else ""


def _loss(quality_loss: Mapping[str, Any]) -> tuple[str, str]:
    if quality_loss["perplexity"] is None or quality_loss["increase"] is None:
        return "not finite", "–"
    rise = spoken_interval(quality_loss["increase"], quality_loss["increase_interval"], percent=True, sign=True)
    return f"{quality_loss['perplexity']:.3g}, {rise}", spoken_interval(quality_loss["kl"], quality_loss["kl_interval"])


# -- verification and measurements ----------------------------------------------------------------------------------


def checks_table(result: dict[str, Any]) -> Shown:
    """The verification ladder and the quality loss."""
    title = "Quality loss (not gated; in brackets 95% intervals over windows)"
    return (
        ladder_table(result["checks"], "Verification"),
        *result["proof"],
        quality.losses(result["quality_loss"], title),
    )


def ladder_table(checks: Iterable[Mapping[str, Any]], title: str) -> Table:
    """What each check has seen, and what was allowed."""
    columns = ("check", "subject", "metric", "seen", Column("allowed", "number"), "")
    return Table.of(columns, map(_check, checks), title)


def _check(check: Mapping[str, Any]) -> tuple[str, ...]:
    differs = isinstance(check["tolerance"], float) and "difference" in check["metric"]
    is_number = differs or "margin" in check["metric"]
    seen = "not finite" if check["value"] is None else f"{check['value']:.3g}" if is_number else check["detail"]
    allowed = f"{check['tolerance']:.3g}" if is_number else ""
    return check["check"], check["subject"], check["metric"], seen, allowed, "ok" if check["passed"] else "FAILED"


def speed_table(result: dict[str, Any]) -> Shown:
    """Benchmark rows in llama-bench's columns, with latency; ratios with their intervals."""
    numbers = ("tokens/s", "± stdev", "TTFT ms", "TPOT p50 ms", "p95", "p99")
    rows = (_speeds(row, swept=speed.is_swept(result)) for row in result["rows"])
    table = Table.of(("test", "variant", *Column.numbers(*numbers)), rows, "Speed")
    ratios = [speed.ratios(result, "Paired ratios of tokens/s")] if result["ratios"] else []
    where = result["bench"]["background"]
    said = [f"Speed was {spoken_background(where)}."] if where["busy"] or where["gave_up"] else []
    return table, *ratios, *said


def _speeds(row: Mapping[str, Any], *, swept: bool) -> tuple[str, ...]:
    seconds = (row["ttft_seconds"], *((row["tpot_seconds"] or {}).get(q) for q in ("p50", "p95", "p99")))
    speeds = (row[f"tokens_per_second_{name}"] for name in ("median", "stdev"))
    latency = ("" if s is None else f"{1000 * s:.2f}" for s in seconds)
    return spoken_test(row, swept=swept), row["variant"], *(f"{s:.2f}" for s in speeds), *latency


def eval_table(result: dict[str, Any]) -> Table:
    """Benchmark figures of every variant, and NBL minus original on the same items."""
    columns = ("task", "metric", Column("items", "number"), "variant",
               *Column.numbers("value", "± error", "difference", "± error"))  # fmt: skip
    return Table.of(columns, (line for row in result["table"] for line in _figures(row)), "Quality")


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    against = {d["new"]: d for d in row["differences"]}
    for variant, found in row["figures"].items():
        paired = against.get(variant, {})
        numbers = (found["value"], found["stderr"], paired.get("value"), paired.get("stderr"))
        shown = ("" if n is None else f"{n:.4g}" for n in numbers)
        yield row["task"], row["metric"], str(row["items"]), variant, *shown


def profile_table(found: Mapping[str, Any]) -> Shown:
    """Decoders side by side by operator, then the dearest nodes of each."""
    titles = {"prefill": f"Prefill of {found['prompt_tokens']} tokens", "decode": "One decode step behind it"}
    decoders = found["decoders"]
    columns = ("node", "operator", *Column.numbers("ms", "share"))
    return (
        *(_operators(titles[phase], {name: d[phase] for name, d in decoders.items()}) for phase in _PHASES),
        *(Table.of(columns, ((n["node"], n["operator"], *_spent(n)) for n in decoder[phase]["nodes"]),
                   f"Dearest nodes: {name}, {phase}") for name, decoder in decoders.items() for phase in _PHASES),
    )  # fmt: skip


def _spent(part: Mapping[str, Any]) -> tuple[str, str]:
    return f"{part['ms']:.2f}", f"{100 * part['share']:.1f}%"


def _operators(title: str, of_decoders: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = ("operator", *Column.numbers(*(c for name in of_decoders for c in (f"{name}: calls", "ms", "share"))))
    found = [{o["operator"]: o for o in d["operators"]} for d in of_decoders.values()]
    spent = {o: max(own.get(o, {"ms": 0.0})["ms"] for own in found) for each in found for o in each}
    rare = {o for o in spent if all(own.get(o, {"share": 0.0})["share"] < _RARE for own in found)}
    rows: list[Sequence[str]] = []
    for name in sorted((o for o in spent if o not in rare), key=lambda o: -spent[o]):
        parts = (own.get(name) for own in found)
        cells = (("", "", "") if part is None else (f"{part['calls']:g}", *_spent(part)) for part in parts)
        rows.append((name, *(cell for three in cells for cell in three)))
    if rare:
        left = (sum(own[o]["ms"] for o in rare if o in own) for own in found)
        rows.append((f"{len(rare)} others", *(cell for ms in left for cell in ("", f"{ms:.2f}", ""))))
    kernels = (cell for d in of_decoders.values() for cell in ("", f"{d['kernels_ms']:.2f}", ""))
    whole = (cell for d in of_decoders.values() for cell in (f"{d['runs']} runs", f"{d['run_ms']:.2f}", ""))
    rows += [("all kernels", *kernels), ("a run, median", *whole)]
    return Table.of(columns, rows, title, totals=2)
