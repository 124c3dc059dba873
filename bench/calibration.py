"""What text, number of tokens, ridge and weight of tokens are worth to maps in closed form.

    python bench/calibration.py MODEL DATA [--layers 7,9,14,25-29] [--tokens 131072] > bench/results/FILE.json

One factor at a time beside the tool's own choice (65,536 tokens of the default text, ridge 1e-6, every token alike), on
the normed tap. Judged as `bench/quality.py` judges, on texts of which only c4_demo.json's beginning is calibrated on.

text       C4 alone; the default text; what the model itself says (--data-free)
tokens     the beginning of the default text
ridge      relative to the mean square of the inputs
weights    the first 16 tokens of a window 16 times; rows of massive norm (beyond four times the median) not at all;
           every row by the inverse square of its norm
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import quality

Rows = Mapping[int, tuple[Any, Any]]  # layer -> x, y [N, D]
RIDGES = (1e-8, 1e-4, 1e-2, 1e-1)


def rows_of(bed: quality.Bed, windows: Any, layers: tuple[int, ...]) -> Rows:
    """What goes into attention (behind the norm) and comes out, of every token."""
    import torch

    found: dict[int, list[tuple[Any, Any]]] = {i: [] for i in layers}

    def note(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, kwargs: Any, output: Any) -> None:
            found[layer].append((kwargs["hidden_states"].flatten(0, 1), output[0].flatten(0, 1)))

        return hook

    decoder = bed.model.get_decoder()
    hooks = [decoder.layers[i].self_attn.register_forward_hook(note(i), with_kwargs=True) for i in layers]
    with torch.inference_mode():
        for batch in windows.split(8):
            decoder(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {i: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])) for i, pairs in found.items()}


def maps_of(rows: Rows, count: int, ridge: float, weigh: Callable[[Any], Any] | None = None) -> dict[int, Any]:
    """Maps fitted on the first rows. weigh: x [N, D] -> weights [N]."""
    from nbl_export import lmmse

    maps = {}
    for layer, (x, y) in rows.items():
        x, y = x[:count].double(), y[:count].double()
        weights = x.new_ones(len(x)) if weigh is None else weigh(x)
        wx, wy = x * weights[:, None], y * weights[:, None]
        moments = lmmse.Moments(weights.sum().item(), wx.sum(0), wy.sum(0), wx.T @ x, wy.T @ x, wy.T @ y)  # type: ignore[arg-type]
        maps[layer] = lmmse.fit(moments, layer, ridge)
    return maps


def first_tokens(x: Any) -> Any:
    """16 for the first 16 tokens of a window, 1 for the others."""
    import torch

    return torch.where(torch.arange(len(x)) % quality.CONTEXT < 16, 16.0, 1.0).double()


def without_massive(x: Any) -> Any:
    norms = x.norm(dim=1)
    return (norms <= 4 * norms.median()).double()


def by_norm(x: Any) -> Any:
    return 1 / x.square().mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--layers", default="7,9,14,25-29")
    parser.add_argument("--tokens", type=int, default=131_072, help="of the default text, at most")
    parser.add_argument("--windows", type=int, default=16, help="of each text to judge by")
    options = parser.parse_args()
    import torch

    from nbl_export import corpus, lmmse, narrow, sampling
    from nbl_export.artifacts import versions
    from nbl_export.bench import machine
    from nbl_export.plan import parse_layers

    bed = quality.Bed(options.model, options.data, "default", options.windows, options.tokens, taps=())
    layers = parse_layers(options.layers, bed.spec.num_layers)
    assert isinstance(layers, tuple), "name the layers"
    own, found, cpu = quality.TOKENS, [], torch.device("cpu")

    def judge(factor: str, value: str, maps: dict[int, Any]) -> None:
        with narrow.products(cpu, narrow.fast(cpu)):
            price = bed.prices(maps, "normed", {f"{factor} {value}": layers})[f"{factor} {value}"]
        found.append({"factor": factor, "value": value, "price": price})

    rows = rows_of(bed, bed.training, layers)
    judge("own", "", maps_of(rows, own, lmmse.RIDGE))
    count = 8192
    while count <= options.tokens:
        if count != own:
            judge("tokens", str(count), maps_of(rows, count, lmmse.RIDGE))
        count *= 2
    for ridge in RIDGES:
        judge("ridge", str(ridge), maps_of(rows, own, ridge))
    for weigh in (first_tokens, without_massive, by_norm):
        judge("weights", weigh.__name__, maps_of(rows, own, lmmse.RIDGE, weigh))
    del rows
    c4, _ = corpus.pack(
        corpus.read_text(str(options.data / "c4" / "c4_demo.json")), bed.tokenizer, own, quality.CONTEXT, quality.HELD
    )
    judge("text", "c4", maps_of(rows_of(bed, c4, layers), own, lmmse.RIDGE))
    started = time.monotonic()
    said = sampling.sample_windows(bed.model, own // quality.CONTEXT, quality.CONTEXT, 0, lambda _d, _t: None)
    seconds = time.monotonic() - started
    judge("text", "data-free", maps_of(rows_of(bed, said, layers), own, lmmse.RIDGE))
    about = {"layers": list(layers), "calibration": bed.text, "sampling_seconds": seconds, "machine": machine()}
    print(json.dumps({**about, "versions": versions(("torch", "transformers")), "rows": found}, indent=1))


if __name__ == "__main__":
    main()
