"""Compares choices of layers and fits: KL and perplexity on five texts, with the same windows for every row.

    python bench/quality.py MODEL DATA orders  --text default --counts 4,8 > bench/results/orders-<model>.json
    python bench/quality.py MODEL DATA sets    --text default --layers "0,7,24-29;7,9,15" > ...
    python bench/quality.py MODEL DATA distill --text default --layers 0,7,24-29 --steps 60 > ...

DATA holds c4/c4_demo.json, c4/graphmark_c4_realnewslike_500.jsonl, wikitext-2-raw/wiki.valid.raw. Calibration uses
65,536 tokens in windows of 512, from the first documents of c4_demo.json ("c4") or from nbl-export's default text.
Figures use windows spread evenly over each text; c4_demo.json without its calibration and held-back tokens. The
original is computed once for all rows.

orders    nbl-export's own order and the paper's at each of --counts, and the sets in --layers
alone     each layer by itself in closed form, on WikiText-2 and on passages of it that occur twice
sets      the sets of layers in --layers, separated by semicolons, closed form on the residual stream
distill   one set of layers, in closed form and distilled; --keep DIR saves both maps
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bed import TOKENS, Bed
from choices import cost_model, dropped, judged
from trained import distilled


def sets(bed: Bed, named: Sequence[str]) -> dict[str, Any]:
    """Rows of sets of layers by name, and their modelled speed-up of a prefill of 512 tokens in float32."""
    from nbl_export.measure.cost import map_sizes
    from nbl_export.options.goals import parse_layers

    count = len(bed.moments["residual"])
    maps = bed.maps("residual", range(count))
    replaced_sets = {name: tuple(parse_layers(name, count)) for name in named}  # type: ignore[arg-type]
    costs = cost_model(bed)
    speed = {
        n: costs.speedup_of_sizes(map_sizes({i: maps[i] for i in replaced_set})).prefill
        for n, replaced_set in replaced_sets.items()
    }
    return {"modelled_prefill": speed, "residual": bed.quality_losses(maps, "residual", replaced_sets)}


def alone(bed: Bed) -> dict[str, Any]:
    """Rows of each layer by itself: layers that copy from far back lose little on ordinary text."""
    from nbl_export.text.windows import repeated

    rows = bed.texts["wikitext-2 valid"]
    bed.texts = {"wikitext-2 valid": rows, "passages twice": repeated(rows, 2048)}
    layers = range(bed.spec.num_layers)
    return {"residual": bed.quality_losses(bed.maps("residual", layers), "residual", {str(i): (i,) for i in layers})}


def orders(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """nbl-export's order, the paper's order, and the sets of --layers, at --counts: quality and modelled speed."""
    from nbl_export.mixers import lmmse
    from nbl_export.plan.order import ranked

    counts = [int(n) for n in options.counts.split(",")]
    maps = bed.maps("residual", range(bed.spec.num_layers))
    scores = [lmmse.score(m, i) for i, m in bed.moments["residual"].items()]
    steps, seconds = judged(bed, maps, max(counts), "residual")
    order = steps[-1].layers
    named = {
        ",".join(map(str, sorted(layers[:n]))): (name, n)
        for name, layers in (("efficient", order), ("cca", ranked(scores)))
        for n in counts
    }
    asked = [*named, *(text for text in options.layers.split(";") if text)]
    ours = {str(n): tuple(sorted(order[:n])) for n in counts}
    return {
        "order": list(order), "losses": [step.loss for step in steps], "seconds": seconds,
        "sets": {name: f"{kind} {n}" for name, (kind, n) in named.items()}, **sets(bed, asked),
        "drop": bed.quality_losses(dropped(maps), "residual", ours),
        "normed": bed.quality_losses(bed.maps("normed", order), "normed", ours),
        "normed without bias": bed.quality_losses(
            bed.maps("normed", order, bias=False), "normed", ours
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=("alone", "orders", "sets", "distill"))
    parser.add_argument("--text", choices=("c4", "default"), default="c4")
    parser.add_argument("--windows", type=int, default=16, help="windows from each text")
    parser.add_argument("--c4-windows", type=int, help="windows from C4; 181 for all of its remaining text")
    parser.add_argument("--narrow-judge", action="store_true", help="bfloat16 products, where the processor has them")
    parser.add_argument("--layers", default="")
    parser.add_argument("--counts", default="4,8", help="numbers of layers, for orders")
    parser.add_argument("--keep", type=Path, help="directory for the maps of distill")
    parser.add_argument("--linear", action="store_true", help="distill: maps without a bias")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--train-tokens", type=int, default=TOKENS, help="tokens for distillation")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--label-weight", type=float, help="weight of the text's own next tokens in distillation")
    options = parser.parse_args()
    from nbl_export.files import versions
    from nbl_export.measure.benchmark import machine

    taps = {"distill": ("normed",), "alone": ("residual",)}.get(options.what, ("residual", "normed"))
    bed = Bed(
        options.model, options.data, options.text, options.windows, options.train_tokens, taps, options.c4_windows,
        options.narrow_judge,
    )  # fmt: skip
    if options.what == "alone":
        result = alone(bed)
    elif options.what == "sets":
        result = sets(bed, options.layers.split(";"))
    elif options.what == "orders":
        result = orders(bed, options)
    else:
        result = {"distill": distilled(bed, options)}
    asked = {k: v for k, v in vars(options).items() if k not in ("model", "data", "keep")}
    about = {"asked": asked, "calibration": {**bed.text, "tokens": int(bed.windows.numel())}, "machine": machine()}
    print(json.dumps({**about, "versions": versions(("torch", "transformers")), **result}, indent=1))


if __name__ == "__main__":
    main()
