"""Writes a GGUF file or NBL checkpoint as a directory of safetensors that transformers and the exporters read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.files import scratch_in
from nbl_export.model.checkpoint import gguf_file
from nbl_export.model.checkpoint.load import _register, load_model, load_tokenizer
from nbl_export.model.checkpoint.pretrained import model_of, quiet_transformers, reason_of, tokenizer_of
from nbl_export.model.checkpoint.source import Source, log

__all__ = ["materialise"]

_MARKER = "source.json"


def materialise(source: Source, target: Path) -> Path:
    """A directory with safetensors, config and tokenizer of a stock model.

    A GGUF or NBL checkpoint is converted into `target`; any other checkpoint is used in its own directory. `target` is
    renamed into place, so it is complete or absent. Later runs on the same model use `target` again, unless one of its
    files is missing or truncated.
    """
    if source.gguf is None and source.linearized is None:
        return source.directory
    try:
        if not _is_whole(target, source):
            _convert(source, target)
    finally:
        gguf_file.forget()
    return target


def _convert(source: Source, target: Path) -> None:
    quiet_transformers()
    _register(source)
    origin = source.gguf or source.directory
    with scratch_in(target.parent) as scratch:
        made = scratch / "checkpoint"
        try:
            if source.gguf is not None:
                _dequantise(source.gguf, made)
            else:
                _restore(source.directory, made)
        except (OSError, MemoryError, NblError):
            raise
        except Exception as error:
            raise NblError(f"{origin} cannot be loaded by transformers: {reason_of(error)}") from error
        sizes = {f.name: f.stat().st_size for f in sorted(made.iterdir())}
        facts = {"fingerprint": source.fingerprint, "file": origin.name, "sizes": sizes}
        (made / _MARKER).write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)


def _restore(directory: Path, out: Path) -> None:
    from nbl_export.model.saved import restore

    log.info("writing the stock checkpoint of %s", directory.name)
    restore.restored(load_model(directory)).save_pretrained(out)
    load_tokenizer(directory).save_pretrained(out)


def _dequantise(gguf: Path, out: Path) -> None:
    log.info("dequantising %s", gguf.name)
    model = model_of(gguf)
    # transformers refuses to save a model that was loaded quantised; these weights are dequantised.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(out)
    tokenizer_of(gguf).save_pretrained(out)


def _is_whole(target: Path, source: Source) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        facts = json.loads((target / _MARKER).read_text(encoding="utf-8"))
        same = facts["fingerprint"] == source.fingerprint
        return same and all((target / n).stat().st_size == size for n, size in facts["sizes"].items())
    return False
