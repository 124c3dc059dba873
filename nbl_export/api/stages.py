"""The stages as functions of values: a model of transformers in memory, and no run directory.

    calibrate(model, tokenizer, text) ─► Calibration: moments of every layer, and texts that judge
    plan(calibration, layers=8)       ─► Planned: which layers, their maps, their scores
    linearize(model, planned)         ─► a model of transformers that generates and saves itself

These are the functions that the main job calls. Its graphs, verification and measurements are `export`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from nbl_export.errors import NblError, UsageError
from nbl_export.mixers.base import Mixer
from nbl_export.options.goals import DEFAULT_SELECT, asked_increase, check_request, parse_layers
from nbl_export.options.options import JobOptions
from nbl_export.options.settle import read_asked
from nbl_export.records.inputs import Lazy
from nbl_export.records.plan import TAPS, LayerScore, Plan
from nbl_export.run.progress import Ui

if TYPE_CHECKING:
    from nbl_export.plan.order import Selection

__all__ = ["Calibration", "Planned", "calibrate", "linearize", "plan"]

Texts = Sequence[tuple[str, Any]]  # name and token ids [windows, context]


@dataclass(frozen=True)
class Calibration:
    """What a model computes on a text, layer by layer.

    Attributes:
        model: as given to `calibrate`; `plan` measures with it.
        tap: what maps are applied to. tokens: of the text that maps are fitted on.
        moments: tap -> moments of each layer (`nbl_export.mixers.lmmse.Moments`).
        choosing, deciding: texts that layers are chosen by, and on which a limit on quality is tested.
    """

    model: Any = field(repr=False)
    tap: str
    tokens: int
    moments: Mapping[str, Mapping[int, Any]] = field(repr=False)
    choosing: Texts = field(repr=False)
    deciding: Texts = field(repr=False)


@dataclass(frozen=True)
class Planned:
    """Which layers are replaced, and by what.

    Attributes:
        plan: layers, their kinds, the tap, the scores. maps: layer -> what replaces its attention.
    """

    plan: Plan
    maps: Mapping[int, Mixer] = field(repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with a mixer."""
        return self.plan.layers

    @property
    def scores(self) -> tuple[LayerScore, ...]:
        """How well a map can replace the attention of each layer."""
        return self.plan.scores


def calibrate(
    model: Any,
    tokenizer: Any,
    text: str | PathLike[str] | Sequence[str] | None = None,
    *,
    tokens: int = 65_536,
    context: int = 512,
    tap: str = "residual",
    quiet: bool = False,
) -> Calibration:
    """Collect the moments of every layer.

    Args:
        model: a causal LM of transformers in float32. tokenizer: its own.
        text: a file or hub dataset as --calibration takes it, or documents; None is the command line's default.
        tokens, context: as the options calibration_tokens and context.
        tap: residual (the input of the layer's norm) or normed (its output).

    Raises:
        NblError: the architecture is not supported, the text is too short, or activations are not finite.
    """
    from nbl_export.calibrate.collect import collect
    from nbl_export.text import corpus, parts

    if tap not in TAPS:
        raise UsageError(f"tap is {' or '.join(TAPS)}, not {tap!r}")
    spec = _spec(model)
    read = _read(text)
    if str(model.dtype) != "torch.float32":
        raise UsageError(f"the model is in {model.dtype}; load it in float32 (dtype=torch.float32)")
    rows = parts.cut(read, tokenizer, tokens, context, tokens, spec.vocab_size)
    if (second := corpus.stdlib_text()).sha256 != read.sha256:
        rows |= parts.cut_second(second, tokenizer, context, spec.vocab_size)
    both = parts.JobText((read.name, second.name), {part: Lazy(None, partial(rows.get, part)) for part in rows})
    windows = both.windows.value
    taps = tuple(dict.fromkeys(("residual", tap)))
    with Ui(quiet=quiet).task(f"{windows.numel()} tokens") as progress:
        moments = collect(model, windows, progress, taps)
    choosing = both.choosing(spec.max_positions).value
    deciding = both.deciding.value
    return Calibration(model, tap, int(windows.numel()), moments, choosing, deciding)


