"""optimum-onnx: ORTModelForCausalLM on a directory that it exported (see `conversions`). Logits of all positions."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graph_bits import bits_of_graph
from protocol import Decoder, serve


class OptimumOnnx(Decoder):
    def __init__(self, config: dict[str, Any]) -> None:
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(config["threads"])
        torch.set_grad_enabled(False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = config["threads"]
        directory = Path(config["model"])
        binding = config["variant"] == "io-binding"
        load = ORTModelForCausalLM.from_pretrained
        self._model = load(directory, session_options=options, use_io_binding=binding, local_files_only=True)
        self._torch = torch
        self._past: Any = None
        self._length = 0
        self._logits: Any = None
        nominal, real = bits_of_graph(directory / "model.onnx")
        names = ("optimum-onnx", "optimum", "onnxruntime", "transformers", "torch")
        self.facts = {
            "weight_bits": nominal,
            "bits_per_weight": real,
            "logits": "all",
            "decode": "given tokens",
            "versions": {n: importlib.metadata.version(n) for n in names},
        }

    def start(self, ids: Sequence[int], limits: int) -> None:
        self._past, self._length = None, 0
        if ids:
            self.append(ids)

    def append(self, ids: Sequence[int]) -> None:
        self._length += len(ids)
        mask = self._torch.ones(1, self._length, dtype=self._torch.int64)
        positions = self._torch.arange(self._length - len(ids), self._length)[None]
        out = self._model(
            input_ids=self._torch.tensor([list(ids)]), attention_mask=mask, position_ids=positions,
            past_key_values=self._past, use_cache=True,
        )  # fmt: skip
        self._past, self._logits = out.past_key_values, out.logits

    def best(self) -> int:
        return int(self._logits[0, -1].argmax())


if __name__ == "__main__":
    serve(OptimumOnnx)
