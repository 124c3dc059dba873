"""What verification measures: the largest figure of each check, of jobs up to verification.

    python bench/verified.py MODEL NAME [--layers 6,15,21,25-29]      MODEL: a GGUF or directory
    python bench/verified.py                        tiny random Llama, Mistral (window), Qwen2, Gemma 3

New rows replace the model's rows of the same layers in bench/results/verified.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

from made import made

from nbl_export.files import versions
from nbl_export.measure.benchmark import machine
from tests.tiny import save_checkpoint, stdlib_text

PRECISIONS = ("fp32", "int8", "int4")
TINY = ("llama", "mistral-window", "qwen2", "gemma3")
PACKAGES = ("torch", "transformers", "onnx-ir", "onnxruntime", "onnxruntime-genai")
OUTPUT = Path(__file__).parent / "results" / "verified.json"


def command(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "nbl_export", *map(str, words)], stdout=subprocess.DEVNULL)
    if done.returncode not in (0, 3):  # 3: the row is kept and states that verification failed
        sys.exit(f"{' '.join(map(str, words))} ended with {done.returncode}")


def row_of(name: str, layers: str, run: Path) -> dict[str, Any]:
    """The largest figures of a run's checks."""
    found = json.loads((run / "verify.json").read_text(encoding="utf-8"))
    facts = json.loads((run / "nbl.json").read_text(encoding="utf-8"))

    def worst(check: str) -> float | None:
        return max((r["value"] for r in found["checks"] if r["check"] == check), default=None)

    checks = ("exporter", "original", "nbl", "shipped")
    margin = max(r["value"] for r in found["checks"] if r["check"] == "text" and r["subject"] == "nbl")
    return {
        "model": name, "precision": found["precision"], "layers": layers, "kinds": facts["kinds"],
        "replaced_layers": found["replaced_layers"], "passed": found["passed"], "margin": margin,
        **{check: worst(check) for check in checks}, "proof": found["proof"], "warnings": found["warnings"],
        "verify_seconds": facts["stages"]["verify"]["seconds"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--layers", default="1,2")
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--calibration-tokens", type=int, default=4096)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        given: tuple[object, ...] = ("--calibration-tokens", options.calibration_tokens)
        models = {options.name: options.model} if options.model else {}
        if not options.model:
            models = {f"tiny {name}": save_checkpoint(name, Path(scratch) / name) for name in TINY}
            text.write_text(stdlib_text(400_000), encoding="utf-8")
            given = ("--calibration", text, "--calibration-tokens", 4096, "--context", 64)
        for name, model in models.items():
            for precision in options.precisions:
                run = Path(scratch) / f"{name}-{precision}".replace("/", "-")
                command("calibrate", "--model", model, "--output", run, *given)
                command("plan", run, "--layers", options.layers)
                command("rewrite", run, "--precision", precision)
                command("verify", run)
                rows.append(row_of(name, f"layers {options.layers}", run))
                print(json.dumps(rows[-1]), flush=True)
    keep(rows)


def keep(rows: list[dict[str, Any]]) -> None:
    """Write rows to the file; they replace the rows of the same model, precision and layers."""
    before = json.loads(OUTPUT.read_text(encoding="utf-8"))["rows"] if OUTPUT.is_file() else []
    again = {(row["model"], row["precision"], row["layers"]) for row in rows}
    every = [*(row for row in before if (row["model"], row["precision"], row["layers"]) not in again), *rows]
    commands = [
        "python bench/verified.py", "python bench/verified.py MODEL SmolLM2-135M-Instruct --layers 6,15,21,25-29",
    ]  # fmt: skip
    value = {
        "made": made(commands, ["1,2", "6,15,21,25-29"], chosen=False), "machine": machine(),
        "versions": versions(PACKAGES), "rows": every,
    }  # fmt: skip
    OUTPUT.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
