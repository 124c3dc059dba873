"""Tiny random decoders, exported for real, once for all workers (`store`).

`checkpoint("llama")` is a directory with safetensors and a small byte-pair tokenizer; `exported("llama", "genai")` a
deployable directory; `text` a calibration text. Nothing here needs a network.
"""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny products: threads that wait for each other cost tenfold

import functools
import gc
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbl_export.methods.linear.maps import Linear

from .command import TINY, in_new_process, shorten_parts
from .fork_server import ForkServer
from .graph_sources import make_graph
from .store import Store, key_of
from .tiny import random_map, save_checkpoint, stdlib_text

# Changed files that run the stand-ins of TensorRT.
_STAND_INS = re.compile(
    r"nbl_export/(targets/tensorrt|run/accept|verify/on_target)"
    r"|tests/(targets/test_(trt_|tensorrt)|fake_|trt_tiny|static_tiny|run/test_accept|conftest)"
)
_TESTS = Path(__file__).parent
_ROOT = _TESTS.parent


@functools.cache
def _stand_ins_changed() -> bool:
    """Whether the work tree, the last commit or this branch changes such a file; true if git cannot tell."""

    def listed(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=_ROOT, capture_output=True, text=True, check=True)
        return done.stdout

    try:
        names = listed("diff", "--name-only", "HEAD~1") + listed("ls-files", "--others", "--exclude-standard")
        if listed("branch", "--list", "main").strip():
            names += listed("diff", "--name-only", "main...HEAD")
    except (OSError, subprocess.CalledProcessError):
        return True
    return any(_STAND_INS.match(name) for name in names.splitlines())


def _without_stand_ins(config: pytest.Config) -> bool:
    asked = re.search(r"\btrt\b", config.option.markexpr or "")
    return not (asked or os.environ.get("CI") or _stand_ins_changed())


# Files that take longest, the longest first. A worker that began one of them last would end the run alone.
_LONG = (
    "run/test_openvino_run.py", "targets/test_architecture_graphs.py", "verify/test_tiny_graphs.py",
    "targets/test_repairs.py", "methods/checkpoint/test_quantized_model.py", "verify/test_faults.py",
    "run/test_bad_directory.py", "run/test_resume.py", "run/test_given_graph.py", "cli/test_cli.py",
    "methods/test_third_method.py",
    "targets/test_openvino_rewrite.py", "methods/test_contract.py", "methods/linear/test_fit.py",
    "targets/test_providers.py", "targets/test_static_form.py", "evaluation/test_eval.py",
)  # fmt: skip


def _place(item: pytest.Item) -> int:
    name = item.path.relative_to(_TESTS).as_posix()
    return _LONG.index(name) if name in _LONG else len(_LONG)


_JOBS = {"finished", "run", "same"}  # fixtures of a finished job


def _is_quick(item: pytest.Item) -> bool:
    """Whether a test has no marker of its own and asks for no finished job."""
    marks = {mark.name for mark in item.iter_markers()} - {"parametrize", "skipif", "usefixtures"}
    return not (marks or _JOBS & set(getattr(item, "fixturenames", ())))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    assert all((_TESTS / name).is_file() for name in _LONG)
    for item in filter(_is_quick, items):
        item.add_marker("quick")
    items.sort(key=_place)
    left_out = [item for item in items if item.get_closest_marker("trt")] if _without_stand_ins(config) else []
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("trt")]


def pytest_collection_finish() -> None:
    """A million objects are there when the tests begin, and stay; each full collection would walk through them."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _without_stand_ins(config):
        why = "no file of TensorRT's engines has changed"
        terminalreporter.write_line(f"tests marked trt did not run, since {why}: pytest -m trt runs them")


@pytest.fixture(scope="session", autouse=True)
def short_parts() -> Iterator[None]:
    """Jobs in this process read as little text as `finished`: quality loss is half of a tiny verification."""
    from nbl_export.text import windows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "PART_TOKENS", dict(windows.PART_TOKENS))  # put back
        shorten_parts()
        yield


@pytest.fixture(scope="session", autouse=True)
def light_calls() -> Iterator[None]:
    """Calls of `nbl` wait for no disk: no file of a test outlives a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _number: None)
        yield


@pytest.fixture(scope="session")
def stores(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Store]]:
    """Artefacts for all workers and for the next run (`store`): those of the tests alone, and those of the package."""
    root = tmp_path_factory.getbasetemp().parent / "artefacts"
    if hasattr(pytestconfig, "cache"):  # not with -p no:cacheprovider
        root = pytestconfig.cache.mkdir("artefacts")
    made_here = ("tests/tiny.py", "tests/static_tiny.py", "tests/conftest.py", "nbl_export/model/architectures.py")
    of_package = ("nbl_export", "tests/graph_sources.py", "tests/command.py", "tests/tiny.toml", *made_here)
    found = {"tests": Store(root, key_of(*made_here)), "package": Store(root, key_of(*of_package))}
    yield found
    assert not {file for store in found.values() for file in store.written().items()}, "a test wrote to an artefact"


