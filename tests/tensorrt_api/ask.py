"""Prints what one module of TensorRT's Python bindings offers, as JSON. Run by `read_names`, in a process of its own.

    python -I -S ask.py DIR MODULE EMPTY_LIBRARY CLASS...

The bindings are loaded against `empty_library.c`, so nothing of TensorRT runs. Their own docstrings state signatures.
The empty library then answers every call with 0, and the bindings show what they make of a failure: False, None or an
exception.

    method      "(name, shape) -> bool else False", overloads separated by " | ", "=" behind optional arguments
    property    "property DataType", with "settable" or "write-only"
    member      "value" of an enumeration or a class
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

_PREFIX = re.compile(
    r"\b(?:\w+_bindings\.\w+\.|nvinfer1::|nvonnxparser::|v_1_0::|typing\.|typing_extensions\.|collections\.abc\.)"
)
_SIGNATURE = re.compile(r"^(?:\d+\. )?\w*\((.*)\) -> (.+?)$", re.M)
_DEFAULT = re.compile(r" = (<[^>]*>|\S+)$")
_VALUES: dict[str, Any] = {
    "int": 0, "SupportsInt": 0, "str": "x", "bool": False, "tuple": (1,), "Dims": (1,), "buffer": b"x", "Buffer": b"x",
}  # fmt: skip


def main(directory: str, name: str, library: str, *classes: str) -> None:
    answers = ctypes.CDLL(library).answer_with_objects
    answers(1)
    sys.path.insert(0, directory)
    module = importlib.import_module(name)
    made = dict(_objects(module))
    answers(0)
    offered = {
        cls: {m: _text(module, getattr(module, cls), m, made) for m in _members(getattr(module, cls))}
        for cls in classes
        if hasattr(module, cls)
    }
    public = [n for n in dir(module) if not n.startswith("_")]
    sys.stdout.write(json.dumps({"names": public, "classes": offered}))


def _objects(module: Any) -> Iterator[tuple[str, Any]]:
    """An object of each class that the calls in question belong to."""

    class Silent(module.ILogger):
        def log(self, severity: Any, msg: str) -> None:
            pass

    logger = Silent()
    builder, runtime = module.Builder(logger), module.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(b"x")
    network = builder.create_network(0)
    tensor, layer = network.get_input(0), network.get_layer(0)
    context, config = engine.create_execution_context(), engine.create_runtime_config()
    made = (
        logger, builder, runtime, engine, network, builder.create_builder_config(), tensor, layer, context, config,
        builder.create_optimization_profile(), module.OnnxParser(network, logger), engine.create_engine_inspector(),
    )  # fmt: skip
    for thing in made:
        yield next(c.__name__ for c in type(thing).__mro__ if hasattr(module, c.__name__)), thing


def _members(cls: type) -> list[str]:
    public = [m for m in dir(cls) if not m.startswith("_")]
    return ["__init__", *public] if _signatures(_raw(cls, "__init__").__doc__) else public


def _raw(cls: type, name: str) -> Any:
    return next(c.__dict__[name] for c in cls.__mro__ if name in c.__dict__)


def _text(module: Any, cls: type, name: str, made: dict[str, Any]) -> str:
    """What a member is, as drawn above."""
    raw = _raw(cls, name)
    if isinstance(raw, property):
        getter = _signatures(getattr(raw.fget, "__doc__", None))
        kind = "write-only" if raw.fget is None else getter[0][1] if getter else "object"
        return f"property {kind}" + (" settable" if raw.fget and raw.fset else "")
    signatures = _signatures(getattr(raw, "__doc__", None))
    if not signatures:
        return "value"
    text = " | ".join(f"({', '.join(n for n, _ in takes)}) -> {gives}" for takes, gives in signatures)
    call = cls if name == "__init__" else getattr(made.get(cls.__name__), name, None)
    takes, gives = signatures[0]
    failure = _failure(call, takes, made) if call and _is_simple(module, gives) else ""
    return text + (f" else {failure}" if failure else "")


def _is_simple(module: Any, gives: str) -> bool:
    """Whether a 0 is safe as that result: a truth value, nothing, or a pointer to an object of the library."""
    cls = getattr(module, gives, None)
    pointer = isinstance(cls, type) and not hasattr(cls, "__members__") and gives not in ("Dims", "IPluginRegistry")
    return gives in ("bool", "None") or pointer


def _signatures(doc: str | None) -> list[tuple[list[tuple[str, str]], str]]:
    """Every overload that a docstring of pybind11 states: names and types of the arguments without self, and result."""
    found = []
    for arguments, gives in _SIGNATURE.findall(_PREFIX.sub("", doc or "")):
        takes = [part.partition(": ")[::2] for part in _split(arguments)]
        named = [(n + "=" * bool(_DEFAULT.search(t)), _DEFAULT.sub("", t)) for n, t in takes]
        found.append((named[1:] if named[:1] and named[0][0] in ("self", "arg0") else named, _plain(gives)))
    return found


def _split(arguments: str) -> list[str]:
    """Arguments at the commas outside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[(<]*[\])>])", arguments) if part.strip()]


def _plain(gives: str) -> str:
    return re.sub(r"Supports(Int|Float)", lambda m: m[1].lower(), gives).replace("List[", "list[")


def _failure(call: Any, takes: list[tuple[str, str]], made: dict[str, Any]) -> str:
    """What a call gives if the library answers 0; "" if the arguments cannot be made up."""
    values = {**_VALUES, **made}
    needed = [kind for name, kind in takes if not name.endswith("=")]
    if any(kind not in values for kind in needed):
        return ""
    try:
        given = call(*(values[kind] for kind in needed))
    except Exception as error:
        return f"raises {type(error).__name__}"
    return repr(given) if given is None or given is False else ""


if __name__ == "__main__":
    main(*sys.argv[1:])
