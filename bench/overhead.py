"""Cost of calibration: time compared with the plain forward pass (interleaved), and peak memory of four stages.

    python bench/overhead.py MODEL [--rounds 5] > bench/results/overhead-<model>-<machine>.json

Each round runs the decoder over the same 8,192 tokens in three ways: plainly, with the moments of the residual tap, and
with the moments of both taps (as for `--fit distilled`). The order rotates with each round. Freed memory stays in the
process, as in nbl-export (`nbl_export/model/allocator.py`). Peak memory is VmHWM of a fresh child process that runs
only the stage.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS, CONTEXT = 8192, 512
CHILD = """
import sys, os
os.environ["TQDM_DISABLE"] = "1"
from pathlib import Path
from nbl_export.run.pipeline import run_calibration, run_stages
from nbl_export.run.progress import Ui
stage, model, out = sys.argv[1:]
if stage == "calibrate":
    run_calibration(model, {"calibration_tokens": 16384}, Path(out), Ui(quiet=True))
else:
    run_stages(Path(out), stage, Ui(quiet=True))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def time_rounds(model_name: str, rounds: int) -> list[dict[str, float]]:
    import torch

    from nbl_export.calibrate import hooks
    from nbl_export.model import allocator
    from nbl_export.model.checkpoint import load, materialise, source
    from nbl_export.text import corpus
    from nbl_export.text import windows as text_windows

    allocator.keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch:
        directory = materialise.materialise(source.resolve(model_name), Path(scratch) / "checkpoint")
        model, tokenizer = load.load_model(directory), load.load_tokenizer(directory)
    windows, _ = text_windows.pack(corpus.installed_text(), tokenizer, TOKENS, CONTEXT)

    def plain() -> None:
        with torch.inference_mode():
            for batch in windows.split(hooks._BATCH_TOKENS // CONTEXT):
                model.get_decoder()(input_ids=batch, use_cache=False)

    def with_moments(*taps: str) -> None:
        hooks.collect(model, windows, lambda _d, _t: None, taps)

    ways = [
        ("plain", plain),
        ("moments", lambda: with_moments("residual")),
        ("both_taps", lambda: with_moments("residual", "normed")),
    ]
    found = []
    for k in range(rounds + 1):
        row = {}
        for name, run in (*ways[k % 3 :], *ways[: k % 3]):
            started = time.perf_counter()
            run()
            row[name] = time.perf_counter() - started
        if k:  # the first round warms up
            found.append(row)
    return found


def peak_bytes(stage: str, model: str, out: str) -> int:
    done = subprocess.run([sys.executable, "-c", CHILD, stage, model, out], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from nbl_export.measure.benchmark import machine

    rounds = time_rounds(options.model, options.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        out = str(Path(scratch) / "run")
        stages = ("calibrate", "plan", "decoder", "rewrite")
        peaks = {stage: peak_bytes(stage, options.model, out) for stage in stages}
    over = {name: [r[name] / r["plain"] - 1 for r in rounds] for name in ("moments", "both_taps")}
    print(
        json.dumps(
            {
                "machine": machine(),
                "tokens": TOKENS,
                "context": CONTEXT,
                "rounds_seconds": rounds,
                "overhead_median": {name: statistics.median(found) for name, found in over.items()},
                "overhead_range": {name: [min(found), max(found)] for name, found in over.items()},
                "peak_memory_bytes": peaks,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
