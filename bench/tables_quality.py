"""Tables of quality, made from raw results. A row names its layers, since a rule may choose others tomorrow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nbl_export.records.plan import describe_layers
from nbl_export.records.quality import describe_interval, increase_interval

Rows = list[Sequence[str]]
Read = Callable[[str], Any]
TASKS = {"lambada_openai": "LAMBADA", "arc_easy": "ARC-Easy", "piqa": "PIQA"}
TEXTS = {"c4 rest": "C4", "wikitext-2 valid": "WikiText-2", "realnews": "realnews",
         "python pydoc_data/topics.py": "Python's documentation", "code": "code"}  # fmt: skip


def rise(quality_loss: Mapping[str, float], digits: int = 0) -> str:
    """The increase of perplexity in percent."""
    return f"{100 * (quality_loss['nbl'] / quality_loss['original'] - 1):+.{digits}f}%"


def increase(loss: Mapping[str, Any]) -> str:
    """The increase of perplexity of a text, from the losses of its windows if a raw result has kept them."""
    windows = loss.get("per_window")
    if windows:
        return increase_of(windows["loss_original"], windows["loss_nbl"], loss.get("looks", ()))
    return describe_interval(loss["increase"], loss["increase_interval"], percent=True, sign=True)


def increase_of(before: Sequence[float], after: Sequence[float], looks: Sequence[int] = ()) -> str:
    """The increase of perplexity, from the losses of the same windows."""
    found = increase_interval(before, after, looks)
    return describe_interval(found.value, found.ends, percent=True, sign=True)


def choices(read: Read) -> Rows:
    """SmolLM2: for each count, the paper's choice and one by the output on ordinary text, closed form and dropped."""
    return _choices(read("orders-smollm2"))


def second(read: Read) -> Rows:
    """The same for Qwen."""
    return _choices(read("orders-qwen"))


def _choices(run: Mapping[str, Any]) -> Rows:
    rows: Rows = [("", "layers", *TEXTS.values(), "prefill, modelled"), "ll" + "r" * (len(TEXTS) + 1)]
    chosen = {kind: name for name, kind in run["sets"].items()}

    def row(title: str, name: str, quality_losses: Mapping[str, Any]) -> tuple[str, ...]:
        layers = describe_layers(tuple(int(i) for i in name.split(",")))
        speed = f"×{run['modelled_prefill'][name]:.2f}"
        return title, layers, *(rise(quality_losses[text]) for text in TEXTS), speed

    for count in run["asked"]["counts"].split(","):
        paper, ours = chosen[f"cca {count}"], chosen[f"efficient {count}"]
        rows.append(row(f"**{count} layers**: `cca` (the paper)", paper, run["residual"][paper]))
        rows.append(row("by the output", ours, run["residual"][ours]))
        rows.append(row("the same, dropped", ours, run["drop"][count]))
    return rows


def length(read: Read) -> Rows:
    """What sets lose at length: perplexity by position, keys that are found and random tokens that are copied."""
    rows: Rows = [("", "SmolLM2, eight linear layers"), "lr"]
    for one in read("length-smollm2")["length"]:
        begin = 0
        for row in one["rows"]:
            end = row["tokens"]
            place = f"{begin:,}–{end - 1:,}" if one["test"] == "position" else f"{end:,}"
            rows.append((_LONG[one["test"]].format(place), _at_length(one["test"], row)))
            begin = end
    return rows


_LONG = {
    "position": "perplexity, positions {}",
    "retrieval": "keys found in {} tokens",
    "copying": "random tokens copied in {} tokens",
}


def _at_length(test: str, row: Mapping[str, Any]) -> str:
    """Increase of perplexity, or the shares that original and NBL get right."""
    (apart,) = row["differences"]
    if test == "position":
        return increase(apart)
    return " → ".join(f"{row['figures'][name]['correct']:.0%}" for name in ("original", "nbl"))


_FITS = {"cca": "closed form", "maps": "distilled", "drop": "dropped"}


def tasks(read: Read) -> Rows:
    """SmolLM2. Changes are from the original of the same run; its row comes from the run of the distilled rows."""
    found, later = read("tasks-smollm2")["tasks"], read("tasks-distilled-smollm2")["tasks"]
    both = {name: {**task, "rows": {**task["rows"], **later[name]["rows"]}} for name, task in found.items()}
    wanted = [f"{kind} {count}" for count in (4, 8, 12) for kind in ("cca", "distilled", "dropped")]
    return _tasks(both, {name: _FITS[found["piqa"]["rows"][name]["how"]] for name in wanted})


def second_tasks(read: Read) -> Rows:
    """The second model, on the first documents of the three tasks."""
    closed = "closed form"
    fits = {"paper 3": closed, "ours 3": closed, "paper 6": closed, "ours 6": closed, "distilled 6": "distilled"}
    return _tasks(read("tasks-qwen")["tasks"], fits)


