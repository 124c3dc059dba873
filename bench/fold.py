"""A map in int4 beside the residual addition, or folded with it into one matrix: which rounding costs less?

    python bench/fold.py DIR > bench/results/fold-<model>.json

    skip   h = x + x Q(W)      fold   h = x Q(I + W)

DIR is a run directory with maps on the residual stream; Q is symmetric round to nearest in blocks of 32, as the int4
graphs have it. Errors are exact on the calibration text: E |x E|^2 = tr(E' Cxx E) with the second moments of
moments.safetensors, relative to the rms of the map's output and of the residual stream that it is added to.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 32


def rounded(weight_KN: np.ndarray) -> np.ndarray:
    """What int4 makes of a matrix."""
    from nbl_export.int4_blocks import int4_blocks

    codes, scales = int4_blocks(weight_KN, BLOCK, np.dtype(np.float32))
    return codes.astype(np.float32) * np.repeat(scales, BLOCK, axis=0)


def row(layer: int, weight_DD: np.ndarray, second_DD: np.ndarray) -> dict[str, Any]:
    """Relative rms of both roundings."""

    def rms(matrix_KN: np.ndarray) -> float:
        wide = matrix_KN.astype(np.float64)
        return float(np.sqrt(np.einsum("kn,kl,ln->", wide, second_DD, wide, optimize=True)))

    apply_KN = weight_DD.T.astype(np.float32)
    eye = np.eye(len(apply_KN), dtype=np.float32)
    skip, fold = rms(rounded(apply_KN) - apply_KN), rms(rounded(eye + apply_KN) - (eye + apply_KN))
    output, stream = rms(apply_KN), rms(eye + apply_KN)
    return {
        "layer": layer,
        "skip_of_output": skip / output,
        "fold_of_output": fold / output,
        "skip_of_stream": skip / stream,
        "fold_of_stream": fold / stream,
        "fold_over_skip": fold / skip,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    from nbl_export import calibrate
    from nbl_export.plan import load_maps, maps_in

    layers, tap = maps_in(options.directory / "maps.safetensors")
    if tap not in (None, "residual"):
        parser.error("the fold is of maps on the residual stream")
    maps = load_maps(options.directory / "maps.safetensors", layers)
    moments = calibrate.load_moments(options.directory / "moments.safetensors")["residual"]
    rows = [row(i, maps[i].weight, (moments[i].xx / moments[i].count).numpy()) for i in layers]
    print(json.dumps({"block": BLOCK, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
