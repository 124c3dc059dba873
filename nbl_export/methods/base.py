"""The protocol of a method: what stages, targets and reports call. No stage knows the name of a method.

    candidates ─► collector ─► sums ─► fit ─► choose        torch: what may be replaced, and what is
                                        └─► Mixer of each layer, in maps.safetensors
    applied                              torch model with mixers       (`methods.applied`)
    passes                               ONNX graph with mixers        (`methods.rewrite`)
    reference                            the original graph with mixers, without the passes
    rewrite_ir, ir_reference             the same two for OpenVINO's IR

    Mixer   one fitted layer: a torch module, tensors, work, and

            reads         which rows of which streams (`rows`)
            holds_cache   whether the layer's attention and its cache stay
            stored        matrices and vectors that a graph holds of it

A method is one folder of this package and its line in `nbl_export.methods`. A plan has one method. Values are
[B, T, D]: batch, tokens of this step, width of the residual stream. Importing this package loads no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.methods.rows import Reads
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy
from nbl_export.records.plan import Plan
from nbl_export.text.parts import Texts

if TYPE_CHECKING:
    import onnx_ir as ir

    from nbl_export.methods.sums_file import SumsFile
    from nbl_export.options.options import JobOptions

__all__ = [
    "Candidates",
    "Choice",
    "ChoiceInputs",
    "Limit",
    "Maps",
    "Method",
    "Mixer",
    "Say",
    "Stored",
    "Task",
    "TokenWork",
    "cacheless",
    "changed",
    "tapped",
]

Value = Any  # of a graph of any form
Stored = Mapping[str, np.ndarray]  # matrices and vectors that a graph holds of a mixer
Say = Callable[[str], None]
Task = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # title -> progress (done, total)


@dataclass(frozen=True)
class TokenWork:
    """What one row of a stream costs.

    Attributes:
        multiply_adds: of this row alone.
        elements: of the matrices that are read, once for all rows of a step.
    """

    multiply_adds: int
    elements: int


class Mixer(Protocol):
    """One fitted layer."""

    @property
    def kind(self) -> str:
        """Name of its method."""

    @property
    def reads(self) -> Reads:
        """The streams that it reads, and which rows; its own input at the tap comes first."""

    @property
    def holds_cache(self) -> bool:
        """Whether the layer's attention and its cache of keys and values stay."""

    @property
    def size(self) -> int:
        """D: the width of its input and output."""

    def tensors(self) -> dict[str, np.ndarray]:
        """All its numbers in float32, by name, as `Method.from_tensors` takes them."""

    def stored(self) -> tuple[Stored, Stored]:
        """Matrices that a graph multiplies by, and vectors that it adds, by the name of the field that holds them."""

    def product(self) -> np.ndarray | None:
        """The matrix W [D, D] if it computes x W' and nothing else, as some file formats need; otherwise None."""

    def module(self, multiplier: float = 1.0) -> Any:
        """A torch module in place of or beside a self-attention module of transformers (`methods.modules.MixerModule`).

        Args:
            multiplier: the layer's factor of attention's output. A mixer includes it, so the module's output is
                divided by it.
        """

    def trained(self, rank: int, generator: Any) -> Any:
        """What distillation trains, with a delta of some rank (as `modules.TrainedLinear`); None: it is not trained."""

    def work(self) -> tuple[TokenWork, ...]:
        """What one row of each of `reads` costs."""


Maps = Mapping[int, Mixer]  # replaced layer -> its mixer


# -- what a choice reads -----------------------------------------------------------------------------------------


class Candidates(Protocol):
    """What a method may replace, as options and the decoder allow: a frozen dataclass of plain values."""

    @property
    def collected(self) -> Any:
        """What sums are needed of: a frozen dataclass of plain values. Equal values need equal sums."""


@dataclass(frozen=True)
class Limit:
    """Most relative increase of perplexity, and the option's text; None for the default limit."""

    share: float
    text: str | None

    @property
    def facts(self) -> dict[str, Any]:
        """As the manifest's goal states it."""
        return {"max_perplexity_increase": self.text or self.percent, "default": self.text is None}

    @property
    def percent(self) -> str:
        return f"{100 * self.share:g}%"


@dataclass(frozen=True)
class ChoiceInputs:
    """What the choice of a plan follows from. Building these inputs loads neither torch nor a model.

    Attributes:
        candidates: of the method.
        trains: whether maps are trained, so that a limit on quality is tested on trained maps.
        sums: the file of sums, whole and checked.
        model: the torch model.
        partial: maps and their tap -> the torch model, in which these maps can replace attention.
        selection: texts that candidates are compared by; no map is fitted on them.
        validation: texts on which a limit on quality is tested.
        selection_items, validation_items: retrieval items of the same uses, rows [rows, 2, length] of each kind.
        saved: maps and the tokens of a prompt -> the share of its arithmetic that these maps save.
        speedup: modelled speed-ups of some maps ("prefill" and "decode"). setting: what they are modelled for.
    """

    num_layers: int
    candidates: Any
    limit: Limit
    trains: Lazy[bool]
    sums: Lazy[SumsFile]
    model: Lazy[Any]
    partial: Lazy[Callable[[Maps, str], Any]]
    selection: Lazy[Texts]
    validation: Lazy[Texts]
    selection_items: Lazy[Texts]
    validation_items: Lazy[Texts]
    saved: Lazy[Callable[[Maps, int], float]]
    speedup: Lazy[Callable[[Maps], Any]]
    setting: Lazy[Mapping[str, Any]]


@dataclass(frozen=True)
class Choice:
    """A plan, the maps of its layers, and further facts for the manifest."""

    plan: Plan
    maps: dict[int, Mixer]
    facts: dict[str, Any]