def _tasks(found: Mapping[str, Any], fits: Mapping[str, str]) -> Rows:
    titles = [f"{shown} ({found[name]['documents']:,})" for name, shown in TASKS.items()]
    rows: Rows = [("layers", "fit", *titles, "perplexity of LAMBADA"), "llrrrr"]
    for row, fit in {"original": "", **fits}.items():
        layers = "none" if row == "original" else describe_layers(found["piqa"]["rows"][row]["layers"])
        accuracies = [accuracy_of(found[name]["rows"][row]["acc"], row) for name in TASKS]
        rows.append((layers, fit, *accuracies, _perplexity_of(found["lambada_openai"]["rows"][row]["perplexity"], row)))
    return rows


_METRICS = {"acc": "accuracy", "perplexity": "perplexity", "token_perplexity": "perplexity"}


def exit_tasks(read: Read) -> Rows:
    """What tasks lose by the default jobs, on the shipped graphs and behind prompts, as they are served.

    Contexts of LAMBADA fit into W + 1 tokens, so its answers are the original's.
    """
    rows: Rows = [("job", "task", "documents", "original", "NBL"), "llrrr"]
    for run in read("exit-layers")["rows"]:
        for found in run["tasks"]:
            if found["metric"] not in _METRICS or found["task"] == "lambada_openai":
                continue
            figures, (change, *_) = found["figures"], found["differences"]
            made = {"value": figures["nbl"]["value"], "change": change["value"], "change_stderr": change["stderr"]}
            describe = accuracy_of if found["metric"] == "acc" else _perplexity_of
            shots, kind = found["num_fewshot"], _METRICS[found["metric"]]
            title = TASKS.get(found["task"], found["task"].removeprefix("perplexity:"))
            name = f"{title}, {kind}{f', {shots} examples' if shots else ''}"
            shown = describe(figures["original"], "original"), describe(made, "nbl")
            rows.append((run["title"], name, f"{found['items']:,}", *shown))
    return rows


_SEEN = {"long-range tokens": ("long_range", "gain", ("own", "second", "twice")),
         "ordinary perplexity of both texts": ("rise", "tokens", ("own", "second"))}  # fmt: skip
_OF_TASKS = ("keys", "copying", "WikiText-2", "LAMBADA", "ARC-Easy", "PIQA")


_RANKED = {"ranks-smollm2": "SmolLM2-135M", "ranks-qwen": "Qwen2.5-Coder-0.5B"}


def ranks(read: Read) -> Rows:
    """Spearman's rank correlation over sets of layers: what a choice sees against what a task loses."""
    rows: Rows = [("model", "what the choice sees", *_OF_TASKS), "ll" + "r" * len(_OF_TASKS)]
    for name, model in _RANKED.items():
        sets = read(name)["sets"].values()
        for title, (above, below, groups) in _SEEN.items():
            seen = [float(np.mean([_share(one[group], above, below) for group in groups])) for one in sets]
            lost = ([_share(one[task], "rise", "tokens") for one in sets] for task in _OF_TASKS)
            found = (f"{spearman(seen, values):+.2f}".replace("-", "−") for values in lost)
            rows.append((f"{model}, {len(sets)} sets", title, *found))
    return rows


def halves(read: Read) -> Rows:
    """What an exit layer at half of the layers loses in closed form: perplexity, and a share of long-range tokens."""
    texts = {"own": "calibration text", "second": "Python's documentation", "WikiText-2": "WikiText-2",
             "LAMBADA": "LAMBADA's last words"}  # fmt: skip
    answers = {"own": "long-range tokens, calibration text", "second": "documentation"}
    rows: Rows = [("exit layer", *texts.values(), *answers.values()), "l" + "r" * 6]
    for name, one, title in (
        ("ranks-smollm2", "exit layer 15, 64 recent", "SmolLM2-135M, 15 of 30"),
        ("ranks-qwen", "exit layer 12, 64 recent", "Qwen2.5-Coder-0.5B, 12 of 24"),
    ):
        found = read(name)["sets"][one]
        rises = (f"{100 * np.expm1(_share(found[text], 'rise', 'tokens')):+.1f}%" for text in texts)
        lost = (f"lose {_share(found[text], 'long_range', 'gain'):.0%}" for text in answers)
        rows.append((title, *(rise.replace("-", "−") for rise in rises), *lost))
    return rows


def _share(sums: Mapping[str, float], above: str, below: str) -> float:
    return sums[above] / sums[below]


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    one, other = (np.argsort(np.argsort(values)) - (len(first) - 1) / 2 for values in (first, second))
    return float((one @ other) / (one @ one))


def accuracy_of(figure: Mapping[str, float], row: str) -> str:
    value = f"{100 * figure['value']:.1f}%"
    if row == "original":
        return value
    return f"{value} ({100 * figure['change']:+.1f} ± {100 * figure['change_stderr']:.1f})"


def _perplexity_of(figure: Mapping[str, float], row: str) -> str:
    value = f"{figure['value']:.1f}"
    return value if row == "original" else f"{value} ({figure['change']:+.1f} ± {figure['change_stderr']:.1f})"
