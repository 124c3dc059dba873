"""A directory of this tool (model/ or original/ of a run) on its own runner. Runs in the driver's environment."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graph_bits import bits_of_graph
from ir_bits import bits_of_ir
from protocol import Decoder, serve

from nbl_export.run.deployed import available_engine, locate
from nbl_export.targets.runners import SequenceLimits

PACKAGES = {"ort": ("onnxruntime", "onnxruntime-genai"), "openvino": ("openvino",)}


class Nbl(Decoder):
    def __init__(self, config: dict[str, Any]) -> None:
        directory = Path(config["model"])
        found = locate(directory)
        self._capacity = config["capacity"]
        self._runner = available_engine(found).open_runner(directory, config["threads"], SequenceLimits(self._capacity))
        self._runner.begin(self._capacity)
        nominal, real, logits = _ir_facts(directory) if found.engine == "openvino" else _graph_facts(directory)
        self.facts = {
            "engine": found.engine,
            "weight_bits": nominal,
            "bits_per_weight": real,
            "logits": logits,
            "decode": "given tokens",
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES[found.engine]},
        }

    def start(self, ids: Sequence[int], limits: int) -> None:
        self._runner.rewind(0)
        if ids:
            self._runner.append(ids)

    def append(self, ids: Sequence[int]) -> None:
        self._runner.append(ids)

    def best(self) -> int:
        return int(self._runner.pick())


def _graph_facts(directory: Path) -> tuple[int, float, str]:
    return *bits_of_graph(directory / "model.onnx"), "last" if (directory / "all_logits.onnx").is_file() else "all"


def _ir_facts(directory: Path) -> tuple[int, float, str]:
    import openvino

    return *bits_of_ir(openvino.Core().read_model(directory / "openvino_model.xml")), "last"


if __name__ == "__main__":
    serve(Nbl)
