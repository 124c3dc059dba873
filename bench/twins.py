"""Verifies int8 and int4 graphs: float32 twins against torch, kernels against codes, shipped graphs against both.

    python bench/twins.py MODEL NAME [--layers 7,9,15,25-29]      MODEL: a GGUF or directory, shown as NAME
    python bench/twins.py                                          tiny random Llama, Mistral (window), Qwen2, Gemma 3

A float32 twin is a float32 copy of the same graph. Each row comes from the verify.json of a run without benchmark. Rows
of float32 graphs show the time without a twin. New rows replace the model's rows in bench/results/twins.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

from made import made

from nbl_export.files import versions
from nbl_export.measure.benchmark import machine
from nbl_export.verify.codes import DISTANCE, NEARNESS, PRODUCTS
from tests.tiny import save_checkpoint, stdlib_text

PRECISIONS = ("fp32", "int8", "int4")
TINY = ("llama", "mistral-window", "qwen2", "gemma3")
PACKAGES = ("torch", "transformers", "onnx-ir", "onnxruntime", "onnxruntime-genai")
OUTPUT = Path(__file__).parent / "results" / "twins.json"


def command(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "nbl_export", *map(str, words)], stdout=subprocess.DEVNULL)
    if done.returncode not in (0, 3):  # 3: the row is kept and states that verification failed
        sys.exit(f"{' '.join(map(str, words))} ended with {done.returncode}")


def measure(name: str, model: Path, precision: str, layers: str, given: Sequence[object], run: Path) -> dict[str, Any]:
    """One row: a run up to verification, and the largest figures of its checks."""
    command("calibrate", "--model", model, "--output", run, *given)
    command("plan", run, "--layers", layers)
    command("rewrite", run, "--precision", precision)
    command("verify", run)
    found = json.loads((run / "verify.json").read_text(encoding="utf-8"))
    stages = json.loads((run / "nbl.json").read_text(encoding="utf-8"))["stages"]
    checks = found["checks"]

    def worst(metric: str, *names: str) -> float | None:
        return max((r["value"] for r in checks if metric in r["metric"] and r["check"] in names), default=None)

    return {
        "model": name,
        "precision": precision,
        "replaced_layers": found["replaced_layers"],
        "passed": found["passed"],
        "twin_original": worst("logit", "original"),
        "twin_nbl": worst("logit", "nbl"),
        "steps": worst(NEARNESS, "structure"),
        "products": worst(PRODUCTS, "structure"),
        "shipped": worst("logit", "quantised"),
        "rounding": worst(DISTANCE, "quantised"),
        "text": [r["detail"] for r in checks if r["check"] == "text"],
        "proof": found["proof"],
        "verify_seconds": stages["verify"]["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--layers", default="1,2")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        text = scratch / "text.txt"
        text.write_text(stdlib_text(400_000), encoding="utf-8")
        small = ("--calibration", text, "--calibration-tokens", 4096, "--context", 64)
        subjects = [(options.name, options.model, ("--calibration-tokens", 16_384))] if options.model else [
            (f"tiny {name}", save_checkpoint(name, scratch / name), small) for name in TINY
        ]  # fmt: skip
        for name, model, given in subjects:
            for precision in PRECISIONS:
                run = scratch / f"{name.replace(' ', '-')}-{precision}"
                rows.append(measure(name, model, precision, options.layers, given, run))
                print(json.dumps(rows[-1], indent=None)[:300], flush=True)
    keep(rows)


def keep(rows: list[dict[str, Any]]) -> None:
    """Write rows to the file; they replace the rows of the same models."""
    before = json.loads(OUTPUT.read_text(encoding="utf-8"))["rows"] if OUTPUT.is_file() else []
    new = {row["model"] for row in rows}
    commands = ["python bench/twins.py", "python bench/twins.py MODEL SmolLM2-135M-Instruct --layers 7,9,15,25-29"]
    value = {
        "made": made(commands, ["1,2", "7,9,15,25-29"], chosen=False),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "rows": [*(row for row in before if row["model"] not in new), *rows],
    }
    OUTPUT.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
