"""Prints the shape of the package and how widely its subjects are spread, beside the values recorded before.

    python tests/structure.py               `make check` runs it; nothing of it is a limit
    python tests/structure.py --record      writes today's values into structure.json

A source file mentions a subject if a unit of it matches the subject's pattern. Units are identifiers (a name with its
attribute is one), modules of this package that are imported, and strings without a space, which are keys, options and
names of files. Comments, docstrings and prose are none. `SlidingWindow`, `sliding_window` and "sliding-window" are the
unit "sliding window"; a string keeps its quotes.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, RECORD = ROOT / "nbl_export", Path(__file__).with_name("structure.json")
LONGEST = 6
# Patterns of subjects whose name alone would find other things too, or not all of them.
PATTERNS = {
    "kind linear": r"^'?linear'?$|\b(mixers|trained) linear\b|\blinear (maps|bias|change)\b",
    "kind none": r"^'?none'?$|mixers none\b",
    "target ort": r"\bort\b|targets onnx\b",
    "target trt": r"\b(trt|tensorrt)\b",
    "stage text": r"\bstages text\b",  # the string is a key of much else
    "form transformers": r"^'transformers'$|\bhf\b",
}
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

Values = dict[str, int]


def subjects() -> Iterator[tuple[str, str]]:
    """Kind, target, form or stage, and the name that its registry has."""
    sys.path.insert(0, str(ROOT))
    from nbl_export.mixers import kinds
    from nbl_export.publish.convert import FORMS
    from nbl_export.run.pipeline import STAGES
    from nbl_export.targets import all_targets

    targets = dict.fromkeys(target.capabilities.name for target in all_targets())
    for sort, names in {"kind": kinds(), "target": targets, "form": FORMS}.items():
        yield from ((sort, name) for name in names)
    yield from (("stage", stage.name) for stage in STAGES)


def pattern(sort: str, name: str) -> re.Pattern[str]:
    """What a unit that mentions a subject matches. Words such as "plan" are everywhere, so a stage is its string."""
    words = _words(name)
    default = rf"^'{words}'$|\bstages {words}\b" if sort == "stage" else rf"\b{words}\b"
    return re.compile(PATTERNS.get(f"{sort} {name}", default))


def units(tree: ast.Module) -> Iterator[str]:
    """See the top of this file."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docs and not re.search(r"\s", node.value):
                yield f"'{_words(node.value)}'"
        elif isinstance(node, ast.Attribute):
            yield _words(f"{node.value.id}.{node.attr}" if isinstance(node.value, ast.Name) else node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nbl_export"):
            yield from (_words(f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield _words(node.name)
        elif isinstance(node, ast.Name):
            yield _words(node.id)
        elif isinstance(node, ast.arg | ast.keyword):
            yield _words(node.arg or "")


def _words(name: str) -> str:
    return " ".join(re.split(r"[^A-Za-z0-9]+", _CAPITAL.sub("_", name))).strip().lower()


def mentions() -> dict[str, list[str]]:
    """Subject -> source files of the package that mention it."""
    found = {path: set(units(tree)) for path, tree in trees(PACKAGE).items()}
    return {
        f"{sort} {name}": [path for path, said in found.items() if any(pattern(sort, name).search(u) for u in said)]
        for sort, name in subjects()
    }


def trees(folder: Path) -> dict[str, ast.Module]:
    """Source files of a folder, by their names in it."""
    paths = sorted(folder.rglob("*.py"))
    return {p.relative_to(folder).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def lines_of(folder: Path) -> Values:
    """Source file -> its lines."""
    paths = sorted(folder.rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in paths}


def functions() -> Values:
    """Function of the package -> its lines."""
    return {
        f"{path}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in trees(PACKAGE).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


def _longest(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(values).most_common(LONGEST))


def _beside(now: Mapping[str, int], before: Mapping[str, int]) -> str:
    names: Iterable[str] = dict.fromkeys((*now, *before))
    return ", ".join(f"{name} {now.get(name, 'left')} ({before.get(name, 'new')})" for name in names)


def main(*asked: str) -> None:
    """Print, or record."""
    before = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    source, tests = lines_of(PACKAGE), lines_of(ROOT / "tests")
    lines = {"nbl_export": sum(source.values()), "tests": sum(tests.values()), "source files": len(source)}
    found = {subject: len(files) for subject, files in mentions().items()}
    if "--record" in asked:
        RECORD.write_text(json.dumps({"lines": lines, "mentions": found}, indent=1) + "\n", encoding="utf-8")
        return
    out = [
        f"lines (before): {_beside(lines, before.get('lines', {}))}",
        f"longest files: {_longest({**source, **tests})}",
        f"longest functions: {_longest(functions())}",
        f"modules a folder: {_longest(Counter(name.rpartition('/')[0] for name in source))}",
        "source files that mention each subject (before):",
    ]
    for sort in ("kind", "target", "form", "stage"):
        own = [{k.partition(" ")[2]: n for k, n in v.items() if k.startswith(f"{sort} ")}
               for v in (found, before.get("mentions", {}))]  # fmt: skip
        out.append(f"  {sort}: {_beside(*own)}")
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
