"""Reads a GGUF file once. Each reader takes seconds, because it makes an array for each word of the vocabulary.

transformers makes one reader for the configuration, one for the weights and one for the tokenizer, and one map of
tensor names for each submodule. `shared` gives it the same reader and the same map each time.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

__all__ = ["forget", "reader", "shared"]


def reader(path: str | os.PathLike[str], _mode: str = "r") -> Any:
    """A `gguf.GGUFReader` of a file; the same one until the file changes or `forget` is called."""
    facts = os.stat(path)
    return _reader(os.fspath(path), facts.st_size, facts.st_mtime_ns)


def forget() -> None:
    """Release the reader and the map: for a vocabulary of 150,000 words it takes hundreds of megabytes."""
    _reader.cache_clear()
    _name_map.cache_clear()


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Within: whoever asks the gguf package for a reader gets the one of `reader`."""
    import gguf

    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = reader, _name_map
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = kept


@functools.lru_cache(maxsize=1)
def _reader(path: str, _size: int, _changed_ns: int) -> Any:
    from gguf.gguf_reader import GGUFReader

    return GGUFReader(path)


@functools.lru_cache(maxsize=1)
def _name_map(architecture: Any, layers: int) -> Any:
    from gguf.tensor_mapping import get_tensor_name_map

    return get_tensor_name_map(architecture, layers)
