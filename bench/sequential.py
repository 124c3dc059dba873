"""Sequential fits against independent ones: is a map better fitted on what the layers below it, replaced, make?

    python bench/sequential.py MODEL DATA [--tokens 32768] [--layers "0,7,24-29;12-19"] > bench/results/FILE.json

Two streams walk the layers once: h of the original, g of the model linearized so far. A replaced layer's map is fitted
on g (at the tap) towards one of

    independent   x from h, y = attention(norm(h))       the paper's
    own           y = attention(norm(g))
    original      y = attention(norm(h))
    correcting    y = (h + attention(norm(h))) - g       also puts right what the layers below lost

Judged as `bench/quality.py` judges: on texts of which only c4_demo.json's beginning is calibrated on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import quality

TARGETS = ("independent", "own", "original", "correcting")
SETS = "0,7,24-29;12-19;22-29"
_BATCH = 8  # windows at once


def walk(model: Any, windows: Any, layers: Sequence[int], tap: str, target: str) -> dict[int, Any]:
    """The maps of the layers, each fitted when the walk comes to it."""
    import torch

    from nbl_export import lmmse
    from nbl_export.linearize import AffineAttention

    decoder = model.get_decoder()
    batches = list(windows.split(_BATCH))
    with torch.no_grad():
        given = _layer_arguments(decoder, batches[0])
        h = [decoder.embed_tokens(ids) for ids in batches]
        g, maps = list(h), {}
        for index, layer in enumerate(decoder.layers[: max(layers) + 1]):
            if index in layers:
                pairs = (_pair(layer, a, b, given, tap, target) for a, b in zip(h, g, strict=True))
                maps[index] = lmmse.fit(_moments(pairs), index)
                affine = AffineAttention(maps[index])
                g = [_behind(layer, b, affine(b if tap == "residual" else layer.input_layernorm(b))[0]) for b in g]
            else:
                g = [layer(b, **given) for b in g]
            h = [layer(a, **given) for a in h] if target != "own" else g
    return maps


def _layer_arguments(decoder: Any, ids: Any) -> dict[str, Any]:
    """What the decoder passes to each of its layers beside the hidden states, for a batch like this one."""
    seen: dict[str, Any] = {}
    hook: Callable[..., None] = lambda _m, _args, kwargs: seen.update(kwargs)  # noqa: E731
    handle = decoder.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    decoder(input_ids=ids, use_cache=False)
    handle.remove()
    return {name: value for name, value in seen.items() if name != "hidden_states"}


def _pair(layer: Any, h: Any, g: Any, given: dict[str, Any], tap: str, target: str) -> tuple[Any, Any]:
    """Rows of x and y."""
    stream = h if target == "independent" else g
    x = stream if tap == "residual" else layer.input_layernorm(stream)
    y = layer.self_attn(hidden_states=layer.input_layernorm(g if target == "own" else h), **given)[0]
    if target == "correcting":
        y = h + y - g
    return x.flatten(0, 1), y.flatten(0, 1)


def _moments(pairs: Any) -> Any:
    from nbl_export.lmmse import Moments

    total: list[Any] = [0, 0, 0, 0, 0, 0]
    for x, y in ((x.double(), y.double()) for x, y in pairs):
        parts = (len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ x, y.T @ y)
        total = [a + b for a, b in zip(total, parts, strict=True)]
    return Moments(*total)


def _behind(layer: Any, residual: Any, attention: Any) -> Any:
    middle = residual + attention
    return middle + layer.mlp(layer.post_attention_layernorm(middle))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--windows", type=int, default=16, help="of each text to judge by")
    parser.add_argument("--layers", default=SETS, help="sets of them, separated by semicolons")
    parser.add_argument("--taps", default="residual,normed")
    options = parser.parse_args()
    from nbl_export.artifacts import versions
    from nbl_export.bench import machine
    from nbl_export.plan import parse_layers

    bed = quality.Bed(options.model, options.data, "c4", options.windows, taps=())
    rows = []
    for name in options.layers.split(";"):
        layers = parse_layers(name, bed.spec.num_layers)
        assert isinstance(layers, tuple), "name the layers"
        for tap in options.taps.split(","):
            for target in TARGETS:
                maps = walk(bed.model, bed.windows[: options.tokens // quality.CONTEXT], layers, tap, target)
                label = f"{name} {tap} {target}"
                price = bed.prices(maps, tap, {label: layers})[label]
                rows.append({"layers": list(layers), "tap": tap, "target": target, "price": price})
    about = {"calibration": {**bed.text, "tokens": options.tokens}, "machine": machine()}
    print(json.dumps({**about, "versions": versions(("torch", "transformers")), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
