"""Tables of the second model, and of the time of a whole job, made from raw results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tables_quality import TEXTS, rise
from tables_speed import cell, level

from nbl_export.records.plan import spoken_layers
from nbl_export.records.quality import increase_interval

# Raw result of a job -> title, and raw result of its layers on other texts.
_JOBS = {"stages-smollm2": ("SmolLM2-135M", "default-smollm2"), "stages-qwen": ("Qwen2.5-Coder-0.5B", "default-qwen")}
# Runs of the same layers, steps and rate, with and without a bias.
_DISTILLED = {
    "smollm2": {"yes": "distill-affine-smollm2", "no": "distill-linear-smollm2"},
    "qwen": {"yes": "distill-qwen", "no": "distill-linear-qwen"},
}
_TRAINED = ("distill-qwen-3", "distill-qwen", "distill-qwen-9")
Rows = list[Sequence[str]]
Read = Callable[[str], Any]


def bias(read: Read) -> Rows:
    """Perplexities of maps on the normed input with and without a bias, of two models."""
    rows: Rows = [("model", "layers", "fit", "bias", *TEXTS.values()), "llll" + "r" * len(TEXTS)]
    for model, name in (("SmolLM2-135M", "smollm2"), ("Qwen2.5-Coder-0.5B", "qwen")):
        run = read(f"orders-{name}")
        for count in run["asked"]["counts"].split(","):
            for title, key in (("yes", "normed"), ("no", "normed without bias")):
                rows.append((model, count, "closed form", title, *_perplexities(run[key][count])))
        for title, file in _DISTILLED[name].items():
            run = read(file)["distill"]
            rows.append((model, str(len(run["layers"])), "distilled", title, *_perplexities(run["distilled"])))
    return rows


def _perplexities(quality_losses: Mapping[str, Any]) -> list[str]:
    return [f"{quality_losses[text]['nbl']:.2f}" for text in TEXTS]


_SPEED_RUNS = {"float32": "ladder-qwen-fp32", "int4": "ladder-qwen-int4"}


def speeds(read: Read) -> Rows:
    """Speed ratios of 3, 6 and 9 layers of the second model in float32 and int4."""
    runs = {title: read(name)["ratios"] for title, name in _SPEED_RUNS.items()}
    kind = level(r for run in runs.values() for r in run)
    rows: Rows = [("", f"test ({kind})", "behind", "3 layers", "6 layers", "9 layers"), "llrrrr"]
    for title, run in runs.items():
        for test, depth in dict.fromkeys((r["test"], r["depth"]) for r in run):
            found = [r for r in run if (r["test"], r["depth"]) == (test, depth)]
            rows.append((title, test, f"{depth} tokens", *map(cell, found)))
    return rows


def trained(read: Read) -> Rows:
    """Maps on the normed input of some layers of the second model: in closed form, and distilled."""
    rows: Rows = [("layers", "maps", "KL, held back", *TEXTS.values()), "llr" + "r" * len(TEXTS)]
    for name in _TRAINED:
        run = read(name)["distill"]
        divergences = [kl for _, kl in run["held_kl"]]  # step, divergence
        steps = f"distilled, {run['steps']} steps, {run['seconds'] / 60:.0f} min"
        for title, key, kl in (("closed form", "independent", divergences[0]), (steps, "distilled", min(divergences))):
            quality_losses = (rise(run[key][text], 1) for text in TEXTS)
            rows.append((spoken_layers(tuple(run["layers"])), title, f"{kl:.3f}", *quality_losses))
    return rows


_SHAPES = {"3B": "shapes-3b", "8B": "shapes-8b"}


def shapes(read: Read) -> Rows:
    """Seconds and peak memory of the stages of jobs on random checkpoints of large shapes."""
    runs = {shape: read(name)["shapes"][shape] for shape, name in _SHAPES.items()}
    rows: Rows = [("stage", *(cell for shape in runs for cell in (shape, "peak"))), "l" + "rr" * len(runs)]
    for stage in ("calibrate", "plan", "decoder", "rewrite", "verify", "bench"):
        took = [run.get(stage) for run in runs.values()]
        cells = [(f"{t['seconds']:.0f} s", f"{t['peak_bytes'] / 1e9:.1f} GB") if t else ("not run", "") for t in took]
        if stage == "verify":
            stopped = read("shapes-8b-verify")
            minutes, peak = stopped["seconds_before_the_loss"] / 60, stopped["peak_bytes"] / 1e9
            cells[-1] = (f"{minutes:.0f} min to the loss on text", f"{peak:.1f} GB")
        rows.append((stage, *(text for cell in cells for text in cell)))
    return rows


def stages(read: Read) -> Rows:
    """Seconds of the stages of the default job, and calibrate and plan in units of the plain pass."""
    titles = ("", "plain pass", "calibrate", "plan", "decoder graph", "verify", "bench", "whole job", "ratio", "peak")
    rows: Rows = [titles, "l" + "r" * (len(titles) - 1)]
    for name, (title, _) in _JOBS.items():
        run = read(name)
        seconds = [run["seconds"][stage] for stage in ("calibrate", "plan", "decoder", "verify", "bench")]
        shown = [f"{value:.0f} s" for value in (run["plain_seconds"], *seconds, run["total_seconds"])]
        rows.append((title, *shown, f"{run['ratio']:.2f}", f"{run['peak_bytes'] / 1e9:.1f} GB"))
    return rows


def taken(read: Read) -> Rows:
    """What the default job took and what it costs, by its report and on text that it never read."""
    titles = ("", "layers replaced", "calibration text", "second text", "WikiText-2", "C4", "realnews", "code")
    rows: Rows = [titles, "ll" + "r" * 6]
    for name, (title, elsewhere) in _JOBS.items():
        run, other = read(name), read(elsewhere)["residual"]
        (quality_losses,) = other.values()
        assert list(other) == [",".join(map(str, run["replaced_layers"]))], "another set of layers"
        rises = [increase(quality_loss["per_window"]) for quality_loss in run["quality_loss"]]
        unread = [rise(quality_losses[text]) for text in ("wikitext-2 valid", "c4 rest", "realnews", "code")]
        rows.append((title, spoken_layers(run["replaced_layers"]), *rises, *unread))
    return rows


def job_speeds(read: Read) -> Rows:
    """Measured speed ratios of the default job with their intervals."""
    runs = {title: read(name)["ratios"] for name, (title, _) in _JOBS.items()}
    kind = level(r for run in runs.values() for r in run)
    rows: Rows = [("", "test", "behind", f"NBL over original ({kind})"), "lllr"]
    for title, run in runs.items():
        rows += [(title, r["test"], f"{r['depth']:,} tokens", cell(r)) for r in run]
    return rows


def increase(windows: Mapping[str, Sequence[float]]) -> str:
    """The perplexity increase with today's interval, from the losses of each window."""
    found = increase_interval(windows["loss_original"], windows["loss_nbl"])
    assert found.value is not None and found.low is not None and found.high is not None
    return f"{100 * found.value:+.1f}% ({100 * found.low:.1f} to {100 * found.high:.1f})"
