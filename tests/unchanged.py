"""Compares plans, maps and graphs of this working tree with those of another commit, byte for byte.

    python tests/unchanged.py COMMIT OUT                tiny models
    python tests/unchanged.py COMMIT OUT --real GGUF    also SmolLM2 with 8 linear layers, and with a chosen exit layer

Both trees run the same jobs up to the rewrite, in `OUT/before` and `OUT/now`. Words that were renamed since that commit
are compared by their new names. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_FLAGS = {"--exit-layer": "--cut", "--recent-tokens": "--near"}  # name today -> name before
_WORDS = {"none": "linear", "cut": "exit", "near": "recent_tokens", "far": "long_range", "predicted": "predicted_kv"}
# Names of nodes and values before -> today, replaced in this order.
_NAMES = {
    "/nbl/cut": "/nbl/exit", "nbl.cut.": "nbl.exit.", "climbing_": "continuing_", "near_": "recent_",
    "exit.near": "exit.recent", "/from_near": "/from_recent", "is_before_near": "is_before_recent",
    "is_far": "is_skipped", "far_": "skipped_", "/far": "/skipped", "FarKeys": "SkippedKeys",
    "FarValues": "SkippedValues", "/near\"": "/in_window\"",
}  # fmt: skip
_PLAN = ("num_layers", "replaced_layers", "kinds", "tap", "select", "scores", "goal", "curve", "exit")
_SMALL = "--calibration-tokens 2048 --config {keys}"
_KEYS = """context = 64
depth = "0"
repetitions = 1
prompt-tokens = "16"
generate-tokens = 4
compute-dtype = "float32"
"""
TINY = {
    "linear": ("llama", "--layers 2 --fit independent"),
    "linear-limit": ("llama", "--max-perplexity-increase 900% --exit-layer none --fit independent"),
    "linear-openvino": ("llama", "--layers 1 --fit independent --engine openvino"),
    "distilled": ("llama", "--layers 0,1 --fit distilled"),
    "dropped": ("llama", "--layers 1 --fit drop"),
    "exit": ("llama", "--exit-layer 1 --recent-tokens 8"),
    "exit-auto": ("qwen2", "--exit-layer auto --recent-tokens 8 --max-perplexity-increase 900%"),
    "exit-static": ("llama", "--engine trt-rtx --exit-layer 1 --recent-tokens 8 --max-seq-len 128"),
}  # fmt: skip
REAL = {
    "real-linear": "--layers 8 --fit independent --calibration-tokens 16384",
    "real-exit": "--exit-layer auto --calibration-tokens 16384",
}
# The main job, ended behind the rewrite.
_JOB = """
import sys
from nbl_export.run import pipeline
work = pipeline._work
pipeline._work = lambda asked, recorded, output, ui, force, until: work(asked, recorded, output, ui, force, "rewrite")
pipeline._tell = lambda *given: None
from nbl_export.cli import app
sys.argv = ["nbl-export", *sys.argv[1:]]
app.main()
"""


def run_jobs(tree: Path, out: Path, models: dict[str, tuple[Path, str]], text: Path, *, before: bool) -> None:
    """Run each job with the code of a tree; a finished job is kept."""
    for name, (model, asked) in models.items():
        if (out / name / "model").is_dir():
            continue
        words = [(_FLAGS.get(word, word) if before else word) for word in asked.split()]
        given = ["--model", str(model), *words, "--calibration", str(text), "--output", str(out / name)]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run([sys.executable, "-c", _JOB, *given], cwd=tree, env=environment, check=True)


def parts_of(run: Path) -> Iterator[tuple[str, Any]]:
    """Name and content of what is compared of a run."""
    from safetensors.numpy import load_file

    facts = _renamed(json.loads((run / "nbl.json").read_text(encoding="utf-8")))
    yield from ((f"plan: {name}", facts.get(name)) for name in _PLAN)
    for name, array in load_file(run / "maps.safetensors").items():
        if array.any():  # dropped attention had no map before, and has a map of zeros now
            yield f"map: {'.'.join(_WORDS.get(word, word) for word in name.split('.'))}", array.tobytes()
    for folder in ("original", "model"):
        for file in sorted((run / folder).rglob("*")):
            if file.is_file() and file.name != "nbl.json":
                content = _graph(file) if file.suffix == ".onnx" else file.read_bytes()
                yield f"{folder}: {file.relative_to(run / folder)}", content


def _graph(file: Path) -> str:
    """A graph as text with the names of today; its external data is another file."""
    import onnx

    text = str(onnx.load(file, load_external_data=False))
    for before, today in _NAMES.items():
        text = text.replace(before, today)
    return text


def _renamed(value: Any) -> Any:
    """With the words of today, without facts that were not noted before: None, and the epsilon of the norm."""
    if isinstance(value, dict):
        noted = {key: each for key, each in value.items() if each is not None and key != "epsilon"}
        return {_WORDS.get(key, key): _renamed(each) for key, each in noted.items()}
    if isinstance(value, list):
        return [_renamed(each) for each in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value


def main() -> int:
    """Print a line a job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("out", type=Path)
    parser.add_argument("--real", type=Path, metavar="GGUF")
    asked = parser.parse_args()
    out = asked.out.resolve()
    tree = out / "tree"
    if not tree.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), asked.commit], cwd=ROOT, check=True)
    sys.path.insert(0, str(ROOT))
    from tests.tiny import save_checkpoint, stdlib_text

    text = out / "text.txt"
    text.write_text(stdlib_text(200_000), encoding="utf-8")
    files = {"keys": _KEYS, "trained": f"{_KEYS}distill-steps = 4\n"}  # steps, since minutes are other steps each time
    for name, written in files.items():
        (out / f"{name}.toml").write_text(written, encoding="utf-8")
    models = {}
    for name, (architecture, words) in TINY.items():
        checkpoint = out / architecture
        if not checkpoint.is_dir():
            checkpoint.mkdir()
            save_checkpoint(architecture, checkpoint)
        keys = out / ("trained.toml" if name == "distilled" else "keys.toml")
        models[name] = (checkpoint, f"{words} {_SMALL.format(keys=keys)}")
    if asked.real:
        models |= {name: (asked.real.resolve(), words) for name, words in REAL.items()}
    run_jobs(tree, out / "before", models, text, before=True)
    run_jobs(ROOT, out / "now", models, text, before=False)
    differ = 0
    for name in models:
        before = dict(parts_of(out / "before" / name))
        now = dict(parts_of(out / "now" / name))
        other = sorted(part for part in before | now if before.get(part) != now.get(part))
        differ += len(other)
        sys.stdout.write(f"{name}: {len(now) - len(other)} parts equal, differ: {', '.join(other) or 'none'}\n")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
