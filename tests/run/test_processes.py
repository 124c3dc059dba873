"""Several processes of one command: equal maps, one that is killed, and commands that nobody shares."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from nbl_export.files import file_sha256
from nbl_export.model import processes

from ..command import BARE, Outcome, assert_refused, nbl, snapshot
from ..fork_server import ForkServer

pytestmark = [pytest.mark.job, pytest.mark.process]

# Small batches, and jobs that end before graphs are exported.
SMALL = """
import nbl_export.methods.collector, nbl_export.methods.linear.collect, nbl_export.run.pipeline as pipeline
nbl_export.methods.collector.BATCH_TOKENS = nbl_export.methods.linear.collect.BATCH_TOKENS = 256
work = pipeline._work
pipeline._work = lambda *given: work(*given[:-1], "distill")
"""
# One process cannot hold the whole model, so that none loads it.
MAPPED = """
import os
import nbl_export.model.mapped as mapped, nbl_export.methods.checkpoint.load as load
if os.environ.get("RANK") in (None, "1"):
    mapped.shortage_of = lambda *_: "too large"
load.load_model = None
"""
# What torchrun does: one process for each rank, and a signal to all others after one that fails.
RANKS = """
import os, signal, socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
ranks = set()
for rank in range({count}):
    pid = os.fork()
    if not pid:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="{count}", LOCAL_WORLD_SIZE="{count}")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        break
    ranks.add(pid)
else:
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, {signal})
    os._exit(failed)
"""
# Rank 1 dies in its second batch.
DIES = """
if os.environ["RANK"] == "1":
    from nbl_export.methods.collector import Collector
    run, seen = Collector.run, []
    def dies(*given, **named):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        run(*given, **named)
    Collector.run = dies
"""
LIMIT = (*BARE[:2], "--calibration-tokens", "2560", "--max-perplexity-increase", "10000%")
EXIT, LAYERS = (*LIMIT, "--recent-tokens", "4"), (*LIMIT, "--exit-layer", "none")
STEPS = "distill_steps = 8\nlora_rank = 2\ncontext = 32\n"


@pytest.fixture
def job(checkpoint: Any, text: Path) -> tuple[object, ...]:
    return ("--model", checkpoint("llama"), "--calibration", text)


def found(run: Path) -> dict[str, Any]:
    """What calibration and the choice have left."""
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    names = ("goal", "curve", "greedy", "scores", "exit", "fit", "replaced_layers")
    facts = {name: manifest.get(name) for name in names}
    return {**facts, **{file.name: file_sha256(file) for file in run.glob("*.safetensors")}}


@pytest.mark.parametrize(("options", "count", "file"), [(EXIT, 3, "sums.safetensors"), (LAYERS, 2, "sums.safetensors")])
def test_processes_find_what_one_finds(
    options: tuple[str, ...], count: int, file: str, job: tuple[object, ...], server: ForkServer, tmp_path: Path
) -> None:
    done = {}
    for path, code in ((tmp_path / "one", SMALL), (tmp_path / "several", RANKS.format(count=count, signal=15) + SMALL)):
        process = server.start(*job, *options, "--output", path, code=code)
        assert process.status == 0, process.err
        done[path.name] = found(path)
        assert process.err.count("plan: done") == 1 and ("processes share" in process.err) == (path.name != "one")
    assert file in done["one"]
    assert done["several"] == done["one"]


@pytest.mark.parametrize(("batch", "until"), [(256, "distill"), (4096, "calibrate")])
def test_processes_share_a_model_that_is_larger_than_memory(
    batch: int, until: str, job: tuple[object, ...], server: ForkServer, tmp_path: Path
) -> None:
    """Too large for one process is too large for all. The second job has one batch, so that one process has none."""
    small = SMALL.replace("256", str(batch)).replace("distill", until) + MAPPED
    done = {}
    for count in (1, 2):
        ranks = RANKS.format(count=count, signal=15) if count > 1 else ""
        process = server.start(*job, *LAYERS, "--output", tmp_path / str(count), code=ranks + small)
        assert process.status == 0, process.err
        assert "one layer at a time" in process.err
        done[count] = found(tmp_path / str(count))
    assert "sums.safetensors" in done[1]
    assert done[2] == done[1]


def test_processes_train_the_maps_that_one_trains(job: tuple[object, ...], server: ForkServer, tmp_path: Path) -> None:
    """A step has four rows, so that one of three processes has two of them. Held-back rows are shared too."""
    keys = tmp_path / "keys.toml"
    keys.write_text(STEPS, encoding="utf-8")
    options = (*LIMIT, "--fit", "distilled", "--config", keys)
    done = {}
    for count in (1, 3):
        path, ranks = tmp_path / str(count), RANKS.format(count=count, signal=15) if count > 1 else ""
        process = server.start(*job, *options, "--output", path, code=ranks + SMALL)
        assert process.status == 0, process.err
        assert process.err.count("distill: done") == 1
        kept = json.loads((path / "distill.json").read_text(encoding="utf-8"))
        done[count] = found(path), kept["held_kl"], kept["train_kl"]
    assert "maps.safetensors" in done[1][0] and len(done[1][2]) == 8
    assert done[3] == done[1]


@pytest.mark.parametrize(("number", "said"), [(15, "the same command"), (0, "another process of this command ended")])
def test_a_process_that_is_killed_leaves_one_sentence_and_nothing_half_done(
    number: int, said: str, job: tuple[object, ...], server: ForkServer, tmp_path: Path
) -> None:
    started, code = time.monotonic(), RANKS.format(count=2, signal=number) + SMALL + DIES
    process = server.start(*job, *EXIT, "--output", tmp_path / "run", code=code)
    assert process.status == 1 and time.monotonic() - started < 60
    assert_refused(Outcome(1, "", process.err), 1, said)
    assert set(snapshot(tmp_path / "run")) == {"text.safetensors", "nbl.json"}
    again = server.start(*job, *EXIT, "--output", tmp_path / "run", code=SMALL)
    assert again.status == 0 and "text: reused" in again.err, again.err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_rank_0_alone_runs_a_command_that_nobody_shares(rank: str, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = nbl("inspect", run, "--json")
    left = "nbl-export: rank 1 leaves this command to rank 0; unset RANK to run it here\n"
    assert (done.status, bool(done.out), done.err) == (0, rank == "0", "" if rank == "0" else left)


SOON = """
from datetime import timedelta
from nbl_export.model import processes
processes._SILENT_SECONDS, processes._TIMEOUT = 0.2, timedelta(seconds=3)
"""


def test_rank_0_says_for_whom_it_waits(job: tuple[object, ...], server: ForkServer, tmp_path: Path) -> None:
    code = RANKS.format(count=1, signal=15) + "os.environ['WORLD_SIZE'] = '2'\n" + SOON
    process = server.start("calibrate", *job, "--output", tmp_path / "run", code=code)
    assert process.status == 1
    lines = process.err.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith("WARNING: waiting for 1 other process at 127.0.0.1:")
    assert lines[1].startswith("nbl-export: another process of this command ended, or cannot be reached")


@pytest.mark.parametrize(
    ("rank", "size", "port"),
    [("2", "2", "1"), ("9" * 5000, "2", "1"), ("0", "2", "x"), ("0", "2", "99999999")],
    ids=range(4),
)
def test_variables_that_cannot_be_of_torchrun_are_refused(
    rank: str, size: str, port: str, monkeypatch: pytest.MonkeyPatch, job: tuple[object, ...], tmp_path: Path
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_threads", [])
    assert_refused(nbl("calibrate", *job, "--output", tmp_path / "run"), 1, "torchrun")
