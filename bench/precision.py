"""Speed, size, quality and verification of each quantisation of one model, original and NBL, in one run directory.

    python bench/precision.py MODEL DATA WORK --layers 7,9,15,25-29 [--only int4,...] > bench/results/FILE.json

Every row runs the command line with other options in the run directory WORK, which may already hold a run of this
model. Calibration runs once. Each row exports, verifies, and measures perplexity on three texts through the exported
graphs. It then times paired rounds: prefill of 512 and 2048 tokens, and decode of 47 tokens after 512. `--repetitions
0` times nothing, and needs a run in WORK. Rows that round a GGUF file's matrices get `--requantize`. DATA is as for
`quality.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bed

ROWS: dict[str, tuple[str, ...]] = {
    "fp32": ("--precision", "fp32"),
    "int8": ("--precision", "int8"),
    "gguf": ("--precision", "gguf"),
    "int4": ("--precision", "int4"),
    "int4, k_quant": ("--precision", "int4", "--builder-option", "algo_config=k_quant"),
    "int4, k_quant_last": ("--precision", "int4", "--builder-option", "algo_config=k_quant_last"),
    "int4, k_quant_mixed": ("--precision", "int4", "--builder-option", "algo_config=k_quant_mixed"),
    "int4, blocks of 128": ("--precision", "int4", "--builder-option", "block_size=128"),
    "int4, float32 activations": ("--precision", "int4", "--builder-option", "accuracy_level=1"),
    "int4, gate and up in one": ("--precision", "int4", "--builder-option", "fuse_mlp_gate_up=true"),
}
DECODE = 'prompt-tokens = "512"\ngenerate-tokens = 47\ndepth = "512"\n'  # the main job's benchmark, as TOML
CONTEXT = 512
PREFILL = (("--prompt-tokens", "512", "--depth", "0"), ("--prompt-tokens", "2048", "--depth", "0"))


def command(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "nbl_export", *map(str, words)], stdout=subprocess.DEVNULL)
    if done.returncode not in (0, 3):  # 3: the row is kept and states that verification failed
        sys.exit(f"{' '.join(map(str, words))} ended with {done.returncode}")


def measure(options: argparse.Namespace, given: tuple[str, ...]) -> dict[str, Any]:
    work: Path = options.work
    again = options.model.endswith(".gguf") and given[1] in ("int8", "int4")
    given = (*given, "--requantize") if again else given
    job = ("--model", options.model, "--output", work, "--layers", options.layers, *options.calibrate)
    row = timed(job, work, given, options.config) if options.repetitions != "0" else exported(options, given)
    if options.windows and options.unproven:
        row["quality"] = perplexities(work, options.texts, options.windows)
    elif options.windows:
        command("eval", work, "--perplexity", options.texts, "--limit", options.windows, "--force")
        row["quality"] = [
            {"task": r["task"], "metric": r["metric"], "figures": r["figures"], "differences": r["differences"]}
            for r in read(work / "eval.json")["table"]
        ]
    return row


def exported(options: argparse.Namespace, given: tuple[str, ...]) -> dict[str, Any]:
    """Export and verify, in a run directory that is there."""
    work: Path = options.work
    command("plan", work, "--layers", options.layers)  # the run may have been made with others
    words = list(given)  # defaults take the place of options of an earlier row
    if given[1] != "fp32" and "--builder-option" not in given:
        words += ["--builder-option", "accuracy_level=4"]
    command("rewrite", work, *words)
    if options.unproven:
        return {"options": list(given), "model_bytes": sizes(work)}
    command("verify", work)
    report = read(work / "verify.json")
    checks = [r for r in report["checks"] if "logit" in r["metric"]]
    return {"options": list(given), "verified": report["passed"], "checks": checks, "model_bytes": sizes(work)}


def perplexities(work: Path, named: str, limit: int) -> list[dict[str, Any]]:
    """What `nbl-export eval --perplexity` gives, for graphs that no verification has seen; without errors."""
    from nbl_export.evaluation.lm import find_graph
    from nbl_export.evaluation.measure import NamedText, parse_named, windows
    from nbl_export.evaluation.scorer import GraphScorer, Request
    from nbl_export.model.checkpoint.load import load_tokenizer
    from nbl_export.text.corpus import read_text

    tokenizer, rows = load_tokenizer(work / "original"), []
    texts = [NamedText(name, read_text(file)) for name, file in parse_named("texts", named)]
    cut = {t.name: windows(t, tokenizer, CONTEXT, limit) for t in texts}
    found: dict[str, dict[str, float]] = {name: {} for name in cut}
    for which in ("original", "nbl"):
        place = find_graph(work, which)
        scorer = GraphScorer(place.open(), place.max_positions)
        for name, parts in cut.items():
            scores = scorer.score([Request(tuple(ids[:1]), tuple(ids[1:])) for ids in parts])
            loss = -sum(s.loglikelihood for s in scores) / sum(len(ids) - 1 for ids in parts)
            found[name][which] = math.exp(loss)
            print(f"  {which} {name} {found[name][which]:.2f}", file=sys.stderr, flush=True)
    for name, values in found.items():
        figures = {which: {"value": value} for which, value in values.items()}
        rows.append({"task": f"perplexity:{name}", "metric": "token_perplexity", "figures": figures})
    return rows


def sizes(work: Path) -> dict[str, int]:
    """Bytes of both deployable directories."""
    found = {"original": "original", "nbl": "model"}
    return {name: sum(f.stat().st_size for f in (work / d).iterdir()) for name, d in found.items()}


def timed(job: tuple[Any, ...], work: Path, given: tuple[str, ...], config: Path) -> dict[str, Any]:
    """Run the main job, then the other benchmarks."""
    command(*job, *given, "--config", config)
    report = read(work / "report.json")
    row: dict[str, Any] = {
        "options": list(given),
        "status": report["status"],
        "checks": [r for r in report["checks"] if "logit" in r["metric"]],
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
    return row


def texts(data: Path, scratch: Path) -> str:
    """The three texts in the form of --perplexity."""
    (scratch / "news.txt").write_text("\n\n".join(bed.news(data)), encoding="utf-8")
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
    parser.add_argument("--unproven", action="store_true", help="with --repetitions 0: no verification either")
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens from each text; 0 skips quality")
    parser.add_argument("--calibrate", default="", help="more arguments for nbl-export, as one string")
    options = parser.parse_args()
    options.calibrate = options.calibrate.split()
    from nbl_export.files import versions
    from nbl_export.measure.benchmark import machine

    chosen = [name.strip() for name in options.only.split(";")] if options.only else list(ROWS)
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        options.texts = texts(options.data, Path(scratch))
        options.config = Path(scratch) / "decode.toml"
        options.config.write_text(f"{DECODE}repetitions = {options.repetitions}\n", encoding="utf-8")
        for name in chosen:
            print(name, file=sys.stderr, flush=True)
            rows[name] = measure(options, ROWS[name])
    packages = versions(("onnxruntime", "onnxruntime-genai", "torch", "transformers"))
    about = {"layers": options.layers, "calibrate": options.calibrate, "machine": machine(), "versions": packages}
    print(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
