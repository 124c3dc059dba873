"""The method: linear layers in place of attention (Neural Block Linearization, Erdogan et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.methods.base import Choice, ChoiceInputs, Method, Mixer, Say, Stored, Task
from nbl_export.methods.linear.maps import Linear
from nbl_export.options.goals import DEFAULT_SELECT, asked_layers
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.destinations import DESTINATIONS

if TYPE_CHECKING:
    import onnx_ir as ir

    from nbl_export.options.options import JobOptions

__all__ = ["LINEAR", "LayerCandidates", "Taps"]


@dataclass(frozen=True)
class Taps:
    """What moments are of: inputs at these taps, and what attention adds. The bound needs the residual tap."""

    taps: tuple[str, ...]


@dataclass(frozen=True)
class LayerCandidates:
    """Layers that linear layers may replace.

    Attributes:
        request: how many or which layers are replaced; None leaves the number to the limit.
        select: "cca" (smallest bound) or "efficient" (least loss for the work saved).
        bias: whether maps have one. dropped: whether maps are zeros.
        kept: layers that no order replaces.
    """

    request: int | tuple[int, ...] | None
    select: str
    tap: str = "residual"
    bias: bool = True
    dropped: bool = False
    kept: tuple[int, ...] = ()

    @property
    def collected(self) -> Taps:
        return Taps(tuple(dict.fromkeys(("residual", self.tap))))


class _Linear(Method):
    name = Linear.kind
    title = "linear layers"

    def candidates(self, options: JobOptions, decoder: DecoderSpec, known: Mapping[str, Any]) -> LayerCandidates:
        return LayerCandidates(
            request=None if options.layers is None else asked_layers(options, decoder),
            select=options.select or DEFAULT_SELECT,
            tap=options.tap,
            bias=options.has_bias,
            dropped=options.fit == "drop",
            kept=(0,) if options.destination and DESTINATIONS[options.destination].keeps_first else (),
        )

    def sums_bytes(self, collected: Taps, size: int) -> int:
        from nbl_export.methods.sums import sums_bytes

        return len(collected.taps) * sums_bytes(size)

    def collector(self, model: Any, collected: Taps, *, bf16: bool) -> Any:
        from nbl_export.methods.linear.collect import Collection

        return Collection(model, collected.taps, bf16=bf16)

    def choose(self, inputs: ChoiceInputs, task: Task, say: Say, known: Mapping[str, Any]) -> Choice:
        from nbl_export.methods.linear.order import Selection
        from nbl_export.methods.linear.planning import make_plan

        return make_plan(inputs, Selection(inputs, task, known.get("greedy")), say, task)

    def from_tensors(self, tensors: Stored) -> Mixer:
        return Linear(tensors["weight"], tensors["bias"])

    def from_module(self, state: Stored) -> Mixer:
        return Linear(state["linear.weight"], state["linear.bias"])

    def blank(self, config: Any, decoder: Any, stated: Any, multiplier: float = 1.0) -> Any:
        from torch import nn

        from nbl_export.methods.modules import Wrapped

        return Wrapped(nn.Linear(config.hidden_size, config.hidden_size), multiplier)

    def passes(self, maps: Any, tap: str) -> Sequence[ir.passes.PassBase]:
        from nbl_export.methods.linear.passes import RewriteBlocks

        return (RewriteBlocks(maps, tap),)

    def reference(self, directory: Path, head_dim: int, mixers: Any, tap: str, *, fp32_activations: bool) -> Any:
        from nbl_export.graph.decoder import OnnxDecoder
        from nbl_export.graph.names import all_logits_file
        from nbl_export.methods.mixed_session import MixedSession

        session = MixedSession(directory / all_logits_file(directory), mixers, tap, fp32_activations=fp32_activations)
        return OnnxDecoder(directory, head_dim, session=session)

    def rewrite_ir(self, model: Any, maps: Any, tap: str) -> None:
        from nbl_export.methods.linear.ir import bypass_attention, drop_states

        bypass_attention(model, maps, tap)
        drop_states(model, maps)

    def ir_reference(self, directory: Path, file: str, mixers: Any, tap: str, *, exact: bool) -> Any:
        from nbl_export.methods.linear.ir_parts import MixedIr

        return MixedIr(directory, file, mixers, tap, exact=exact)


LINEAR = _Linear()
