"""Speed, size, quality and proof of each way to quantise, original and NBL, of one model in one run directory.

    python bench/precision.py MODEL DATA WORK --layers 0,5-8,22,24-29 [--only int4,...] > bench/results/FILE.json

Every row is a run of the command line with other options in the same run directory (calibration is done once, in
WORK, which may be a run directory of this model already): export, verification, perplexity on three texts through the
exported graphs, paired rounds of prefill 512 and 2048 and of 47 tokens decoded behind 512. DATA as for `quality.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import quality

ROWS: dict[str, tuple[str, ...]] = {
    "fp32": ("--precision", "fp32"),
    "int8": ("--precision", "int8"),
    "int4": ("--precision", "int4"),
    "int4, maps at 8 bits": ("--precision", "int4", "--map-bits", "8"),
    "int4, maps in float32": ("--precision", "int4", "--map-bits", "32"),
    "int4, k_quant": ("--precision", "int4", "--builder-option", "algo_config=k_quant"),
    "int4, k_quant_last": ("--precision", "int4", "--builder-option", "algo_config=k_quant_last"),
    "int4, k_quant_mixed": ("--precision", "int4", "--builder-option", "algo_config=k_quant_mixed"),
    "int4, blocks of 128": ("--precision", "int4", "--builder-option", "block_size=128"),
    "int4, float32 activations": ("--precision", "int4", "--builder-option", "accuracy_level=1"),
    "int4, gate and up in one": ("--precision", "int4", "--builder-option", "fuse_mlp_gate_up=true"),
}
DECODE = ("--prompt-tokens", "512", "--generate-tokens", "47", "--depth", "512")
PREFILL = (("--prompt-tokens", "512", "--depth", "0"), ("--prompt-tokens", "2048", "--depth", "0"))


def command(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "nbl_export", *map(str, words)], stdout=subprocess.DEVNULL)
    if done.returncode not in (0, 3):  # 3: a row that is not verified is a row all the same, and says so
        sys.exit(f"{' '.join(map(str, words))} ended with {done.returncode}")


def measure(options: argparse.Namespace, given: tuple[str, ...]) -> dict[str, Any]:
    work: Path = options.work
    job = ("--model", options.model, "--output", work, "--layers", options.layers, "--repetitions", options.repetitions)
    command(*job, *options.calibrate, *given, *DECODE)
    report = read(work / "report.json")
    row: dict[str, Any] = {
        "options": list(given),
        "verified": report["verified"],
        "rungs": [r for r in report["rungs"] if "logit" in r["metric"]],
        "model_bytes": report["model_bytes"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "ratios": [r for r in report["ratios"] if r["kind"] == "tg"],
        "rows": [r for r in report["rows"] if r["kind"] == "tg"],
    }
    for prefill in PREFILL:
        command("bench", work, *prefill, "--generate-tokens", 1, "--force")
        report = read(work / "report.json")
        row["ratios"] += [r for r in report["ratios"] if r["kind"] == "pp"]
        row["rows"] += [r for r in report["rows"] if r["kind"] == "pp"]
    if options.windows:
        command("eval", work, "--perplexity", options.texts, "--limit", options.windows, "--force")
        row["quality"] = [
            {"task": r["task"], "metric": r["metric"], "figures": r["figures"], "differences": r["differences"]}
            for r in read(work / "eval.json")["table"]
        ]
    return row


def texts(data: Path, scratch: Path) -> str:
    """The three texts as the command line takes them."""
    (scratch / "news.txt").write_text("\n\n".join(quality.news(data)), encoding="utf-8")
    found = {
        "c4": data / "c4/c4_demo.json",
        "wikitext": data / "wikitext-2-raw/wiki.valid.raw",
        "news": scratch / "news.txt",
    }
    return ",".join(f"{name}={path}" for name, path in found.items())


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", default="0,5-8,22,24-29")
    parser.add_argument("--only", help="names of rows, separated by semicolons")
    parser.add_argument("--repetitions", default="6")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens of each text; 0 leaves quality out")
    parser.add_argument("--calibrate", default="", help="more words for nbl-export, as one string")
    options = parser.parse_args()
    options.calibrate = options.calibrate.split()
    from nbl_export.artifacts import versions
    from nbl_export.bench import machine

    chosen = [name.strip() for name in options.only.split(";")] if options.only else list(ROWS)
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        options.texts = texts(options.data, Path(scratch))
        for name in chosen:
            print(name, file=sys.stderr, flush=True)
            rows[name] = measure(options, ROWS[name])
    packages = versions(("onnxruntime", "onnxruntime-genai", "torch", "transformers"))
    about = {"layers": options.layers, "calibrate": options.calibrate, "machine": machine(), "versions": packages}
    print(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
