"""Names and words of a stranger on a terminal: shown as they are, and nothing in them acts."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbl_export.records.paired import figures
from nbl_export.report import console, model
from nbl_export.run import deployed
from nbl_export.run.progress import Ui
from nbl_export.trust.terminal import Console, visible

from ..command import Outcome, nbl

pytestmark = pytest.mark.job

PACKAGE = Path(__file__).parents[2] / "nbl_export"
# Markup that closes what was never opened, a style, a link, an emoji code, colours by ESC and by C1, a title, BEL, CR,
# and an override of direction.
EVIL = "[/b][red]:smile:\x1b[31m\x9b31m\x1b]0;t\x07\r\u202e[gpu]"
SHOWN = r"[/b][red]:smile:\x1b[31m\x9b31m\x1b]0;t\x07\x0d\u202e[gpu]"
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EVIL, SHOWN),
        ("two\nlines\tand é 漢 🙂 \\x1b", "two\nlines\tand é 漢 🙂 \\x1b"),
        ("\u2066a\u2069\u200f\u061c", r"\u2066a\u2069\u200f\u061c"),
        ("\udcff\x00\x7f\x85", r"\udcff\x00\x7f\x85"),
    ],
)
def test_what_acts_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert not ACTING.search(visible(text))


def poisoned(value: Any) -> Any:
    """The same with a hostile end to every name and value of text, but for the words that tables look up."""
    if isinstance(value, dict):
        return {poisoned_key(k): v if k in LOOKED_UP else poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return value + EVIL if isinstance(value, str) else value


LOOKED_UP = {"logits", "phase", "method", "kind", "variant", "variants", "decoders", "num_layers",
             "cache_bytes_per_token"}  # fmt: skip
MADE_UP = {"original", "nbl", "a task"}


def poisoned_key(key: str) -> str:
    return key + EVIL if key in MADE_UP else key


def eval_facts() -> dict[str, Any]:
    figure = {"value": 0.5, "stderr": 0.1}
    differences = [{"new": "nbl" + EVIL, "old": "original", "value": 0.1, "stderr": 0.01}]
    figures = {"original": figure, "nbl" + EVIL: figure}
    about = {"task": "t" + EVIL, "metric": "acc" + EVIL, "items": 5, "higher_is_better": True}
    row = {**about, "figures": figures, "differences": differences}
    change = {"new": "nbl", "old": "original", "loss": 0.1, "loss_interval": [0.0, 0.2], "increase": 0.1,
              "increase_interval": [0.0, 0.2]}  # fmt: skip
    loss = {"loss": 2.0, "correct": 0.5}
    far = {"tokens": 128, "figures": {"original": loss, "nbl": loss}, "differences": [change]}
    long = {"limit": 8, "items": 8, "warnings": ["w" + EVIL], "rows": [far]}
    tests = ("position", "retrieval")
    length = [{"task": f"{test}:t{EVIL}", "test": test, **long} for test in tests]
    return {"table": [row], "length": length}


def engine_facts() -> dict[str, Any]:
    record = {"engine": "e" + EVIL, "version": "v" + EVIL, "precision": "p" + EVIL}
    return {"n" + EVIL: {**record, "plan_bytes": 1, "build_seconds": 1.0, "cache_bytes": 1}}


def compared_facts(run: Path) -> dict[str, Any]:
    bench = json.loads((run / "bench.json").read_text(encoding="utf-8"))
    return {**bench, **figures(bench), "base": "b" + EVIL}


def of_run(name: str) -> Callable[[Path], Any]:
    return lambda run: poisoned(json.loads((run / name).read_text(encoding="utf-8")))


# Every function that makes a table, with the facts of a finished run or facts like them, poisoned.
TABLES: dict[str, Callable[[Path], Any]] = {
    "describe_table": lambda run: console.describe_table(poisoned(deployed.describe(run))),
    "scores_table": lambda run: model.scores(of_run("nbl.json")(run)),
    "checks_table": lambda run: console.checks_table(of_run("verify.json")(run)),
    "compared_table": lambda run: console.compared_table(compared_facts(run)),
    "speed_table": lambda run: console.speed_table(of_run("report.json")(run)),
    "eval_table": lambda _: console.eval_table(eval_facts()),
    "engines_table": lambda _: console.engines_table(engine_facts()),
    "doctor_table": lambda _: console.doctor_table(
        {"e": {"title": EVIL, "available": False, "reason": EVIL}}, EVIL, EVIL
    ),
    "routes_table": lambda _: console.routes_table(
        [{"name": EVIL, "title": EVIL, "take": EVIL, "reason": said} for said in ("", EVIL)]
    ),
    "ir_table": lambda _: console.ir_table(
        {
            "graph": EVIL,
            "bytes": 1,
            "states": 2,
            "logits": "all",
            "findings": [{"what": EVIL, "nodes": 3, "advice": EVIL}],
        }
    ),
    "graph_table": lambda run: console.graph_table(graph_facts(run)),
    "ladder_table": lambda run: model.checks(of_run("verify.json")(run)["checks"], "Acceptance, e" + EVIL),
}


def graph_facts(run: Path) -> dict[str, Any]:
    from nbl_export.graph.external_graph import describe_graph

    found = describe_graph(run / "original")
    return {**poisoned(found), "logits": found["logits"]}


def drawn(table: Any, **options: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=4000, **options).print(*(table if isinstance(table, tuple) else (table,)), sep="\n")
    return out.getvalue()


@pytest.mark.parametrize("name", TABLES)
def test_no_table_obeys_a_name(name: str, finished: Path) -> None:
    table = TABLES[name](finished)
    text = drawn(table)
    assert not ACTING.search(text)
    if name != "scores_table":  # it has numbers only
        assert SHOWN in text
    coloured = drawn(table, force_terminal=True, color_system="truecolor")
    assert not ACTING.search(re.sub(r"\x1b\[[\d;]*m", "", coloured))  # rich's own styles


def test_every_table_is_walked() -> None:
    """Every function whose tables a command prints stands in `TABLES`; one module alone draws for a terminal."""
    made = {name for name in console.__all__ if name.endswith("_table")}
    assert made <= set(TABLES)
    drawing = [p for p in PACKAGE.rglob("*.py") if "from rich.table import" in p.read_text(encoding="utf-8")]
    assert [p.relative_to(PACKAGE).as_posix() for p in drawing] == ["report/table.py"]


def makes_consoles(source: str) -> bool:
    return re.search(r"from rich\.console import [^\n]*Console|import rich|from rich import", source) is not None


def test_only_the_terminal_module_makes_consoles() -> None:
    sources = {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")}
    assert [name for name, source in sources.items() if makes_consoles(source)] == ["trust/terminal.py"]
    assert not [name for name, source in sources.items() if re.search("from_markup|render_markup", source)]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_no_format_of_a_comparison_obeys_a_name(
    form: tuple[str, ...], tmp_path: Path, genai_dirs: dict[str, Path]
) -> None:
    import shutil

    evil = tmp_path / EVIL.replace("/", "")
    shutil.copytree(genai_dirs["nbl"], evil)
    done = nbl("bench", evil, genai_dirs["original"], *form, "--depth", 0, "--repetitions", 1,
               "--prompt-tokens", 8, "--generate-tokens", 2)  # fmt: skip
    assert done.status == 0, done.err
    assert not ACTING.search(done.out + done.err)
    if form:
        assert any("\x1b" in name for name in json.loads(done.out)["variants"])


class Runner:
    """A model that says `pieces`."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def encode(self, _prompt: str, *, chat: bool) -> list[int]:
        return [1]

    def stream(self, _prompt: list[int], _count: int) -> list[str]:
        return self._pieces


