"""The top of a decoder that is replaced first, and which of its layers keep their attention over a window.

    layers from the top down, each alone ─► KL(original || changed model), with its map and with each window
        ─► unbroken tops whose KLs add up to the limit at most ─► the best share of a prefill saved, less KL

Above the last whole attention a prompt needs few positions (`measure.cost`). A layer below a whole attention saves
nothing of this, and neither does a layer that is looked at alone. So a top is chosen as a whole. A map needs one
position and a window W more for each layer below it, so a window stands only where a map costs too much. All windows of
a model have one width. Rows have `LENGTH` tokens, since a short row would hide what a window does not see. One row has
passages that occur twice: layers that copy from far back lose there what other text hardly shows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.model.mixes import Mixes, Runs, quiet
from nbl_export.plan.inputs import Fit, Maps, OrderInputs, Task, Texts, Top, TopInputs
from nbl_export.records.plan import spoken_layers
from nbl_export.text.windows import repeated

__all__ = ["LENGTH", "MAP", "Losses", "best_top", "choose_top", "long_rows", "losses_alone"]

LENGTH = 2048  # tokens of a row, or the model's positions
MAP = 0  # the kind of a layer with its map; the kind of a layer with a window is its width in tokens
_EVERY = 8  # every eighth position is judged; each position sees all positions before
_SHORT = 512  # tokens of the other prefill whose saved arithmetic is weighed
Losses = dict[int, dict[int, tuple[float, ...]]]  # layer -> kind -> KL on each text, in nats


def choose_top(
    order: OrderInputs,
    top: TopInputs,
    fit: Fit,
    known: Mapping[str, Any] | None,
    task: Task,
    say: Callable[[str], None],
) -> Top:
    """The top that saves most of a prefill within the limit.

    Args:
        fit: fits maps of layers.
        known: the `to_json` of the top if it was chosen before from the same inputs.
    """
    windows, count = top.windows.value, order.num_layers
    if known is not None:
        widths = {int(layer): width for layer, width in known["windows"].items()}
        return Top(tuple(known["layers"]), {i: windows([i], width)[i] for i, width in widths.items()})
    try:
        windows([count - 1], top.widths[0])
    except NblError as error:
        say(f"no layer gets a window: {error}")
        return Top()

    best: dict[int, int] = {}
    saved = top.saved.value

    def mixers(layers: Collection[int]) -> dict[int, Maps]:
        return {MAP: fit(layers), **{width: windows(layers, width) for width in top.widths}}

    @functools.cache
    def mixer_of(layer: int, kind: int) -> Any:
        return (fit([layer]) if kind == MAP else windows([layer], kind))[layer]

    def mean_saved(kinds: Mapping[int, int]) -> float:
        maps = {i: mixer_of(i, kind) for i, kind in kinds.items()}
        return (saved(maps, _SHORT) + saved(maps, length)) / 2

    def is_enough(losses: Losses) -> bool:
        nonlocal best
        best = best_top(losses, limit, mean_saved)
        return len(best) < len(losses)

    length, limit = min(LENGTH, top.positions), math.log1p(top.share)
    mixes, tap = order.mixes.value, order.kind.tap
    with task("upper layers with a map and with windows") as progress:
        losses_alone(lambda maps: mixes(maps, tap), mixers, count, top.texts.value, length, is_enough, progress)
    say(_spoken_top(best))
    return Top(tuple(best), {i: mixer_of(i, kind) for i, kind in best.items() if kind != MAP})


def _spoken_top(kinds: Mapping[int, int]) -> str:
    """The layers that are replaced first, for the user."""
    windows = sorted(i for i, width in kinds.items() if width)
    if not kinds:
        return "no layers at the top are replaced first: each loses too much"
    which = (
        f"layers {spoken_layers(windows)} read {max(kinds.values())} tokens and the first one alone, the others none"
    )
    return f"the top from layer {min(kinds)} on is replaced first; {which if windows else 'all by linear layers'}"


def losses_alone(
    mixes: Callable[[Maps], Mixes], mixers: Callable[[Collection[int]], Mapping[int, Maps]], num_layers: int,
    texts: Texts, length: int, is_enough: Callable[[Losses], bool], progress: Callable[[int, int], None] = quiet,
) -> Losses:  # fmt: skip
    """The loss of each layer alone, with each kind, from the top down.

    Args:
        mixes: mixers -> the torch model in which they can replace attention.
        mixers: layers -> kind -> their mixers.
        texts: consecutive windows of each. length: most tokens of a row; one row of each text is read.
        num_layers: of the decoder. is_enough: whether no layer further down is wanted.
    """
    rows = [*(long_rows(ids, length)[:1] for _, ids in texts), repeated(texts[0][1], length)]
    original = mixes({})
    runs = [(ids_WT[0], original.runs(ids_WT, again=True)) for ids_WT in rows]
    found: Losses = {}
    step = max(1, round(num_layers / 8))
    for end in range(num_layers, 0, -step):
        layers = range(max(1, end - step), end)  # one layer keeps its attention
        kinds = mixers(layers)
        for done, (kind, maps) in enumerate(kinds.items()):
            mixed = mixes(maps)
            kls = [_losses(mixed, ids_T, of_row.of(mixed), maps) for ids_T, of_row in runs]
            for layer in maps:
                found.setdefault(layer, {})[kind] = tuple(kl[layer] for kl in kls)
            progress(len(kinds) * len(found) - len(kinds) + done + 1, len(kinds) * num_layers)
        if is_enough(found):
            break
    return found


def best_top(losses: Losses, limit: float, saved: Callable[[Mapping[int, int]], float]) -> dict[int, int]:
    """Layer -> kind of the unbroken top within the limit that saves most more than it loses, top first.

    A percent of a prefill is worth a percent of perplexity. Empty if no top saves more than it loses.

    Args:
        saved: share of a prefill that layers of these kinds save.
    """
    best: tuple[float, dict[int, int]] = (0.0, {})
    layers = sorted(losses, reverse=True)
    for width in sorted({kind for kls in losses.values() for kind in kls} - {MAP}) or [MAP]:
        for count in range(1, len(layers) + 1):
            for kinds in _with_windows(losses, layers[:count], width):
                lost = _worst([losses[i][kind] for i, kind in kinds.items()])
                if lost <= limit and (gain := saved(kinds) - lost) > best[0]:
                    best = (gain, kinds)
    return best[1]


def _with_windows(losses: Losses, layers: Iterable[int], width: int) -> Iterator[dict[int, int]]:
    """Maps in these layers, then one window more at a time, first where windows spare most."""
    kinds = dict.fromkeys(layers, MAP)
    spared = {i: max(losses[i][MAP]) - max(losses[i].get(width, losses[i][MAP])) for i in kinds}
    yield dict(kinds)
    for layer in sorted((i for i in kinds if spared[i] > 0), key=lambda i: -spared[i]):
        kinds[layer] = width
        yield dict(kinds)


def _worst(losses: Iterable[tuple[float, ...]]) -> float:
    """The sum of losses on the worst text."""
    return max(map(sum, zip(*losses, strict=True)))


def long_rows(windows_WT: Any, length: int) -> torch.Tensor:
    """Consecutive windows joined to rows of `length` tokens, the rest left out; the windows if they give no row."""
    ids = torch.as_tensor(windows_WT).flatten()
    rows = len(ids) // length
    return ids[: rows * length].view(rows, length) if rows else torch.as_tensor(windows_WT)


def _losses(mixes: Mixes, ids_T: torch.Tensor, runs: Runs, layers: Collection[int]) -> dict[int, float]:
    """Each layer, and the KL of a row if it alone is replaced."""
    last = {layer: last_WTD[0] for layer, last_WTD in zip(layers, runs.last([(i,) for i in layers]), strict=True)}
    return {layer: loss.kl for layer, loss in mixes.losses(ids_T, runs.original[0], last, _EVERY).items()}
