"""Time of each stage of a whole job beside the plain forward pass over the calibration tokens, and the peak memory.

    python bench/stages.py MODEL [OPTIONS of the main job] > bench/results/stages-<model>.json

The job runs in a process of its own and in a new directory (--keep DIR keeps it). The plain pass runs after it, on the
same windows, in float32, without the head. Its seconds are the unit in which calibrate and plan are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil


def plain_seconds(directory: Path) -> tuple[int, float]:
    """Tokens and seconds of the plain pass over the windows of a finished run."""
    import torch

    from nbl_export.methods.linear import collect
    from nbl_export.run.progress import Ui
    from nbl_export.run.settled import of_run
    from nbl_export.run_directory import RunDirectory

    run = RunDirectory.peek(directory)
    job = of_run(run, run.options, Ui(quiet=True))
    windows, decoder = job.text.windows.value, job.model.value.get_decoder()
    with torch.inference_mode():
        decoder(input_ids=collect.batches(windows)[0], use_cache=False)  # warm-up
        started = time.monotonic()
        for batch in collect.batches(windows):
            decoder(input_ids=batch, use_cache=False)
    return windows.numel(), time.monotonic() - started


def watched(command: list[str]) -> dict[str, int]:
    """Run the job; returns the largest resident set of each stage in bytes, sampled five times a second.

    Mapped files count. The kernel can drop their pages, so a job may run with less memory than its peak.
    """
    peaks: dict[str, int] = {}
    stage = ["start"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:

        def follow() -> None:
            for line in job.stderr or ():
                sys.stderr.write(line)
                if line.endswith(" ...\n"):
                    stage[0] = line.removesuffix(" ...\n")

        follower = threading.Thread(target=follow)
        follower.start()
        process = psutil.Process(job.pid)
        while job.poll() is None:
            with contextlib.suppress(psutil.Error):
                peaks[stage[0]] = max(peaks.get(stage[0], 0), process.memory_info().rss)
            time.sleep(0.2)
        follower.join()
    if job.returncode:
        raise SystemExit(f"the job ended with status {job.returncode}")
    return peaks


def measured(model: str, options: list[str], directory: Path) -> dict[str, Any]:
    from nbl_export.measure.benchmark import machine

    command = [sys.executable, "-m", "nbl_export", "--model", model, *options, "--output", str(directory)]
    started = time.monotonic()
    peaks = watched(command)
    total = time.monotonic() - started
    manifest, report = (json.loads((directory / f"{n}.json").read_text(encoding="utf-8")) for n in ("nbl", "report"))
    seconds = {name: stage["seconds"] for name, stage in manifest["stages"].items()}
    tokens, plain = plain_seconds(directory)
    return {
        "options": options, "title": manifest["model"]["title"], "machine": machine(), "versions": manifest["versions"],
        "products": manifest["calibration"]["products"], "tokens": tokens, "plain_seconds": plain, "seconds": seconds,
        "total_seconds": total, "peak_bytes": max(peaks.values()), "stage_peak_bytes": peaks,
        "ratio": (seconds["calibrate"] + seconds["plan"]) / plain,
        **{name: report[name] for name in ("num_layers", "replaced_layers", "goal", "curve", "quality_loss", "ratios")},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--keep", type=Path, help="a new directory for the run")
    options, rest = parser.parse_known_args()
    if options.keep:
        found = measured(options.model, rest, options.keep)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            found = measured(options.model, rest, Path(scratch) / "run")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
