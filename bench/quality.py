"""Compares choices of layers and fits: KL and perplexity on five texts, with the same windows for every row.

    python bench/quality.py MODEL DATA orders  --text default --counts 4,8 > bench/results/orders-<model>.json
    python bench/quality.py MODEL DATA distill --text default --layers 0,7,24-29 --steps 60 > ...

DATA holds c4/c4_demo.json, c4/graphmark_c4_realnewslike_500.jsonl, wikitext-2-raw/wiki.valid.raw. Calibration uses
65,536 tokens in windows of 512, from the first documents of c4_demo.json ("c4") or from nbl-export's default text.
Figures use windows spread evenly over each text; c4_demo.json without its calibration and held-back tokens. The
original is computed once for all rows.

orders    nbl-export's own order and the paper's at each of --counts, and the sets in --layers, separated by semicolons
distill   one set of layers, in closed form and distilled; --keep DIR saves both maps
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bed import TOKENS, Bed, log


def orders(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """nbl-export's order, the paper's order, and the sets of --layers, at --counts: quality and modelled speed.

    The speed-up is that of a prefill of 512 tokens in float32.
    """
    from nbl_export.measure.cost import CostModel, map_sizes
    from nbl_export.methods import lmmse
    from nbl_export.methods.linear.maps import Linear
    from nbl_export.methods.linear.order import ranked
    from nbl_export.model.architectures import mlp_of
    from nbl_export.options.goals import parse_layers

    counts, count = [int(n) for n in options.counts.split(",")], bed.spec.num_layers
    maps = bed.maps("residual", range(count))
    scores = [lmmse.score(m, i) for i, m in bed.moments["residual"].items()]
    costs = CostModel(bed.spec, mlp_of(bed.model.config.to_dict()), 4.0, 4.0, 4)
    steps, seconds = judged(bed, maps, max(counts), costs)
    order = steps[-1].layers
    named = {
        ",".join(map(str, sorted(layers[:n]))): (name, n)
        for name, layers in (("efficient", order), ("cca", ranked(scores)))
        for n in counts
    }
    asked = [*named, *(text for text in options.layers.split(";") if text)]
    sets = {name: tuple(parse_layers(name, count)) for name in asked}  # type: ignore[arg-type]
    dropped = {i: Linear.zeros(bed.spec.hidden_size) for i in maps}
    return {
        "order": list(order), "losses": [step.loss for step in steps], "seconds": seconds,
        "sets": {name: f"{kind} {n}" for name, (kind, n) in named.items()},
        "modelled_prefill": {
            name: costs.speedup_of_sizes(map_sizes({i: maps[i] for i in layers})).prefill
            for name, layers in sets.items()
        },
        "residual": bed.quality_losses(maps, "residual", sets),
        "drop": bed.quality_losses(dropped, "residual", {str(n): tuple(sorted(order[:n])) for n in counts}),
    }  # fmt: skip


def judged(bed: Bed, maps: Mapping[int, Any], count: int, costs: Any) -> tuple[Any, float]:
    """The sets of layers in the order that nbl-export chooses by trials, and the seconds of the choice."""
    from nbl_export.measure.cost import map_sizes
    from nbl_export.methods.linear.greedy import Judge, Search
    from nbl_export.methods.losses import PartialReplacement
    from nbl_export.model import bfloat16

    sizes = map_sizes(maps)
    saved: Any = lambda gone: costs.prefill_saved({i: sizes[i] for i in gone})  # noqa: E731
    started, bf16_matmul = time.monotonic(), bfloat16.has_native_bf16(bed.model.device)
    judge = Judge(PartialReplacement(bed.model, maps, "residual", bf16_matmul=bf16_matmul), bed.early_stopping)
    steps = Search(judge, (), saved, lambda _d, _t: None).extend(count)
    seconds = time.monotonic() - started
    log(f"{list(steps[-1].layers)} in {seconds:.0f} s")
    return steps, seconds


def distilled(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """Facts about the closed-form and the distilled maps of one set of layers; --keep DIR saves both."""
    from nbl_export.methods.distill.training import Callbacks, DistillSettings, distill
    from nbl_export.methods.maps_file import save_maps
    from nbl_export.options.goals import parse_layers

    layers = parse_layers(options.layers, bed.spec.num_layers)
    assert isinstance(layers, tuple), "name the layers"
    settings = DistillSettings(options.steps, dtype="auto")
    maps = bed.maps("normed", layers)
    before = bed.quality_losses(maps, "normed", {"independent": layers})["independent"]
    busy = time.process_time()
    held = bed.held[len(bed.held) // 2 :]
    found = distill(bed.model, maps, "normed", bed.training, held, settings, Callbacks(say=log))
    spent, every = time.process_time() - busy, settings.check_every
    after = bed.quality_losses(found.maps, "normed", {"distilled": layers})["distilled"]
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        for name, kept in (("independent", maps), ("distilled", found.maps)):
            save_maps(kept, options.keep / f"{name}.safetensors", "normed")
    return {
        "layers": list(layers), "settings": vars(settings), "text": bed.text["sha256"],
        "train_tokens": options.train_tokens, "seconds": found.seconds,
        "cpu_seconds": spent,  # of all threads; wall time means little on a busy machine
        "steps": len(found.train_kl), "held_kl": found.held_kl,
        "train_kl": [statistics.fmean(found.train_kl[k : k + every]) for k in range(0, len(found.train_kl), every)],
        "independent": before, "distilled": after,
        "removed": {t: 1 - after[t]["increase"] / before[t]["increase"] for t in before},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=("orders", "distill"))
    parser.add_argument("--text", choices=("c4", "default"), default="c4")
    parser.add_argument("--windows", type=int, default=16, help="windows from each text")
    parser.add_argument("--bf16-judge", action="store_true", help="bfloat16 products, where the processor has them")
    parser.add_argument("--layers", default="")
    parser.add_argument("--counts", default="4,8", help="numbers of layers, for orders")
    parser.add_argument("--keep", type=Path, help="directory for the maps of distill")
    parser.add_argument("--train-tokens", type=int, default=TOKENS, help="tokens for distillation")
    parser.add_argument("--steps", type=int, default=320)
    options = parser.parse_args()
    from nbl_export.files import versions
    from nbl_export.measure.benchmark import machine

    tap = "normed" if options.what == "distill" else "residual"
    bed = Bed(
        options.model, options.data, options.text, options.windows, options.train_tokens, (tap,), options.bf16_judge
    )
    result = orders(bed, options) if options.what == "orders" else {"distill": distilled(bed, options)}
    asked = {k: v for k, v in vars(options).items() if k not in ("model", "data", "keep")}
    about = {"asked": asked, "calibration": {**bed.text, "tokens": int(bed.windows.numel())}, "machine": machine()}
    print(json.dumps({**about, "versions": versions(("torch", "transformers")), **result}, indent=1))


if __name__ == "__main__":
    main()
