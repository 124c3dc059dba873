"""Engines: what runs a decoder graph. Differences between them are data (`engines.base.Capabilities`).

An engine module has CAPABILITIES, probe(), open_runner(directory, threads) and open_graph(directory, spec).
"""

from __future__ import annotations

import importlib
from types import ModuleType

from nbl_export.errors import UsageError

__all__ = ["ENGINES", "load_engine"]

ENGINES = {"ort": "nbl_export.engines.ort"}


def load_engine(name: str) -> ModuleType:
    """The module of an engine; loads none of its libraries.

    Raises:
        UsageError: there is no such engine.
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; engines are {', '.join(ENGINES)}")
    return importlib.import_module(ENGINES[name])
