"""What is recognised in a decoder graph, for people."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Group
from rich.table import Table

from nbl_export.records.plan import spoken_layers

__all__ = ["graph_table"]

_LOGITS = {"last": "of the last token", "all": "of all tokens", None: "no output of that name"}


def graph_table(facts: dict[str, Any]) -> Group:
    """`rewrite.describe.describe_graph` as tables: the decoder, its caches, what can be done to each layer."""
    head = Table(show_header=False, box=None)
    opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in facts["opsets"].items())
    weights = ", ".join(f"{count} {kind}" for kind, count in facts["weights"].items())
    for name, value in (
        ("graph", f"{facts['graph']} ({facts['bytes'] / 2**20:,.1f} MiB with its data)"),
        ("made by", facts["producer"] or "it does not say"),
        ("operators", f"{facts['nodes']} nodes, {opsets}"),
        ("decoder", _decoder(facts["decoder"])),
        ("replaced", ", ".join(map(str, facts["replaced_layers"])) or "no layer"),
        ("inputs", ", ".join(facts["inputs"])),
        ("precision", f"{facts['precision'] or 'unknown'} ({weights} matrices)"),
        ("logits", _LOGITS[facts["logits"]]),
        ("last token only", "possible" if facts["tail"] is None else f"not possible: {facts['tail']}"),
    ):
        head.add_row(name, str(value))
    caches = {cache["layer"]: cache for cache in facts["caches"]}
    table = Table("layers", "caches", "shape", "can become a map", title="Attention layers")
    for (taps, reason), group in groupby(facts["layers"], key=lambda f: (tuple(f["taps"]), f["reason"])):
        layers = [row["layer"] for row in group]
        cache = caches[layers[0]]
        shape = "?" if cache["shape"] is None else " x ".join(map(str, cache["shape"]))
        rewrite = f"no: {reason}" if reason else f"yes, of {' or '.join(taps)} input"
        table.add_row(spoken_layers(layers), ", ".join(cache["inputs"]), f"{shape} {cache['dtype']}", rewrite)
    return Group(head, table)


def _decoder(decoder: dict[str, Any]) -> str:
    said = {name: "?" if value is None else value for name, value in decoder.items()}
    return (
        f"{decoder['architecture'] or 'unnamed'}, {said['num_layers']} layers, hidden size {said['hidden_size']}, "
        f"{said['num_heads']} query and {said['num_kv_heads']} key/value heads of {said['head_dim']}, "
        f"vocabulary {said['vocab_size']}"
    )
