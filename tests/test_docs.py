"""What the pages tell a reader to follow or to type is there: links, targets of make, the README's Python example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbl_export.options.goals import DEFAULT_INCREASE
from nbl_export.records.quality import promise

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "bench").glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TYPED = ("README.md", "CONTRIBUTING.md")

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}).*?^ *(?P=fence)[`~]* *$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
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
        assert said in text or said[0].upper() + said[1:] in text, name
