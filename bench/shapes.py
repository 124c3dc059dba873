"""Peak memory and seconds of stages on random checkpoints with the shapes of large models.

    python bench/shapes.py TOKENIZER 3B --memory 14 --until report --precision int4 --select cca
    python bench/shapes.py TOKENIZER 8B --memory 18 --until rewrite --precision int4 --select cca --tokens 4608

TOKENIZER is a model directory whose tokenizer has no more words than the shapes. Weights are random, so quality and the
chosen layers mean nothing. A process may take --memory GiB for weights, so that each model runs one layer at a time.
A quarter of the layers is chosen by --select. Stages run up to --until.
The benchmark is a short one: an empty cache, and two loads of each decoder.
Peak memory is VmHWM of a process that runs only the stage. Its peak without mapped files is RssAnon, read each second.
A limit of memory is set around the command: systemd-run --scope -p MemoryMax=16G python bench/shapes.py ...
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "3B": {"model_type": "qwen2", "hidden_size": 2048,
           "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
           "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    "8B": {"model_type": "llama", "hidden_size": 4096,
           "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False},
}  # fmt: skip
LEFT_OUT = ("text", "distill", "eval", "build")  # text is a part of calibrate here; nobody asked for the others
CHILD = """
import json, os, sys
os.environ["TQDM_DISABLE"] = "1"
from pathlib import Path
from nbl_export.model import memory
from nbl_export.run import estimate  # refuses by the memory that there is
stage, model, out, tokens, limit, layers, select, engine, precision = sys.argv[1:]
memory.available_bytes = lambda: int(limit) << 30
from nbl_export.run.pipeline import run_calibration, run_stages
from nbl_export.run.progress import Ui
given = {"calibration_tokens": int(tokens), "layers": layers, "select": select}
given |= {"engine": engine, "precision": precision}
given |= {"depths": (0,), "repetitions": 2}
if stage == "estimate":
    estimate.available_bytes = memory.available_bytes
    print(json.dumps(estimate.estimate(model, given)))
    sys.exit()
if stage == "calibrate":
    run_calibration(model, given, Path(out), Ui(quiet=True))
else:
    run_stages(Path(out), stage, Ui(quiet=True))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def random_checkpoint(shape: dict[str, Any], tokenizer: Path, out: Path) -> int:
    """Write a random checkpoint in bfloat16, a file for each layer; returns its number of parameters.

    Args:
        shape: keys of config.json.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    out.mkdir()
    config = {**shape, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, out)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        if name != "lm_head.weight" or not config["tie_word_embeddings"]:
            part = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
            files.setdefault(f"model-{part}.safetensors", {})[name] = value
    index: dict[str, str] = {}
    for part, tensors in files.items():
        made = {n: torch.randn(t.shape).mul_(0.02) if t.ndim > 1 else torch.ones(t.shape) for n, t in tensors.items()}
        save_file({n: t.bfloat16() for n, t in made.items()}, out / part, {"format": "pt"})
        index |= dict.fromkeys(tensors, part)
    facts = {"metadata": {}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(facts), encoding="utf-8")
    return sum(t.numel() for tensors in files.values() for t in tensors.values())


def measured(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    from nbl_export.run.pipeline import STAGES

    layers, asked = SHAPES[shape]["num_hidden_layers"], ("tokens", "select", "engine", "precision")
    found: dict[str, Any] = {"layers": layers, **{name: getattr(options, name) for name in asked}}
    names = [stage.name for stage in STAGES if stage.name not in LEFT_OUT]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        model, run = Path(scratch) / "model", Path(scratch) / "run"
        found["parameters"] = random_checkpoint(SHAPES[shape], options.tokenizer, model)
        how = (options.select, options.engine, options.precision)
        given = (model, run, options.tokens, options.memory, layers // 4, *how)
        found["speed"] = json.loads(_child("estimate", given)[0])["machine"]
        for stage in names[: names.index(options.until) + 1]:
            started = time.monotonic()
            said, anonymous = _child(stage, given)
            seconds, peak = time.monotonic() - started, int(said.split()[-1]) * 1024
            found[stage] = {"seconds": seconds, "peak_bytes": peak, "peak_anonymous_bytes": anonymous}
            print(shape, stage, found[stage], file=sys.stderr, flush=True)
        if "verify" in found:
            checks = json.loads((run / "verify.json").read_text(encoding="utf-8"))["checks"]
            found["checks"] = {"passed": sum(check["passed"] for check in checks), "all": len(checks)}
        if "bench" in found:
            found["timings"] = json.loads((run / "bench.json").read_text(encoding="utf-8"))["timings"]
        found["moments_bytes"] = (run / "sums.safetensors").stat().st_size
        found["run_bytes"] = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    return found


def _child(stage: str, given: tuple[Any, ...]) -> tuple[str, int]:
    """What a process prints that runs only the stage, and the most bytes that it has beside mapped files."""
    command, most = [sys.executable, "-c", CHILD, stage, *map(str, given)], 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while True:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")  # a zombie's has no memory
            anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
            most = max(most, 1024 * int(anonymous[1]) if anonymous else 0)
            try:
                said, _ = process.communicate(timeout=1)
                break
            except subprocess.TimeoutExpired:
                continue
    if process.returncode:
        raise SystemExit(f"{stage}: exit status {process.returncode}")
    return said, most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("shapes", nargs="+", choices=tuple(SHAPES))
    parser.add_argument("--memory", type=int, default=8, help="GiB that the weights may take")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration, more than the hidden size")
    parser.add_argument("--until", default="plan", help="the last stage")
    parser.add_argument("--engine", default="ort")
    parser.add_argument("--precision", default="fp32", help="of the graphs")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint and the run are made, and removed")
    parser.add_argument("--select", default="cca", help="how layers are chosen; cca needs no pass over the weights")
    options = parser.parse_args()
    from nbl_export.files import versions
    from nbl_export.measure.benchmark import machine

    about = {"machine": machine(), "versions": versions(("torch", "transformers")), "memory_gib": options.memory}
    rows = {shape: measured(shape, options) for shape in options.shapes}
    print(json.dumps({**about, "shapes": rows}, indent=1))


if __name__ == "__main__":
    main()
