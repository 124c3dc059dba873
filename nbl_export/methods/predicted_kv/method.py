"""The method: keys and values of a prompt's skipped tokens are predicted (`maps`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.methods.base import Choice, ChoiceInputs, Method, Mixer, Say, Stored, Task
from nbl_export.methods.predicted_kv.candidates import ExitCandidates, Exits, candidate_exits
from nbl_export.methods.predicted_kv.config import check_stated, facts_of, read_stated
from nbl_export.methods.predicted_kv.maps import PredictedKV, exit_of
from nbl_export.options.options import AUTO_EXIT
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import PREDICTED_KV
from nbl_export.text.windows import LONG_ROW

if TYPE_CHECKING:
    import onnx_ir as ir

    from nbl_export.options.options import JobOptions

__all__ = ["PREDICTED", "PredictedKVMethod"]


class PredictedKVMethod(Method):
    """Keys and values of skipped tokens from a fitted map. Its maps are fitted together by exit layer (`sums`)."""

    name = PREDICTED_KV
    title = "predicted KV"
    holds_cache = True
    instead = "replace layers in their place (--exit-layer none)"

    def candidates(self, options: JobOptions, decoder: DecoderSpec, known: Mapping[str, Any]) -> ExitCandidates:
        named = options.exit_layer != AUTO_EXIT
        exits = (int(options.exit_layer),) if named else candidate_exits(decoder.num_layers)
        held = tuple(known.get("exits", ()))
        return ExitCandidates(
            exits=exits,
            recent_choices=tuple(n for n in options.recent_choices if n < decoder.max_positions),
            named=named,
            collected=Exits(held if named and exits[0] in held else exits, min(LONG_ROW, decoder.max_positions)),
        )

    def rows(self, windows_WT: Any, collected: Exits) -> Any:
        from nbl_export.text.windows import joined

        return joined(windows_WT, collected.length)

    def collector(self, model: Any, collected: Exits, *, bf16: bool) -> Any:
        from nbl_export.methods.predicted_kv.sums import ExitSums

        return ExitSums(model, collected.exits, bf16=bf16)

    def choose(self, inputs: ChoiceInputs, task: Task, say: Say, known: Mapping[str, Any]) -> Choice:
        from nbl_export.methods.predicted_kv.choose import choose_exit

        return choose_exit(inputs, lambda exit_layer: self.fit(inputs, exit_layer), task, say)

    def fit(self, inputs: ChoiceInputs, exit_layer: int) -> dict[int, PredictedKV]:
        """The maps of all layers from an exit layer up, for one recent token.

        Raises:
            NblError: the sums hold NaN or infinity, or the stream at the exit layer does not vary.
        """
        from nbl_export.methods.predicted_kv.sums import maps_of

        return maps_of(inputs.model.value, inputs.sums.value, inputs.candidates.collected.exits, exit_layer, 1)

    def from_tensors(self, tensors: Stored) -> Mixer:
        inputs, exit_layer, recent_tokens, epsilon = tensors["numbers"].tolist()
        numbers = int(inputs), int(exit_layer), int(recent_tokens), epsilon
        return PredictedKV(tensors["weight"], tensors["bias"], *numbers)

    def blank(self, config: Any, decoder: Any, stated: Any, multiplier: float = 1.0) -> Any:
        from nbl_export.methods.predicted_kv.module import PredictedKVModule
        from nbl_export.methods.predicted_kv.products import KeyValueProducts

        found = read_stated(stated)
        products = KeyValueProducts.of(decoder.layers[found.layer].self_attn, config, found.layer)
        shape = (2 * products.width, 2 * config.hidden_size)
        weight = np.broadcast_to(np.float32(0), shape)  # takes no memory
        numbers = config.hidden_size, found.layer, found.recent_tokens, found.epsilon
        return PredictedKVModule(PredictedKV(weight, weight[:, 0], *numbers))

    def from_module(self, state: Stored) -> Mixer:
        raise KeyError("numbers")  # which only the configuration has

    def summary(self, maps: Any) -> dict[str, Any]:
        mixer = exit_of(maps)
        return {"layer": mixer.exit_layer, "recent_tokens": mixer.recent_tokens}

    def facts(self, maps: Any) -> dict[str, Any]:
        return facts_of(maps)

    def check_facts(self, stated: Any, layers: Sequence[int], count: int, positions: Any) -> None:
        check_stated(stated, layers, count, positions)

    def passes(self, maps: Any, tap: str) -> Sequence[ir.passes.PassBase]:
        from nbl_export.methods.predicted_kv.passes import PrefillExit

        return (PrefillExit(maps),)

    def reference(self, directory: Path, head_dim: int, mixers: Any, tap: str, *, fp32_activations: bool) -> Any:
        from nbl_export.methods.predicted_kv.reference import onnx_reference

        return onnx_reference(directory, head_dim, mixers, fp32_activations=fp32_activations)

    def rewrite_ir(self, model: Any, maps: Any, tap: str) -> None:
        from nbl_export.methods.predicted_kv.ir import exit_ir

        exit_ir(model, maps)

    def ir_reference(self, directory: Path, file: str, mixers: Any, tap: str, *, exact: bool) -> Any:
        from nbl_export.methods.predicted_kv.ir_reference import ir_reference

        return ir_reference(directory, file, mixers, exact=exact)


PREDICTED = PredictedKVMethod()