def answer(pieces: list[str], monkeypatch: pytest.MonkeyPatch) -> Outcome:
    found = SimpleNamespace(path=Path("anywhere"), open=lambda *_: Runner(pieces))
    monkeypatch.setattr(deployed, "locate", lambda *_, **__: found)
    return nbl("generate", "anywhere", "Hi")


@pytest.mark.parametrize("pieces", [[EVIL], list(EVIL), ["\x1b", "]52;c;", "eA==", "\x07"], ["\r", "\x1b[2", "K"]])
def test_a_model_does_not_command_the_terminal(pieces: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a sequence comes in several tokens."""
    done = answer(pieces, monkeypatch)
    assert done.status == 0, done.err
    assert done.out == visible("".join(pieces)) + "\n"


def test_text_of_a_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = ["def f():\n", "\treturn [red]é[/red]\n", "漢 🙂"]
    assert answer(pieces, monkeypatch).out == "".join(pieces) + "\n"


def test_an_error_does_not_command_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from nbl_export.cli.app import explain
    from nbl_export.errors import NblError

    with pytest.raises(SystemExit):
        explain(NblError(f"layer {EVIL} is not understood"))
    assert capsys.readouterr().err == f"nbl-export: layer {SHOWN.replace(chr(92) + 'x0d', ' ')} is not understood\n"
    with pytest.raises(SystemExit):
        explain(NblError("\0" * 900))  # each is written as four characters
    assert len(capsys.readouterr().err) < 1100


def test_a_log_does_not_command_the_terminal() -> None:
    from nbl_export.trust.terminal import Formatter

    record = logging.LogRecord("x", logging.WARNING, "p", 1, "text %s", (EVIL,), None)
    assert Formatter("%(levelname)s: %(message)s").format(record) == f"WARNING: text {SHOWN}"


def test_progress_does_not_command_the_terminal() -> None:
    out = io.StringIO()
    ui = Ui(Console(file=out, force_terminal=True, width=400))
    ui.say(f"reading {EVIL}")
    with ui.task(EVIL) as update:
        update(1, 2)
    assert SHOWN in out.getvalue()
    assert not ACTING.search(re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", out.getvalue()))  # rich's own
