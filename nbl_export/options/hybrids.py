"""What a decoder with layers without attention (`DecoderSpec.others`) does not go with."""

from __future__ import annotations

from nbl_export.options.options import NO_WINDOWS, JobOptions
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import DecoderSpec

__all__ = ["refused"]


def refused(options: JobOptions, engine: Capabilities, decoder: DecoderSpec) -> str:
    """Why a job is refused, in one sentence; "" if it is not."""
    where = f"is not possible for {decoder.architecture}, some of whose layers have no attention"
    rows = {
        f"--engine {options.engine} {where}: it does not hold their states; use --engine ort with --provider cpu":
            not engine.hybrids,
        f"--engine {options.engine} {where}: its graphs have no loop over tokens, which a recurrence needs; "
        "use --engine ort": decoder.recurrent and not engine.recurrences,
        f"--window-layers {where}: a runtime takes states of one shape; use --window-layers {NO_WINDOWS}":
            options.window_layers != NO_WINDOWS,
        f"--quantized-model {where}: the names of their matrices are not known; leave --quantized-model out":
            options.quantized_model is not None,
    }  # fmt: skip
    return next((sentence for sentence, holds in rows.items() if decoder.others and holds), "")
