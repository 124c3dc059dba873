"""The pages that people read: short sentences, links that lead somewhere, a README of a size that is read.

Markdown ─► blocks (paragraph, list item, heading; no code, tables, comments or front matter) ─► sentences ─► words
         └► links ─► the file is there, and the heading that an anchor names
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROSE = [page for page in PAGES if page.name != "CHANGELOG.md"]
MOST_WORDS = 35
MOST_LINES = 160

_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}).*?^ *(?P=fence)[`~]* *$", re.DOTALL | re.MULTILINE)
_MATH = re.compile(r"\$\$.*?\$\$", re.DOTALL)
_INLINE_MATH = re.compile(r"(?<!\$)\$(?!\$)[^$\n]+\$")
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
_BLOCK_START = re.compile(r"^\s*(?:[-*+]|\d+[.)]|#{1,6}|>|:{3,})(?:\s|$)")
_TABLE_ROW = re.compile(r"^\s*\|")
# A stop, what may close behind it, and a new beginning. A number such as 1.5 and a name such as a.txt have no space.
_END = re.compile(r"(?<=[.!?])[\"')\]*_]*\s+(?=[\"'(\[*_]*[A-Z0-9])")
_ABBREVIATED = re.compile(r"\b(?:e\.g|i\.e|cf|vs|al|etc|Fig|Eq|No|pp)\.$")


def without_code(text: str) -> str:
    """A page without front matter, comments, code blocks and displayed equations."""
    for pattern in (_FRONT_MATTER, _COMMENT, _FENCE, _MATH):
        text = pattern.sub("\n", text)
    return text


def blocks(text: str) -> Iterator[str]:
    """Paragraphs, list items and headings, each on one line. Code within a line is the word Code."""
    current: list[str] = []
    for line in [*without_code(text).splitlines(), ""]:
        ends = not line.strip() or _TABLE_ROW.match(line) is not None
        if (ends or _BLOCK_START.match(line)) and current:
            yield _plain(" ".join(current))
            current = []
        if not ends:
            current.append(_BLOCK_START.sub("", line).strip())


def _plain(block: str) -> str:
    block = _LINK.sub(r"\1", _IMAGE.sub("", block))
    return _INLINE_MATH.sub("Formula", _CODE.sub("Code", block))


def sentences(text: str) -> list[str]:
    """Every sentence of the prose of a page."""
    found: list[str] = []
    for block in blocks(text):
        begun = ""
        for piece in _END.split(block):
            begun = f"{begun} {piece}".strip()
            if not _ABBREVIATED.search(begun):
                found.append(begun)
                begun = ""
        found += [begun] if begun else []
    return found


def words(sentence: str) -> int:
    """Signs by themselves, such as a dash, are no words."""
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def too_long(text: str) -> list[str]:
    return [sentence for sentence in sentences(text) if words(sentence) > MOST_WORDS]


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST make of a heading."""
    heading = re.sub(r"[`*]", "", _LINK.sub(r"\1", heading)).strip().lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = _FENCE.sub("\n", page.read_text(encoding="utf-8"))
    return {slug(heading) for heading in re.findall(r"^#{1,6}\s+(.+?)\s*$", text, re.MULTILINE)}


def broken_links(page: Path, text: str) -> list[str]:
    """Links to files that are not there, and to headings that a page does not have."""
    found = []
    for _, target in _LINK.findall(_CODE.sub("", without_code(text))):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", name):
            continue
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            found.append(target)
    return found


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_no_sentence_is_too_long() -> None:
    assert {_name(page): found for page in PROSE if (found := too_long(page.read_text(encoding="utf-8")))} == {}


def test_links_lead_somewhere() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    assert {_name(page): found for page, text in texts.items() if (found := broken_links(page, text))} == {}


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES


LONG = " ".join(["word"] * (MOST_WORDS + 1)).capitalize()


def test_a_long_sentence_is_found() -> None:
    for text in (
        f"A short one. {LONG}.",
        f"- {LONG}",
        f"1. {LONG[:90]}\n   {LONG[90:]}",
        f"## {LONG}",
        f"See [{LONG}](a.md).",
    ):
        assert len(too_long(text)) == 1, text


def test_what_is_no_prose_is_passed_over() -> None:
    for text in (
        f"```\n{LONG}\n```",
        f"- An item:\n\n  ```bash\n  {LONG}\n  ```\n",
        f"| {LONG} |",
        f"---\ntitle: {LONG}\n---\n",
        f"<!-- {LONG} -->",
        f"$$\n{LONG}\n$$",
        f"The words `{LONG}` are code.",
    ):
        assert too_long(text) == [], text


def test_sentences_end_where_they_end() -> None:
    text = 'It takes 1.5 s, e.g. Two of a.txt (see *there*). `code` is one. "Is it?" Yes.\nStill yes.\n\nA new one'
    assert len(sentences(text)) == 6
    assert sentences("- one\n- two\n  and more\n\n| a | b |\nthree") == ["one", "two and more", "three"]


def test_a_broken_link_is_found() -> None:
    page = ROOT / "README.md"
    good = "[a](docs/index.md) [b](#install) [c](docs/verification.md#architectures) [d](https://example.org/x)"
    assert broken_links(page, good) == []
    assert broken_links(page, "[a](docs/none.md) [b](#none) [c](docs/index.md#none)") == [
        "docs/none.md", "#none", "docs/index.md#none",
    ]  # fmt: skip
