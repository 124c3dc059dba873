"""The steps below the runner: machine, a sum on the device, and one layer, each with as little code as possible."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from nbl_export.acceptance.compare import require_close
from nbl_export.acceptance.parts import Target
from nbl_export.acceptance.verdict import (
    LIBRARY,
    MEMORY,
    CannotRun,
    Failed,
    LeftOut,
    Notes,
)
from nbl_export.errors import NblError
from nbl_export.graph.names import STATIC_GRAPH_FILE
from nbl_export.graph.trust import check_graph_file
from nbl_export.targets.base import BuildSettings
from nbl_export.targets.tensorrt.device import Device
from nbl_export.targets.tensorrt.examine.bare import BarePlan, Output
from nbl_export.targets.tensorrt.record import (
    ENGINE_FILE,
    EngineRecord,
    read_plan,
    read_record,
)
from nbl_export.targets.tensorrt.runner import refuse_misfit

__all__ = ["machine", "one_layer", "sum_on_device"]

_DRIVER = Path("/proc/driver/nvidia/version")
_DECODE = 1  # index of the decode profile


def machine(target: Target, notes: Notes) -> None:
    """GPU, driver and library are there, and fit the engines."""
    notes.doing("asking the driver for its GPU")
    parts = target.parts
    gpu = parts.gpu()
    if isinstance(gpu, str):
        raise CannotRun(f"{target.directory} cannot be accepted here: {gpu}")
    notes.see("GPU", f"{gpu.name}, compute capability {gpu.compute}")
    notes.see("newest CUDA of the driver", ".".join(map(str, gpu.cuda)))
    if _DRIVER.is_file():
        notes.see("driver", " ".join(_DRIVER.read_text(encoding="utf-8", errors="replace").split())[:120])
    try:
        notes.doing(f"loading {parts.library.package}")
        trt = parts.load()
        notes.see(parts.library.package, str(trt.__version__))
        for subject, directory in target.engines:
            record = read_record(directory)
            notes.see(f"engine of {subject}", f"{record.precision}, {record.max_seq_len} slots, built by "
                      f"{record.version} for {', '.join(record.compute_capabilities)}")  # fmt: skip
            refuse_misfit(parts.library, record, trt.__version__, gpu, directory)
    except NblError as error:
        raise CannotRun(str(error)) from error
    memory = parts.memory()
    if isinstance(memory, str):
        raise CannotRun(memory)
    notes.see("memory by", ", ".join(memory))


def sum_on_device(target: Target, notes: Notes) -> None:
    """Device memory keeps what is copied there, and the library adds four numbers right."""
    memory = target.parts.memory()
    if isinstance(memory, str):
        raise CannotRun(memory)
    trt = target.parts.load()
    notes.doing("building a sum")
    plan = target.parts.sum_plan(trt)
    x = np.array([[1.0, -2.5, 3e4, 0.125]], np.float32)
    for title, backend in memory.items():
        with _closed(backend, notes, title) as device:
            notes.doing(f"copying to the device and back, by {title}")
            _require_copy(device, x, title)
            notes.doing(f"adding four numbers, memory by {title}")
            bare = BarePlan(target.parts.library, trt, device, plan)
            found = bare.run({"x": (x, "float32")}, {"y": Output((1, 4), "float32")})["y"]
            notes.see(f"x + x, memory by {title}", found[0].tolist())
            if not np.array_equal(found, 2 * x):
                raise Failed(f"x + x of {x[0].tolist()} gives {found[0].tolist()}, memory by {title}", LIBRARY)


def _require_copy(device: Device, x: np.ndarray, title: str) -> None:
    address, back = device.allocate(x.nbytes), np.empty_like(x)
    device.upload(address, x)
    device.download(address, back)
    device.synchronize()
    if not np.array_equal(back, x):
        raise Failed(f"{x[0].tolist()} comes back from the device as {back[0].tolist()}, memory by {title}", MEMORY)


@contextlib.contextmanager
def _closed(backend: Callable[[], Device], notes: Notes, title: str) -> Iterator[Device]:
    notes.doing(f"opening the device, by {title}")
    device = backend()
    try:
        yield device
    except BaseException:
        with contextlib.suppress(Exception):
            device.close()
        raise
    device.close()


# -- one layer -----------------------------------------------------------------------------------------------


def one_layer(target: Target, notes: Notes) -> None:
    """The decoder up to its first attention, built here and run without the runner, gives the twin's values."""
    one = target.material.one
    if one is None:
        raise LeftOut("verification left no single layer")
    source = target.graphs[one.subject]
    data = source / f"{STATIC_GRAPH_FILE}.data"
    if not data.is_file():
        raise LeftOut(f"{data} with the weights is not here; copy the whole run directory")
    with tempfile.TemporaryDirectory(prefix=".tmp-accept-", dir=target.directory) as scratch:
        graph = Path(scratch) / "graph"
        graph.mkdir()
        (graph / STATIC_GRAPH_FILE).write_bytes(one.graph)
        _bring(data, graph / data.name)
        check_graph_file(graph / STATIC_GRAPH_FILE)
        notes.doing("building one layer")
        settings = BuildSettings(1, len(one.ids), ())
        record = target.parts.build(graph, Path(scratch) / "engine", settings)
        notes.see("build seconds", record.build_seconds)
        _run_layer(target, notes, record, Path(scratch) / "engine")


