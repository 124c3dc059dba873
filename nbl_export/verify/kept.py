"""References of the original model, kept in the run directory: another plan of this model is verified without them.

    identity, probe, graph files ─► key ─┬─ as in the file ─► Reference       the original model does not run
                                         └─ another key, or a damaged file ─► None: the caller runs the model

    {kind}.logits.{row}, {kind}.noise.{row}      of the short rows
    {kind}.long, {kind}.long_noise               of the long row, if there is one
    {kind}.greedy, {kind}.margins                [prompts, tokens], if there are prompts
    metadata "references", JSON: by kind, "key", "sha256" of the kind's tensors, and "noisy"

One safetensors file. SmolLM2's takes 90 MB: 460 positions of 49,152 float32 logits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.files import arrays_sha256, file_sha256, key_of, replacing
from nbl_export.verify.ladder import Probe, Reference

__all__ = ["CODES", "OWN", "KeptReferences"]

OWN, CODES = "own", "codes"  # kinds of matrices that a model has: its own, or those of the quantised graphs

_FORMAT = 1  # another number if references of the same inputs are computed in another way
_METADATA = "references"

Arrays = dict[str, np.ndarray]


class KeptReferences:
    """The references of the original in one file.

    Args:
        path: of the file, which may be missing.
        identity: JSON values that determine the original model and the arithmetic.
    """

    def __init__(self, path: Path, identity: Any) -> None:
        self._path, self._identity = path, identity
        self._used: dict[str, tuple[str, Reference]] = {}
        self._changed = False

    def get(self, kind: str, probe: Probe, graph: Path | None = None) -> Reference | None:
        """The kept reference of these inputs; None if there is none, or if the file is damaged.

        Args:
            kind: which matrices the original has, a name.
            graph: the graph that the matrices come from; None if they are the torch model's own.
        """
        key = self._key(probe, graph)
        found = self._read(kind, key)
        if found is not None:
            self._used[kind] = key, found
        return found

    def put(self, kind: str, probe: Probe, reference: Reference, graph: Path | None = None) -> None:
        """Keep a reference; `save` writes it."""
        entry = self._used.get(kind)
        if entry is None or entry[1] is not reference:
            self._used[kind] = self._key(probe, graph), reference
            self._changed = True

    def save(self) -> None:
        """Write the references of this verification, complete or not at all; nothing if the file has them."""
        from safetensors.numpy import save as serialised

        if not self._changed:
            return
        arrays: Arrays = {}
        stated = {}
        for kind, (key, reference) in self._used.items():
            own = _arrays(reference)
            arrays |= {f"{kind}.{name}": np.ascontiguousarray(array) for name, array in own.items()}
            stated[kind] = {"key": key, "sha256": arrays_sha256(own), "noisy": reference.noisy}
        with replacing(self._path) as stream:
            stream.write(serialised(arrays, metadata={_METADATA: json.dumps(stated)}))
        self._changed = False

    def _key(self, probe: Probe, graph: Path | None) -> str:
        names = ("*.onnx*", "openvino_model.*")  # the graph and its data
        files = [] if graph is None else sorted(path for name in names for path in graph.parent.glob(name))
        hashes = [(path.name, file_sha256(path)) for path in files]
        return key_of("references", _FORMAT, self._identity, dataclasses.asdict(probe), hashes)

    def _read(self, kind: str, key: str) -> Reference | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self._path), framework="numpy") as file:
                stated = json.loads((file.metadata() or {})[_METADATA])[kind]
                if stated["key"] != key:
                    return None
                names = [name for name in file.keys() if name.startswith(f"{kind}.")]  # noqa: SIM118
                arrays = {name.removeprefix(f"{kind}."): file.get_tensor(name) for name in names}
                return _reference(arrays, stated["noisy"]) if arrays_sha256(arrays) == stated["sha256"] else None
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError):
            return None


def _arrays(reference: Reference) -> Arrays:
    found = {f"logits.{k}": row for k, row in enumerate(reference.logits)}
    found |= {f"noise.{k}": row for k, row in enumerate(reference.noise)}
    if reference.long is not None and reference.long_noise is not None:
        found |= {"long": reference.long, "long_noise": reference.long_noise}
    if reference.greedy:
        found |= {"greedy": np.array(reference.greedy, np.int64), "margins": np.array(reference.margins, np.float64)}
    return found


def _reference(arrays: Mapping[str, np.ndarray], noisy: bool) -> Reference:
    rows = sum(name.startswith("logits.") for name in arrays)
    texts = arrays["greedy"].tolist() if "greedy" in arrays else []
    margins = arrays["margins"].tolist() if "greedy" in arrays else []
    return Reference(
        tuple(arrays[f"logits.{k}"] for k in range(rows)),
        tuple(arrays[f"noise.{k}"] for k in range(rows)),
        tuple(map(tuple, texts)),
        tuple(map(tuple, margins)),
        arrays.get("long"),
        arrays.get("long_noise"),
        noisy,
    )
