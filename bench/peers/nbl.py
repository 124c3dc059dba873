"""A directory of this tool (model/ or original/ of a run) on its own runner. Runs in the driver's environment."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graph_bits import bits_of_graph
from protocol import Decoder, serve

from nbl_export.engines.ort.genai import GenaiRunner


class Nbl(Decoder):
    def __init__(self, config: dict[str, Any]) -> None:
        directory = Path(config["model"])
        self._runner = GenaiRunner(directory, config["threads"])
        self._runner.begin(config["capacity"])
        nominal, real = bits_of_graph(directory / "model.onnx")
        self.facts = {
            "weight_bits": nominal,
            "bits_per_weight": real,
            "logits": "last" if (directory / "all_logits.onnx").is_file() else "all",
            "decode": "given tokens",
            "versions": {n: importlib.metadata.version(n) for n in ("onnxruntime", "onnxruntime-genai")},
        }

    def start(self, ids: Sequence[int], room: int) -> None:
        self._runner.rewind(0)
        if ids:
            self._runner.append(ids)

    def append(self, ids: Sequence[int]) -> None:
        self._runner.append(ids)

    def best(self) -> int:
        return int(self._runner.last_logits().argmax())


if __name__ == "__main__":
    serve(Nbl)
