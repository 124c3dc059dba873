"""Compares choices of layers and fits: KL and perplexity on five texts, with the same windows for every row.

    python bench/quality.py MODEL DATA plans    [--text c4|default] > bench/results/quality-plans-<model>.json
    python bench/quality.py MODEL DATA distill  [--text c4|default] --layers 0,7,24-29 --minutes 14.5 > ...
    python bench/quality.py MODEL DATA both --text default --layers greedy:8 --minutes 10 > ...
    python bench/quality.py MODEL DATA ladder --text default --counts 4,8,12 --steps 200 --train-tokens 262144 > ...

DATA holds c4/c4_demo.json, c4/graphmark_c4_realnewslike_500.jsonl, wikitext-2-raw/wiki.valid.raw. Calibration uses
65,536 tokens in windows of 512, from the first documents of c4_demo.json ("c4") or from nbl-export's default text.
Figures use windows spread evenly over each text; c4_demo.json without its calibration and held-back tokens. The
original is computed once for all rows.

sets      the sets of layers in --layers, separated by semicolons, independent fit on the residual stream
maps      the same with the maps of --maps FILE
orders    nbl-export's own order and the paper's at each of --counts, and the sets in --layers
plans     every --select at 4, 8, 10, 12 and 15 layers, independent fit; for cca also on the paper's tap
distill   one set of layers, independent and distilled; --keep DIR saves both maps
ladder    nbl-export's own layers (efficient) at each of --counts: dropped, independent, distilled; --keep DIR saves
          maps, and maps that DIR already holds are measured again but not trained again
both      plans and distill; --layers cca:8, error:8 or greedy:8 takes the layers of that order
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bed import TOKENS, Bed, log

COUNTS = (4, 8, 10, 12, 15)
TRAINING = ("layers", "settings", "text", "train_tokens", "seconds", "cpu_seconds", "steps", "held_kl", "train_kl")


def plans(bed: Bed) -> dict[str, Any]:
    """Rows of the independent fit."""
    from nbl_export.plan import lmmse
    from nbl_export.plan.choose import ranked

    layers = range(len(bed.moments["residual"]))
    maps = bed.maps("normed", layers)
    scores = [lmmse.score(m, i) for i, m in enumerate(bed.moments["residual"])]
    greedy, seconds = judged(bed, maps, max(COUNTS), "greedy")
    efficient, _ = judged(bed, maps, max(COUNTS), "efficient")
    orders = {
        "cca": ranked(scores, "cca"),
        "error": ranked(scores, "error"),
        "greedy": greedy.layers,
        "efficient": efficient.layers,
    }
    mixes = {f"{name} {m}": tuple(sorted(order[:m])) for name, order in orders.items() for m in COUNTS}
    rows = bed.prices(maps, "normed", mixes)
    paper = {f"cca {m}": mixes[f"cca {m}"] for m in COUNTS}
    residual = bed.prices(bed.maps("residual", layers), "residual", paper)
    dropped = {f"drop {name}": mix for name, mix in mixes.items() if name in ("greedy 4", "greedy 8", "cca 8")}
    return {
        "orders": {name: list(map(int, order)) for name, order in orders.items()},
        "greedy": {"losses": [step.loss for step in greedy.steps], "seconds": seconds},
        "normed": rows,
        "residual": residual,
        "drop": bed.prices(_dropped(maps), "normed", dropped),
    }


def _dropped(maps: Mapping[int, Any]) -> dict[int, Any]:
    from nbl_export.records.plan import zero_map

    return {i: zero_map(m.bias.shape[0]) for i, m in maps.items()}


def distilled(bed: Bed, options: argparse.Namespace, orders: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about the independent and distilled maps of one set of layers."""
    from nbl_export.plan.choose import parse_layers

    select, _, count = options.layers.partition(":")
    if count:
        layers = tuple(sorted(orders[select][: int(count)]))
    else:
        layers = parse_layers(options.layers, len(bed.moments["normed"]))
    assert isinstance(layers, tuple), "name the layers"
    facts, maps = trained(bed, options, layers)
    if options.keep:
        keep(options.keep, "independent", bed.maps("normed", layers))
        keep(options.keep, "distilled", maps)
    return facts


def keep(directory: Path, name: str, maps: dict[int, Any]) -> None:
    from nbl_export.plan.maps_file import save_maps

    directory.mkdir(parents=True, exist_ok=True)
    save_maps(maps, directory / f"{name}.safetensors", "normed")


def kept(directory: Path, count: int) -> Path:
    return directory / f"{count}.json"