def plan(
    calibration: Calibration,
    layers: int | str | Sequence[int] | None = None,
    *,
    select: str | None = None,
    max_perplexity_increase: str | None = None,
    maps: str = "affine",
    quiet: bool = False,
) -> Planned:
    """Choose layers, and fit their maps in closed form. The arguments are options of the command line.

    Args:
        layers: how many (8), or which ([7, 9] or "0,7,24-29"); None leaves the number to the limit on quality.
        select: order of the layers: efficient (default) or cca.
        max_perplexity_increase: most increase of perplexity on held-back text; "5%" without `layers`.
        maps: affine, or linear for maps without a bias.

    Raises:
        UsageError, ValueError: an argument is wrong. NblError: one layer alone is beyond the limit.
    """
    from nbl_export.plan.inputs import AskedGoal
    from nbl_export.plan.order import choose
    from nbl_export.plan.planning import count_within

    given = {"layers": layers, "select": select, "max_perplexity_increase": max_perplexity_increase}
    asked = read_asked({name: value for name, value in given.items() if value is not None})
    options = JobOptions("", **asked, maps=maps, tap=calibration.tap)
    check_request(options)
    selection = _selection(calibration, options, quiet)
    if options.layers is not None:
        request = parse_layers(options.layers, selection.inputs.num_layers)
    else:
        goal = AskedGoal(asked_increase(options), max_perplexity_increase)
        found = count_within(goal, selection, calibration.deciding, Ui(quiet=quiet).task)
        request = found.count
    order = selection.order(request) if isinstance(request, int) else None
    made = choose(selection.scores, request, calibration.tap, selection.inputs.select, order)
    return Planned(made, selection.maps_of(made.layers))


def linearize(model: Any, planned: Planned) -> Any:
    """The model with maps in place of attention: a model of transformers, which generates and saves itself.

    `import nbl_export.hf` lets from_pretrained load it again. The given model is taken apart: use the result alone.

    Raises:
        NblError: the architecture has no class here.
    """
    from nbl_export.model.checkpoint.hf_classes import linearized

    return linearized(model, planned.maps, planned.plan.tap)


def _spec(model: Any) -> Any:
    from nbl_export.model.architectures import ARCHITECTURES, supported_near
    from nbl_export.model.checkpoint.load import spec_of

    architecture = getattr(getattr(model, "config", None), "model_type", None)
    if architecture not in ARCHITECTURES:
        raise NblError(f"architecture {architecture!r} is not supported; {supported_near(architecture)}")
    return spec_of(model.config, str(architecture))


def _read(text: str | PathLike[str] | Sequence[str] | None) -> Any:
    """The text of a source, or of documents."""
    from nbl_export.text import corpus, mixture

    if text is None or isinstance(text, (str, PathLike)):
        return mixture.read_texts([] if text is None else [str(text)])
    documents = tuple(text)
    return corpus.Text("the given documents", corpus.documents_sha256(documents), documents)


def _selection(calibration: Calibration, options: JobOptions, quiet: bool) -> Selection:
    from nbl_export.measure.cost import CostModel, map_sizes
    from nbl_export.model.architectures import mlp_of
    from nbl_export.model.switched import SwitchedModel
    from nbl_export.plan.inputs import MapKind, OrderInputs
    from nbl_export.plan.order import Selection

    model = calibration.model
    spec = _spec(calibration.model)
    moments = calibration.moments

    def saved(maps: Mapping[int, Mixer], tokens: int) -> float:
        cost = CostModel(spec, mlp_of(model.config.to_dict()), 4, 4, 4, tokens)  # float32 graphs
        return cost.prefill_saved(map_sizes(maps))

    inputs = OrderInputs(
        MapKind(options.kind, options.tap, options.has_bias),
        spec.num_layers,
        options.select or DEFAULT_SELECT,
        Lazy(None, lambda: lambda layer, tap: moments[tap][layer]),
        Lazy(None, lambda: lambda maps, tap: SwitchedModel(model, maps, tap)),
        Lazy(None, lambda: calibration.choosing),
        Lazy(None, lambda: saved),
    )
    return Selection(inputs, Ui(quiet=quiet).task)
