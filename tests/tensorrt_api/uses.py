"""Finds every attribute, enumeration member and call of the package on objects of TensorRT, in its syntax trees.

An expression's class is known from where it comes: the module `trt`, its classes, the results of known calls and
properties, and the names below, which the package gives to such objects.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from .names import ALL, RTX_ONLY, TRT_ONLY, Member, class_of, member

__all__ = ["KNOWN", "MODULE", "Use", "uses_of"]

MODULE = "the module"
# What variables and attributes of these names hold, without leading underscores.
KNOWN = {
    "trt": MODULE, "builder": "Builder", "network": "INetworkDefinition", "net": "INetworkDefinition",
    "parser": "OnnxParser", "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
    "contexts": "list of IExecutionContext", "layer": "ILayer", "layers": "list of ILayer",
    "constant": "ILayer", "product": "ILayer", "tensor": "ITensor",
    "runtime_config": "IRuntimeConfig", "builder_config": "IBuilderConfig",
    "cache": "IRuntimeCache",
}  # fmt: skip
_CLASS, _LIST = "class ", "list of "  # begin the types of a class itself, and of whatever is indexed or iterated over
_SAME = ("list", "tuple", "sorted", "iter", "require")  # functions that give their first argument back, or its elements


@dataclass(frozen=True)
class Use:
    """A name of the library in a file.

    Attributes:
        owner: MODULE or a class.
        arguments: of a call; None if it is no call or their number is not written there.
        kind: "read", "set", "call" or "override".
    """

    file: str
    line: int
    owner: str
    name: str
    kind: str
    arguments: int | None = None


def uses_of(path: Path) -> list[Use]:
    """All uses in a file, in the order of the lines."""
    visitor = _Visitor(path.name)
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return sorted(visitor.found, key=lambda use: (use.line, use.owner, use.name))


def _member(owner: str, name: str) -> Member | None:
    return next((m for letters in (ALL, TRT_ONLY, RTX_ONLY) if (m := member(owner, name, letters))), None)


def _element(kind: str) -> str:
    return kind.removeprefix(_LIST) if kind.startswith(_LIST) else ""


@dataclass
class _Visitor(ast.NodeVisitor):
    file: str
    found: list[Use] = field(default_factory=list)
    scopes: list[dict[str, str]] = field(default_factory=lambda: [{}])

    # -- what an expression is ---------------------------------------------------------------------------

    def type_of(self, node: ast.expr) -> str:
        """MODULE, a class of the library, "class X" for X itself, "list of X", or "" for anything else."""
        if isinstance(node, ast.Name):
            held = next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
            return KNOWN.get(node.id.lstrip("_"), "") if held is None else held
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.Subscript):
            return _element(self.type_of(node.value))
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
            return self._inside(node)
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body) or self.type_of(node.orelse)
        if isinstance(node, ast.NamedExpr):
            return self.type_of(node.value)
        return ""

    def _attribute(self, node: ast.Attribute) -> str:
        owner = self.type_of(node.value)
        if owner.startswith(_LIST):
            return ""
        if owner == MODULE:
            return _CLASS + node.attr if class_of(node.attr) == node.attr else ""
        if owner.startswith(_CLASS):
            return owner.removeprefix(_CLASS) if _member(owner.removeprefix(_CLASS), node.attr) else ""
        if owner:
            held = _member(owner, node.attr)
            return class_of(held.gives) if held and not held.counts else ""
        return KNOWN.get(node.attr.lstrip("_"), "")

    def _call(self, node: ast.Call) -> str:
        function = node.func
        if isinstance(function, ast.Name) and node.args and function.id in (*_SAME, "next"):
            first = self.type_of(node.args[0])
            return _element(first) if function.id == "next" else first
        called = self.type_of(function)
        if called.startswith(_CLASS):
            return called.removeprefix(_CLASS)
        if isinstance(function, ast.Attribute) and (owner := self.type_of(function.value)):
            held = _member(owner.removeprefix(_CLASS), function.attr)
            return class_of(held.gives) if held else ""
        return ""

    def _inside(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> str:
        self.scopes.append({})
        for part in node.generators:
            self._bind(part.target, _element(self.type_of(part.iter)))
        kind = self.type_of(node.elt)
        self.scopes.pop()
        return _LIST + kind if kind else ""

    # -- where names get their values --------------------------------------------------------------------

    def _bind(self, target: ast.expr, kind: str) -> None:
        if isinstance(target, ast.Name) and (kind or target.id.lstrip("_") not in KNOWN):
            self.scopes[-1][target.id] = kind

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for one, value in zip(target.elts, node.value.elts, strict=False):
                    self._bind(one, self.type_of(value))
            elif (
                isinstance(target, ast.Attribute) and target.attr == "__class__" and isinstance(target.value, ast.Name)
            ):
                self._bind(target.value, self.type_of(node.value).removeprefix(_CLASS))
            else:
                self._bind(target, self.type_of(node.value))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._bind(node.target, self.type_of(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, _element(self.type_of(node.iter)))
        self.generic_visit(node)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) -> None:
        self.scopes.append({})
        for part in node.generators:
            self._bind(part.target, _element(self.type_of(part.iter)))
        self.generic_visit(node)
        self.scopes.pop()

    visit_ListComp = visit_GeneratorExp = visit_SetComp = visit_DictComp = _comprehension

    def _function(self, node: ast.FunctionDef | ast.Lambda) -> None:
        self.scopes.append({})
        self.generic_visit(node)
        self.scopes.pop()

    visit_FunctionDef = visit_Lambda = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in map(self.type_of, node.bases):
            if base.startswith(_CLASS):
                self._overridden(node, base.removeprefix(_CLASS))
        self._function(node)  # type: ignore[arg-type]

    def _overridden(self, node: ast.ClassDef, base: str) -> None:
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                self._add(part.lineno, base, part.name, "override", len(part.args.args) - 1)

    # -- uses --------------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> None:
        counted = not any(isinstance(a, ast.Starred) for a in node.args) and not any(
            k.arg is None for k in node.keywords
        )
        arguments = len(node.args) + len(node.keywords) if counted else None
        if (called := self.type_of(node.func)).startswith(_CLASS):
            self._add(node.lineno, called.removeprefix(_CLASS), "__init__", "call", arguments)
        if isinstance(node.func, ast.Attribute) and (owner := self.type_of(node.func.value)):
            self._add(node.lineno, owner.removeprefix(_CLASS), node.func.attr, "call", arguments)
            self.visit(node.func.value)
        else:
            self.visit(node.func)
        for part in [*node.args, *(k.value for k in node.keywords)]:
            self.visit(part)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if owner := self.type_of(node.value):
            kind = "set" if isinstance(node.ctx, ast.Store) else "read"
            self._add(node.lineno, owner.removeprefix(_CLASS), node.attr, kind)
        self.generic_visit(node)

    def _add(self, line: int, owner: str, name: str, kind: str, arguments: int | None = None) -> None:
        if not owner.startswith(_LIST) and not (name.startswith("__") and name != "__init__"):
            self.found.append(Use(self.file, line, owner, name, kind, arguments))