@pytest.fixture(scope="session")
def checkpoint(stores: dict[str, Store]) -> Callable[[str], Path]:
    """architecture -> directory of a tiny random checkpoint."""
    return lambda name: stores["tests"].get(name, functools.partial(save_checkpoint, name))


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[[str], Path], stores: dict[str, Store]) -> Callable[..., Path]:
    """(architecture, source, precision) -> deployable directory of the original decoder. Never write to it."""

    def make(architecture: str, source: str = "genai", precision: str = "fp32") -> Path:
        from tests.exports import build_decoder

        def build(folder: Path) -> None:
            build_decoder(source, checkpoint(architecture), folder / "original", precision)

        return stores["package"].get(f"{architecture}-{source}-{precision}", build) / "original"

    return make


@pytest.fixture(scope="session")
def exported_ir(exported: Callable[..., Path], stores: dict[str, Store]) -> Callable[[str, str], Path]:
    """(architecture, precision) -> the original IR with both graphs. Never write to it."""

    def make(architecture: str, precision: str) -> Path:
        from nbl_export.targets.openvino.engine import OPENVINO

        def build(folder: Path) -> None:
            shutil.copytree(exported(architecture, "openvino", precision), folder / "original")
            OPENVINO.keep_last_token(folder / "original")

        return stores["package"].get(f"pruned-{architecture}-{precision}", build) / "original"

    return make


@pytest.fixture(scope="session")
def given_graph(checkpoint: Callable[[str], Path], stores: dict[str, Store]) -> Callable[[str], Path]:
    """source -> directory of the tiny Llama's graph as that exporter makes it (`graph_sources`). Never write to it."""

    def make(source: str) -> Path:
        build = lambda folder: make_graph(source, checkpoint("llama"), folder / "graph")  # noqa: E731
        return stores["package"].get(f"graph-{source}", build) / "graph"

    return make


@pytest.fixture(scope="session")
def genai_dirs(
    exported: Callable[..., Path], random_maps: Callable[..., dict[int, Linear]], stores: dict[str, Store]
) -> dict[str, Path]:
    """A tiny GenAI model and its NBL version with the middle layer replaced (sparse cache ids). Never write to them."""
    from nbl_export.methods.rewrite import rewrite

    original = exported("llama")
    made = stores["package"].get("genai-nbl", lambda folder: rewrite(original, folder / "nbl", random_maps(1)))
    return {"original": original, "nbl": made / "nbl"}


@pytest.fixture(scope="session")
def random_maps() -> Callable[..., dict[int, Linear]]:
    """layers -> a random affine map each; the same layer always gets the same map."""

    def make(*layers: int) -> dict[int, Linear]:
        return {layer: random_map(layer) for layer in layers}

    return make


@pytest.fixture(scope="session")
def text(stores: dict[str, Store]) -> Path:
    """A calibration text of about 20,000 tokens of the tiny tokenizer."""
    write = lambda folder: (folder / "text.txt").write_text(stdlib_text(60_000), encoding="utf-8")  # noqa: E731
    return stores["tests"].get("text", write) / "text.txt"


@pytest.fixture(scope="session")
def same(checkpoint: Callable[[str], Path], text: Path) -> tuple[object, ...]:
    """Arguments of a tiny run of the main job on the tiny Llama, but for --output."""
    return ("--model", checkpoint("llama"), "--calibration", text, *TINY)


@pytest.fixture(scope="session")
def finished(same: tuple[object, ...], stores: dict[str, Store]) -> Path:
    """The run directory that `same` leaves. Never write to it: `run` is a copy. What was said lies beside it."""

    def make(folder: Path) -> None:
        code = f"sys.path.insert(0, {str(_ROOT)!r}); from tests.command import shorten_parts; shorten_parts()"
        done = in_new_process(*same, "--output", folder / "run", code=code)  # no patch of a test reaches it
        assert done.status == 0, done.err
        (folder / "stdout").write_text(done.out, encoding="utf-8")
        (folder / "stderr").write_text(done.err, encoding="utf-8")

    return stores["package"].get("finished", make) / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run directory, in another place."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Starts the command in processes of their own, for tests that kill it."""
    with ForkServer(tmp_path_factory.mktemp("logs")) as started:
        yield started


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts this process: a shell's background job ignores it, as does what it starts.

    Only for tests that send it, so that one sent to the job's group leaves the other tests alone.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="module")
def light_jobs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Jobs of a test measure memory in the test's own process and draw no plots.

    This saves a quarter of a tiny job. Tests of memory and of plots, and jobs in a process of their own, are as a
    user's.
    """
    if {"measure", "report"} & set(request.path.relative_to(_TESTS).parts):
        yield
        return
    from nbl_export.measure import benchmark, footprint
    from nbl_export.report import plots

    def here(open_runner: Any, directory: Path, threads: int | None, *asked: Any) -> footprint.Footprint:
        return footprint.footprint_here(functools.partial(open_runner, directory, threads), *asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "measure_footprint", here)
        for drawing in ("throughput", "curve"):
            patch.setattr(plots, drawing, lambda *_: "<svg></svg>")
        yield


@pytest.fixture(scope="session")
def tiny(stores: dict[str, Store]) -> Callable[[str], Path]:
    """architecture -> directory of a tiny checkpoint for the static form."""
    from . import static_tiny

    return lambda name: stores["tests"].get(f"static-{name}", functools.partial(static_tiny.save_checkpoint, name))


@pytest.fixture(scope="session")
def form(tiny: Callable[[str], Path]) -> Callable[[str], Any]:
    """architecture -> a fresh static form in float32, all logits."""
    from nbl_export.targets.tensorrt import export as static

    from .static_tiny import SLOTS

    return lambda architecture: static.build_form(tiny(architecture), SLOTS)
