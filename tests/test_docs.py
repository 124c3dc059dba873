"""What the pages tell a reader to follow or to type is there: links, commands, keys, targets of make, the example."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nbl_export.cli import app as cli
from nbl_export.cli import options as cli_options
from nbl_export.options.goals import DEFAULT_INCREASE
from nbl_export.options.options import OPTIONS
from nbl_export.options.settle import settle
from nbl_export.records.quality import promise
from nbl_export.run import pipeline
from nbl_export.run.settled import capabilities_of

from .command import nbl

pytestmark = [pytest.mark.job, pytest.mark.process]

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "bench").glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TYPED = ("README.md", "CONTRIBUTING.md")

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}).*?^ *(?P=fence)[`~]* *$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_TOML = re.compile(r"^```toml\n(.*?)^```", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and MyST make of the headings."""
    text = _FENCE.sub("\n", page.read_text(encoding="utf-8"))
    headings = (
        _LINK.sub(r"\1", h).replace("`", "").replace("*", "") for h in re.findall(r"^#{1,6}\s+(.+)$", text, re.M)
    )
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Links to files that are not there, and to headings that a page does not have."""
    found = []
    for _, target in _LINK.findall(_CODE.sub("", _FENCE.sub("\n", text))):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        there = re.match(r"[a-z]+:", name) or (
            file.exists() and (not anchor or file.suffix != ".md" or anchor in anchors(file))
        )
        if not there:
            found.append(target)
    return found


def test_links_lead_somewhere() -> None:
    found = {str(page.relative_to(ROOT)): broken_links(page, page.read_text(encoding="utf-8")) for page in PAGES}
    assert {name: links for name, links in found.items() if links} == {}


def test_a_broken_link_is_found() -> None:
    good = "[a](docs/index.md) [b](#choose) [c](docs/verification.md#architectures) [d](https://example.org/x)"
    assert broken_links(ROOT / "README.md", good) == []
    bad = ["docs/none.md", "#none", "docs/index.md#none"]
    assert broken_links(ROOT / "README.md", " ".join(f"[a]({link})" for link in bad)) == bad


def shown_commands(text: str) -> list[list[str]]:
    """The words of each nbl-export command in a block, or with arguments between backticks; `...` is left out."""
    blocks = "\n".join(found[0] for found in _FENCE.finditer(text))
    inline = [" ".join(found[0].strip("`").split()) for found in _CODE.finditer(_FENCE.sub("\n", text))]
    lines = [*re.sub(r"\\\n\s*", " ", blocks).splitlines(), *(line for line in inline if line.count(" ") > 1)]
    found = [shown for line in lines for shown in re.findall(r"(?:^|&& )(nbl-export .+?)(?= && |$)", line)]
    cut = [re.sub(r"( (?!--)\S+) \.\.\.(?= |$)", r"\1", shown.partition(" [")[0]) for shown in found]
    return [words[1:] for shown in cut if (words := shlex.split(shown, comments=True)) and "COMMAND" not in words]


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Why a command is wrong, as its words alone tell; "" if it is right. No command runs."""

    def settled(given: dict[str, Any], *_: object, **__: object) -> Path:
        settle({"model": "m", **given}, capabilities_of)
        return Path()

    def asked(context: Any) -> None:
        if context.info_name == "estimate":
            settled({name: value for name, value in context.params.items() if name in OPTIONS})

    monkeypatch.setattr(pipeline, "run_job", settled)
    for command in cli.app.commands.values():
        monkeypatch.setattr(command, "invoke", asked)
    monkeypatch.setattr(cli_options, "read_config", lambda _path: ({}, None))

    def refused(words: list[str]) -> str:
        done = nbl(*words)
        return done.err if done.status else ""

    return refused


def test_shown_commands_are_right(refusal: Any) -> None:
    shown = {page: shown_commands(page.read_text(encoding="utf-8")) for page in PAGES}
    assert sum(map(len, shown.values())) > 80
    wrong = {(page.name, " ".join(words)): refusal(words) for page, found in shown.items() for words in found}
    assert {command: why for command, why in wrong.items() if why} == {}


def test_a_wrong_command_is_found(refusal: Any) -> None:
    block = "```\nnbl-export -m M -o DIR --exit-layer 20 \\\n  --layers 8  # both\n```\n"
    text = f"{block}`nbl-export bench DIR ...` `nbl-export x y`\n"
    assert [bool(refusal(words)) for words in shown_commands(text)] == [True, False, True]


def test_shown_keys_are_keys(tmp_path: Path) -> None:
    blocks = [found[1] for page in PAGES for found in _TOML.finditer(page.read_text(encoding="utf-8"))]
    assert blocks
    for block in blocks:
        (tmp_path / "shown.toml").write_text(block, encoding="utf-8")
        assert cli_options.read_config(tmp_path / "shown.toml")[0]


@pytest.mark.parametrize("page", TYPED)
def test_make_knows_its_targets(page: str) -> None:
    targets = set(re.findall(r"^make (\w[\w-]*)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
    assert targets
    done = subprocess.run(["make", "-n", *sorted(targets)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_python_example_of_the_readme_runs(finished: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "runs/demo/model" in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace("runs/demo/model", str(finished / "model"))],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is")


def test_the_promise_of_the_default_stands_in_the_same_words() -> None:
    """As the report says it (`records.quality.promise`)."""
    said = promise(DEFAULT_INCREASE)
    for name in ("README.md", "CHANGELOG.md", "docs/evaluation.md"):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        assert said in text, name
