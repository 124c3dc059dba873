"""Artefacts that tests read and never write: made once for all workers of a run, and kept for the next run.

    STORE/KEY/NAME/        the artefact                KEY: hash of what makes the artefact
    STORE/KEY/NAME.json    written last: the hash of each of its files

A changed, added or missing file makes the artefact anew, and fails the run that wrote it. Keys that nobody used for a
day are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .command import snapshot

__all__ = ["Store", "key_of"]

ROOT = Path(__file__).parents[1]
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "onnx", "onnx_ir", "onnxscript",
              "onnxruntime", "onnxruntime-genai", "mobius-onnx", "openvino", "nncf", "gguf")  # fmt: skip
_OLD_S = 86_400.0


class Store:
    """Folders of artefacts for one key."""

    def __init__(self, root: Path, key: str) -> None:
        self._place, self._found = root / key, dict[str, Path]()
        self._place.mkdir(parents=True, exist_ok=True)
        (self._place / "used").touch()
        for other in root.iterdir():
            with contextlib.suppress(OSError):  # another process removes it
                if time.time() - (other / "used").stat().st_mtime > _OLD_S:
                    shutil.rmtree(other)

    def get(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of an artefact, which `make` fills if need be."""
        if name not in self._found:
            path, record = self._place / name, self._place / f"{name}.json"
            with self._locked(name):
                if not record.is_file() or self.changed(name):
                    record.unlink(missing_ok=True)
                    shutil.rmtree(path, ignore_errors=True)
                    path.mkdir()
                    make(path)
                    record.write_text(json.dumps(snapshot(path)), encoding="utf-8")
            self._found[name] = path
        return self._found[name]

    def changed(self, name: str) -> list[str]:
        """The files of a finished artefact that are not as `make` left them."""
        recorded: dict[str, str] = json.loads((self._place / f"{name}.json").read_text(encoding="utf-8"))
        found = snapshot(self._place / name)
        return sorted(file for file in {*recorded, *found} if recorded.get(file) != found.get(file))

    def written(self) -> dict[str, list[str]]:
        """Artefacts that this process has used, and whose files were changed since: name -> files."""
        return {name: changed for name in self._found if (changed := self.changed(name))}

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self._place / f"{name}.lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


@functools.cache
def key_of(*sources: str) -> str:
    """A hash of files and folders below the root of the repository, of the libraries and of the machine.

    Args:
        sources: names; of a folder, its Python and TOML files count.
    """
    digest = hashlib.sha256(repr((platform.python_version(), platform.machine())).encode())
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    for source in sources:
        paths = [ROOT / source] if (ROOT / source).is_file() else (ROOT / source).rglob("*.*")
        for path in sorted(p for p in paths if p.suffix in (".py", ".toml")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
