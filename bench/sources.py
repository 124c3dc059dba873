"""One model and one set of maps through every source of decoder graphs: do the rewritten graphs agree?

    NBL_OPTIMUM_PYTHON=E/bin/python python bench/sources.py MODEL MAPS > bench/results/sources-<model>.json

MAPS is the maps.safetensors of a run. Every source exports the original, and `nbl-export rewrite-graph` inserts the
maps. The logits of two rows of text (prefill and 16 cached steps, each row alone) are compared with the torch model
with the same maps, and between sources. NBL_OPTIMUM_PYTHON is the Python interpreter of an environment with
optimum-onnx; without this variable, the optimum row is skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

import numpy as np

from tests.graph_sources import OPTIMUM_PYTHON, make_graph
from tests.tiny import stdlib_text

SOURCES = ("genai-fp32", "mobius-default", "mobius-cpu", "transformers-20", "transformers-23", "optimum")
LENGTHS = (112, 45)  # tokens of the rows, with the cached steps
TOLERANCE = 1e-3
PACKAGES = ("torch", "transformers", "onnx-ir", "onnxruntime", "onnxruntime-genai", "mobius-onnx")


def graph_rows(source: str, checkpoint: Path, maps: Path, scratch: Path, head_dim: int, rows: Any) -> list[np.ndarray]:
    """Logits [T, V] of the rewritten graph for each row."""
    from nbl_export.graph.decoder import OnnxDecoder
    from nbl_export.run.rewrite_given import rewrite_given
    from nbl_export.verify.ladder import run_rows

    with contextlib.redirect_stdout(sys.stderr):  # exporters print to stdout, which is for the result
        original = make_graph(source, checkpoint, scratch / source)
    out = rewrite_given(original, maps, None, None, scratch / f"{source}-nbl")
    caches = json.loads((out / "nbl.json").read_text(encoding="utf-8"))["caches"]
    decoder = OnnxDecoder(out, head_dim, caches=caches)
    return [run_rows(decoder, [row])[0] for row in rows]


def apart(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, Any]:
    """Largest logit difference, and the number of positions with a difference beyond the tolerance."""
    worst = np.concatenate([np.abs(a - b).max(1) for a, b in zip(ours, theirs, strict=True)])
    return {
        "largest": float(worst.max()),
        "median": float(np.median(worst)),
        "positions": len(worst),
        "beyond_tolerance": int((worst > TOLERANCE).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("maps", type=Path)
    options = parser.parse_args()
    import torch

    from nbl_export.files import versions
    from nbl_export.measure.benchmark import machine
    from nbl_export.model.checkpoint import load
    from nbl_export.model.checkpoint import source as checkpoint_source
    from nbl_export.model.linearize import linearize
    from nbl_export.plan.maps_file import load_maps, maps_in

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        found = checkpoint_source.resolve(options.model)
        directory = load.materialise(found, place / "checkpoint")
        ids = load.load_tokenizer(directory)(stdlib_text(20_000))["input_ids"]
        rows = [ids[at : at + n] for at, n in ((0, LENGTHS[0]), (1000, LENGTHS[1]))]
        layers, tap = maps_in(options.maps)
        model = linearize(load.load_model(directory), load_maps(options.maps, layers), tap or "residual")
        with torch.inference_mode():
            truth = [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows]
        del model
        head_dim = load.read_spec(found).head_dim
        made: dict[str, list[np.ndarray]] = {}
        for source in SOURCES:
            if source == "optimum" and OPTIMUM_PYTHON is None:
                print("optimum: NBL_OPTIMUM_PYTHON names no environment", file=sys.stderr)
                continue
            made[source] = graph_rows(source, directory, options.maps, place, head_dim, rows)
            print(source, apart(made[source], truth), file=sys.stderr, flush=True)
    pairs = {f"{a}, {b}": apart(made[a], made[b]) for a, b in itertools.combinations(made, 2)}
    result = {
        "layers": list(layers),
        "tap": tap,
        "rows": list(LENGTHS),
        "tolerance": TOLERANCE,
        "from_torch": {source: apart(logits, truth) for source, logits in made.items()},
        "from_each_other": pairs,
        "machine": machine(),
        "versions": versions(PACKAGES),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