def trained(bed: Bed, options: argparse.Namespace, layers: tuple[int, ...]) -> tuple[dict[str, Any], dict[int, Any]]:
    """Facts about the independent and the distilled maps of layers, and the distilled maps.

    With --keep DIR, maps of an earlier ladder with the same layers and settings are only measured, not trained again.
    """
    from nbl_export.distill.settings import UNLIMITED, DistillSettings, Surroundings, TrainingText
    from nbl_export.distill.training import distill
    from nbl_export.plan.maps_file import load_maps

    settings = DistillSettings(
        options.steps or UNLIMITED, options.minutes, dtype="auto", lora_rank=options.lora_rank or None,
        **({"learning_rate": options.rate} if options.rate else {}), weight_decay=options.weight_decay,
        **({} if options.label_weight is None else {"label_weight": options.label_weight}),
    )  # fmt: skip
    maps = bed.maps("normed", layers)
    before = bed.prices(maps, "normed", {"independent": layers})["independent"]
    wanted = {"layers": list(layers), "settings": vars(settings), "text": bed.text["sha256"]}
    wanted |= {"train_tokens": options.train_tokens}
    earlier = found_earlier(options, wanted)
    if earlier is None:
        held = bed.held[len(bed.held) // 2 :]
        busy = time.process_time()
        found = distill(bed.model, maps, "normed", TrainingText(bed.training, held), settings, Surroundings(say=log))
        every = settings.check_every
        facts = {
            **wanted,
            "seconds": found.seconds,
            "cpu_seconds": time.process_time() - busy,  # of all threads; wall time means little on a busy machine
            "steps": len(found.train_kl),
            "held_kl": found.held_kl,
            "train_kl": [statistics.fmean(found.train_kl[k : k + every]) for k in range(0, len(found.train_kl), every)],
        }
        maps = found.maps
    else:
        facts, maps = earlier, load_maps(options.keep / f"{len(layers)}.safetensors", layers)
    after = bed.prices(maps, "normed", {"distilled": layers})["distilled"]
    removed = {t: 1 - after[t]["increase"] / before[t]["increase"] for t in before}
    log(f"removed: { {t: round(v, 3) for t, v in removed.items()} }")
    return {**facts, "independent": before, "distilled": after, "removed": removed}, maps


def found_earlier(options: argparse.Namespace, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Facts of the same distillation in an earlier ladder's directory, or None."""
    at = options.keep and kept(options.keep, len(wanted["layers"]))
    if options.what != "ladder" or not at or not at.exists():
        return None
    facts = json.loads(at.read_text(encoding="utf-8"))
    return {k: facts[k] for k in TRAINING} if all(facts.get(k) == v for k, v in wanted.items()) else None


def judged(bed: Bed, maps: Mapping[int, Any], count: int, select: str, tap: str = "normed") -> tuple[Any, float]:
    """The order of layers that nbl-export chooses by trials, and the seconds of the choice."""
    from nbl_export.cost.model import map_sizes
    from nbl_export.model import bfloat16
    from nbl_export.model.mixes import SwitchedModel
    from nbl_export.plan.effects import Judge
    from nbl_export.plan.greedy import GreedyOrder, Search

    costs, sizes = cost_model(bed), map_sizes(maps)
    saved: Any = lambda gone: costs.prefill_saved({i: sizes[i] for i in gone})  # noqa: E731
    weighed = saved if select == "efficient" else None
    started, narrow = time.monotonic(), bfloat16.fast(bed.model.device)
    judge = Judge(SwitchedModel(bed.model, maps, tap, narrow=narrow), bed.judging)
    order = Search(judge, GreedyOrder(), weighed, lambda _d, _t: None).extend(count)
    seconds = time.monotonic() - started
    log(f"{select}: {list(order.layers)} in {seconds:.0f} s")
    return order, seconds


def ladder(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """Results of nbl-export's own layers at several counts, and the paper's layers at these counts."""
    from nbl_export.cost.model import map_sizes
    from nbl_export.plan import lmmse
    from nbl_export.plan.choose import ranked

    counts = [int(n) for n in options.counts.split(",")]
    maps = bed.maps("normed", range(len(bed.moments["residual"])))
    order, _ = judged(bed, maps, max(counts), "efficient")
    costs, sizes = cost_model(bed), map_sizes(maps)
    rows = {}
    for count in counts:
        mix = tuple(sorted(order.layers[:count]))
        speed = costs.speedup_of_sizes({i: sizes[i] for i in mix}).prefill
        dropped = bed.prices(_dropped(maps), "normed", {"drop": mix})["drop"]
        facts, found = trained(bed, options, mix)
        rows[count] = {"modelled_prefill": speed, "drop": dropped, **facts}
        if options.keep:
            keep(options.keep, str(count), found)
            kept(options.keep, count).write_text(json.dumps(rows[count], indent=1), encoding="utf-8")
    scores = [lmmse.score(m, i) for i, m in enumerate(bed.moments["residual"])]
    cca = {count: sorted(ranked(scores, "cca")[:count]) for count in counts}
    paper = {
        count: {"layers": mix, "modelled_prefill": costs.speedup_of_sizes({i: sizes[i] for i in mix}).prefill}
        for count, mix in cca.items()
    }
    return {"order": list(order.layers), "losses": [step.loss for step in order.steps], "paper": paper, "rows": rows}


def cost_model(bed: Bed) -> Any:
    """The cost model of a prefill of 512 tokens in float32."""
    from nbl_export.cost.model import CostModel

    return CostModel(bed.spec, bed.model.config.intermediate_size, 4.0, 4.0, 4, token_table=True)


def sets(bed: Bed, named: Sequence[str]) -> dict[str, Any]:
    """Rows of sets of layers by name, and their modelled speed-up of a prefill of 512 tokens in float32."""
    from nbl_export.cost.model import map_sizes
    from nbl_export.plan.choose import parse_layers

    count = len(bed.moments["residual"])
    maps = bed.maps("residual", range(count))
    mixes = {name: tuple(parse_layers(name, count)) for name in named}  # type: ignore[arg-type]
    costs = cost_model(bed)
    speed = {n: costs.speedup_of_sizes(map_sizes({i: maps[i] for i in mix})).prefill for n, mix in mixes.items()}
    return {"modelled_prefill": speed, "residual": bed.prices(maps, "residual", mixes)}


def orders(bed: Bed, options: argparse.Namespace) -> dict[str, Any]:
    """nbl-export's order, the paper's order, and the sets of --layers, at --counts: quality and modelled speed."""
    from nbl_export.plan import lmmse
    from nbl_export.plan.choose import ranked

    counts = [int(n) for n in options.counts.split(",")]
    maps = bed.maps("residual", range(bed.spec.num_layers))
    scores = [lmmse.score(m, i) for i, m in enumerate(bed.moments["residual"])]
    order, seconds = judged(bed, maps, max(counts), "efficient", "residual")
    named = {
        ",".join(map(str, sorted(steps[:n]))): (name, n)
        for name, steps in (("efficient", order.layers), ("cca", ranked(scores, "cca")))
        for n in counts
    }
    asked = [*named, *(text for text in options.layers.split(";") if text)]
    ours = {str(n): tuple(sorted(order.layers[:n])) for n in counts}
    return {
        "order": list(order.layers), "losses": [step.loss for step in order.steps], "seconds": seconds,
        "sets": {name: f"{kind} {n}" for name, (kind, n) in named.items()}, **sets(bed, asked),
        "drop": bed.prices(_dropped(maps), "residual", ours),
        "normed": bed.prices(bed.maps("normed", order.layers), "normed", ours),
        "normed without bias": bed.prices(
            {i: lmmse.fit(bed.moments["normed"][i], i, bias=False) for i in order.layers}, "normed", ours
        ),
    }  # fmt: skip


def given(bed: Bed, named: Sequence[str], file: Path) -> dict[str, Any]:
    """Rows of sets of layers by name, with the maps of a file."""
    from nbl_export.plan.choose import parse_layers
    from nbl_export.plan.maps_file import load_maps, maps_in

    layers, tap = maps_in(file)
    mixes = {name: tuple(parse_layers(name, bed.spec.num_layers)) for name in named}  # type: ignore[arg-type]
    return {"maps of": list(layers), "maps": bed.prices(load_maps(file, layers), tap or "residual", mixes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=("plans", "distill", "both", "sets", "maps", "ladder", "orders"))
    parser.add_argument("--text", choices=("c4", "default"), default="c4")
    parser.add_argument("--windows", type=int, default=16, help="windows from each text")
    parser.add_argument("--c4-windows", type=int, help="windows from C4; 181 for all of its remaining text")
    parser.add_argument("--narrow-judge", action="store_true", help="bfloat16 products, where the processor has them")
    parser.add_argument("--layers", default="0,7,24-29")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="numbers of layers, for ladder")
    parser.add_argument("--keep", type=Path, help="directory for the maps of ladder or distill")
    parser.add_argument("--maps", type=Path, help="file of maps, for maps")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--train-tokens", type=int, default=TOKENS, help="tokens for distillation")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--weight-decay", type=float, default=0.0, help="of the low-rank deltas")
    parser.add_argument("--label-weight", type=float, help="weight of the text's own next tokens in distillation")
    options = parser.parse_args()
    from nbl_export.files import versions
    from nbl_export.measure.benchmark import machine

    taps = ("residual", "normed")
    if options.what == "distill" and ":" not in options.layers:  # only orders need the residual stream's moments
        taps = ("normed",)
    bed = Bed(
        options.model, options.data, options.text, options.windows, options.train_tokens,
        () if options.what == "maps" else taps, options.c4_windows, options.narrow_judge,
    )  # fmt: skip
    if options.what == "sets":
        result = sets(bed, options.layers.split(";"))
    elif options.what == "maps":
        result = given(bed, options.layers.split(";"), options.maps)
    elif options.what == "orders":
        result = orders(bed, options)
    elif options.what == "ladder":
        result = ladder(bed, options)
    else:
        result = plans(bed) if options.what != "distill" else {}
    if options.what in ("distill", "both"):
        result["distill"] = distilled(bed, options, result.get("orders", {}))
    asked = {k: v for k, v in vars(options).items() if k not in ("model", "data", "keep", "maps")}
    about = {"asked": asked, "calibration": {**bed.text, "tokens": int(bed.windows.numel())}, "machine": machine()}
    print(json.dumps({**about, "versions": versions(("torch", "transformers")), **result}, indent=1))


if __name__ == "__main__":
    main()