# -- the protocol ------------------------------------------------------------------------------------------------


class Method:
    """A method. Torch and onnx_ir are loaded by its functions.

    Attributes:
        name: as plan, nbl.json and maps.safetensors name it. title: in words, plural.
        holds_cache: whether its layers hold the cache of their attention.
        instead: what a user does if the model does not fit into memory; "" if sums are collected layer by layer then.
    """

    name: str
    title: str
    holds_cache = False
    instead = ""

    # -- torch

    def candidates(self, options: JobOptions, decoder: DecoderSpec, known: Mapping[str, Any]) -> Candidates:
        """What may be replaced.

        Args:
            known: `collected` of the sums that the run has of this method, as JSON; empty without such sums.

        Raises:
            NblError: an option does not fit the decoder.
        """
        raise NotImplementedError

    def rows(self, windows_WT: Any, collected: Any) -> Any:
        """Rows of token ids that sums are collected over, from the windows of a text."""
        return windows_WT

    def sums_bytes(self, collected: Any, size: int) -> int:
        """Bytes of the sums of one layer that is `size` wide, where they take memory of the device."""
        return 0

    def collector(self, model: Any, collected: Any, *, bf16: bool) -> Any:
        """Empty sums of a torch model (`methods.collector.Collector`); `bf16`: the model's products in bfloat16.

        Raises:
            NblError: the model cannot have this method.
        """
        raise NotImplementedError

    def choose(self, inputs: ChoiceInputs, task: Task, say: Say, known: Mapping[str, Any]) -> Choice:
        """The plan, by quality or as asked for.

        Args:
            known: facts of the manifest of a run that goes on.

        Raises:
            NblError: no candidate is within the limit.
        """
        raise NotImplementedError

    def applied(self, model: Any, maps: Any, tap: str = "residual") -> AbstractContextManager[None]:
        """Within: a causal LM of transformers computes what an engine will serve with these maps."""
        from nbl_export.methods.applied import applied

        return applied(model, maps, tap)

    def blank(self, config: Any, decoder: Any, stated: Any, multiplier: float = 1.0) -> Any:
        """The torch module of a layer, whose numbers are loaded later.

        Args:
            config, decoder: of the torch model. stated: `facts` of a configuration.
        """
        raise NotImplementedError

    # -- files

    def from_tensors(self, tensors: Stored) -> Mixer:
        """The mixer of these `Mixer.tensors`.

        Raises:
            KeyError: a tensor is missing.
            ValueError: shapes contradict each other.
        """
        raise NotImplementedError

    def from_module(self, state: Stored) -> Mixer:
        """The mixer of the `state_dict` of a module of this method; errors as in `from_tensors`."""
        raise NotImplementedError

    def summary(self, maps: Any) -> dict[str, Any] | None:
        """What reports say of all maps (`exit` of nbl.json); None if nothing."""
        return None

    def facts(self, maps: Any) -> dict[str, Any] | None:
        """What all maps have in common, for the configuration of a checkpoint; None if nothing."""
        return None

    def check_facts(self, stated: Any, layers: Sequence[int], count: int, positions: Any) -> None:
        """Check `facts` that a configuration states.

        Args:
            layers: that are replaced. count: of the decoder. positions: most tokens of a sequence, if it is known.

        Raises:
            ValueError: they are impossible; the message says what.
        """
        if stated is not None:
            raise ValueError(f"config.json has nbl_exit {stated}, and no layer is of such a kind")

    # -- ONNX graphs

    def passes(self, maps: Any, tap: str) -> Sequence[ir.passes.PassBase]:
        """The passes that put mixers into a graph; each raises RefusalError for what it does not understand."""
        raise NotImplementedError

    def reference(self, directory: Path, head_dim: int, mixers: Any, tap: str, *, fp32_activations: bool) -> Any:
        """The original graph with mixers, computed without `passes`: a decoder that `verify` steps.

        Args:
            fp32_activations: in the arithmetic that the graph's own types state; no activation is rounded.

        Raises:
            RefusalError: a layer is not understood, or has no such tap.
        """
        raise NotImplementedError

    # -- OpenVINO's IR

    def rewrite_ir(self, model: Any, maps: Any, tap: str) -> None:
        """Put mixers into an IR, in place.

        Raises:
            RefusalError: the IR is not understood, or the method has no form in an IR.
        """
        raise RefusalError(None, f"an IR takes no {self.title}")

    def ir_reference(self, directory: Path, file: str, mixers: Any, tap: str, *, exact: bool) -> Any:
        """As `reference`, of the graph `file` of an IR directory."""
        raise RefusalError(None, f"an IR takes no {self.title}")


def cacheless(mixers: Maps) -> tuple[int, ...]:
    """Layers whose mixer does not hold the cache of their attention, ascending."""
    return tuple(layer for layer, mixer in sorted(mixers.items()) if not mixer.holds_cache)


def changed(mixer: Mixer, arrays: Stored) -> Mixer:
    """The mixer with other arrays in the fields of these names.

    Raises:
        ValueError: shapes contradict each other.
    """
    made: Mixer = dataclasses.replace(cast(Any, mixer), **arrays)
    return made


def tapped(block: Any, tap: str) -> Value:
    """The value that the map of a block acts on; a block has `layer`, `residual` and `normed`, of any graph form.

    Raises:
        RefusalError: the tap is "normed" and the block has no normed input.
    """
    if tap == "residual":
        return block.residual
    if block.normed is None:
        raise RefusalError(
            block.layer,
            "its attention does not multiply one normed value first, which tap normed needs; use tap residual",
        )
    return block.normed