def _bring(data: Path, place: Path) -> None:
    """The same file in another directory, without a copy if the file system can."""
    try:
        os.link(data, place)
    except OSError:
        shutil.copyfile(data, place)


def _run_layer(target: Target, notes: Notes, record: EngineRecord, engine: Path) -> None:
    """All tokens but the last by the prefill profile, the last one by the decode profile, caches carried by hand."""
    one, limit = target.material.one, target.material.limit
    assert one is not None
    contract, count = record.contract, len(one.ids)
    caches = {i.name: i for i in contract.inputs if i.name.startswith("past_key_values.")}
    hidden = next(info for info in contract.outputs if info.name == "logits")
    now = {name: np.zeros((1, *map(int, info.shape[1:])), np.float32) for name, info in caches.items()}
    notes.doing(f"loading the {ENGINE_FILE} of one layer")
    with _closed(target.parts.device, notes, "the runner's package") as device:
        plan = BarePlan(target.parts.library, target.parts.load(), device, read_plan(engine, record))
        rows = []
        for profile, start, end in ((0, 0, count - 1), (_DECODE, count - 1, count)):
            notes.doing(f"running {end - start} tokens through one layer, profile {profile}")
            inputs: dict[str, tuple[np.ndarray, str]] = {
                "input_ids": (np.array([one.ids[start:end]]), "int64"),
                "write_indices": (np.array([start]), "int64"),
                **{name: (now[name], info.dtype) for name, info in caches.items()},
            }
            outputs = {"logits": Output((1, end - start, int(hidden.shape[-1])), hidden.dtype)}
            for name, info in caches.items():
                present = name.replace("past_key_values", "present")
                outputs[present] = Output((1, *map(int, info.shape[1:])), info.dtype, inside=name)
            found = plan.run(inputs, outputs, profile)
            rows.append(found["logits"][0])
            now = {name: found[name.replace("past_key_values", "present")] for name in caches}
    for name in caches:
        require_close(notes, f"one layer, {name}", now[name][0][:, :count], one.expected[name], limit)
        if now[name][0][:, count:].any():
            raise Failed(f"one layer writes {name} behind its {count} tokens")
    for name, part, cut in (("prefill", rows[0], slice(None, -1)), ("decode", rows[1], slice(-1, None))):
        require_close(notes, f"one layer, behind the attention, {name}", part, one.expected["hidden"][cut], limit)
