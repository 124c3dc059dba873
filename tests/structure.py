"""Prints the shape of the package beside the values recorded before.

    python tests/structure.py               `make check` runs it; nothing of it is a limit
    python tests/structure.py --record      writes today's values into structure.json

statements      statements of the package without docstrings: blank lines and prose cost nothing
packed          `a, b = x, y`, `# fmt: skip` on anything but a table, and comprehensions in or of several loops
methods' files  source files that name a method outside its folder `methods/NAME/`
target methods  public methods of the class `Target`
arrows          imports to a level that is not lower, and circles of files, as tests/test_imports.py finds them

A file names a method if a unit of it matches the method's words. Units are identifiers (a name with its attribute is
one), modules of this package that are imported, and strings without a space, which are keys, options and names of
files. Comments, docstrings and prose are none. `SlidingWindow`, `sliding_window` and "sliding-window" are the unit
"sliding window"; a string keeps its quotes.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nbl_export"
RECORD = Path(__file__).with_name("structure.json")
LONGEST = 6
# Words of each method. A line of attention, `nn.Linear` and the like, is not the method "linear".
METHODS = {
    "predicted_kv": r"\bpredicted\b|\bexit layers?\b|\brecent (tokens|window)\b|\bskipped tokens\b",
    "linear": r"^'linear'$|\b(methods|trained) linear\b|\blinear (maps?|layers?)\b",
}
ALLOWED = ("methods/__init__.py", "options/options.py")  # the table of methods, and the fields of options
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_TABLES = (ast.Dict, ast.List, ast.Set, ast.Tuple)
_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

Values = dict[str, int]


def sources() -> dict[str, str]:
    """Source file of the package -> its text."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def statements(tree: ast.AST) -> int:
    """Statements in a node, docstrings left out."""
    return sum(isinstance(node, ast.stmt) and not _is_docstring(node) for node in ast.walk(tree))


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def packed_assignments(tree: ast.Module) -> int:
    """Statements that assign several values to several names."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple))
    return sum(any(isinstance(target, ast.Tuple) for target in node.targets) for node in found)


def skipped_format(text: str, tree: ast.Module) -> int:
    """`# fmt: skip` on anything but the assignment of a table."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    skipped = [token.start[0] for token in tokens if token.type == tokenize.COMMENT and "fmt: skip" in token.string]
    assigned = (node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign))
    tables = {node.end_lineno for node in assigned if isinstance(node.value, _TABLES)}
    return sum(line not in tables for line in skipped)


def nested_comprehensions(tree: ast.Module) -> int:
    """Comprehensions with another one inside, or with several loops."""
    found = [node for node in ast.walk(tree) if isinstance(node, _COMPREHENSIONS)]
    return sum(len(node.generators) > 1 or _holds_another(node) for node in found)


def _holds_another(node: ast.AST) -> bool:
    return any(inner is not node and isinstance(inner, _COMPREHENSIONS) for inner in ast.walk(node))


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


def names_method(method: str, path: str, tree: ast.Module) -> bool:
    """Whether a file outside the method's folder names the method."""
    own = path.startswith(f"methods/{method}/")
    return not own and any(re.search(METHODS[method], unit) for unit in units(tree))


def public_methods(tree: ast.Module, name: str) -> int:
    """Public methods of a class."""
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return sum(isinstance(node, ast.FunctionDef) and not node.name.startswith("_") for node in body)


def _longest(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(values).most_common(LONGEST))


def measures(texts: Mapping[str, str], trees: Mapping[str, ast.Module]) -> Values:
    """Name of a measure -> its value."""
    sys.path.insert(0, str(ROOT))
    from tests.test_imports import arrows_up, circles

    found = {
        "source files": len(trees),
        "statements": sum(statements(tree) for tree in trees.values()),
        "packed assignments": sum(packed_assignments(tree) for tree in trees.values()),
        "fmt: skip outside tables": sum(skipped_format(texts[path], tree) for path, tree in trees.items()),
        "nested comprehensions": sum(nested_comprehensions(tree) for tree in trees.values()),
        "target methods": public_methods(trees["targets/base.py"], "Target"),
        "arrows up": len(arrows_up()),
        "circles": len(circles()),
    }
    for method in METHODS:
        naming = [path for path, tree in trees.items() if names_method(method, path, tree)]
        found[f"files that name {method}"] = len(naming)
        found[f"files that name {method}, allowed"] = len(set(naming) & set(ALLOWED))
    return found


def functions(trees: Mapping[str, ast.Module]) -> Values:
    """Function of the package -> its statements."""
    found = ((path, node) for path, tree in trees.items() for node in ast.walk(tree))
    return {f"{path}:{node.name}": statements(node) for path, node in found if isinstance(node, ast.FunctionDef)}


def main(*asked: str) -> None:
    """Print, or record."""
    texts = sources()
    trees = {path: ast.parse(text) for path, text in texts.items()}
    now = measures(texts, trees)
    if "--record" in asked:
        RECORD.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(RECORD.read_text(encoding="utf-8"))
    out = [f"{name}: {value} ({before.get(name, 'new')})" for name, value in now.items()]
    out += [
        f"statements of files: {_longest({path: statements(tree) for path, tree in trees.items()})}",
        f"statements of functions: {_longest(functions(trees))}",
        f"modules a folder: {_longest(Counter(path.rpartition('/')[0] for path in trees))}",
    ]
    sys.stdout.write("\n".join(out) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
