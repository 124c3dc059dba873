"""OpenVINO GenAI's LLMPipeline on a directory that optimum-intel exported (see `conversions`).

Prefill is timed as a generation of one token, decode by the durations that the pipeline takes of each further token, so
that neither a tokenizer nor the rest of the call is in it; both are held against the clock of the call. Its cache
cannot be rewound from outside: each test runs its prompt anew, and prefix caching is off.

The precision it computes and keeps its cache in is its own choice, recorded (bfloat16 and 8 bits on a processor that
has bfloat16 products); at fp32 it is told float32, or else it would not read 32 bits a weight.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ir_bits import bits_of_ir
from protocol import Decoder, serve


class OpenVino(Decoder):
    def __init__(self, config: dict[str, Any]) -> None:
        import openvino
        import openvino_genai

        self._ov, self._genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = config["capacity"]  # a prompt is one chunk
        settings = {"INFERENCE_NUM_THREADS": config["threads"], "PERFORMANCE_HINT": "LATENCY"}
        if config["precision"] == "fp32":
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        directory = Path(config["model"])
        self._pipeline = openvino_genai.LLMPipeline(str(directory), "CPU", scheduler_config=scheduler, **settings)
        core = openvino.Core()
        model = core.read_model(directory / "openvino_model.xml")
        nominal, real = bits_of_ir(model)
        compiled = core.compile_model(model, "CPU", settings)
        self.facts = {
            "weight_bits": nominal,
            "bits_per_weight": real,
            "logits": "last",
            "decode": "greedy",
            "computes_in": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
            "cache_in": compiled.get_property("KV_CACHE_PRECISION").get_type_name(),
            "versions": {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__},
        }

    def time(self, kind: str, depth_ids: Sequence[int], ids: Sequence[int]) -> int:
        if kind == "pp" and depth_ids:
            raise ValueError("a chunk after cached tokens is not measured for OpenVINO GenAI")
        prompt, tokens = (ids, 1) if kind == "pp" else (depth_ids, len(ids) + 1)
        start = time.perf_counter_ns()
        raw = self._generate(prompt, tokens).perf_metrics.raw_metrics
        whole = time.perf_counter_ns() - start
        first, others = round(1000 * raw.m_times_to_first_token[0]), round(1000 * sum(raw.m_durations))
        if len(raw.m_durations) != tokens - 1 or not 0.8 * whole < first + others <= whole:
            raise ValueError(
                f"its own times ({first} and {others} ns, {tokens} tokens) are not those of a call of {whole} ns"
            )
        return first if kind == "pp" else others

    def say(self, ids: Sequence[int], tokens: int) -> list[int]:
        return [int(i) for i in self._generate(ids, tokens).tokens[0]]

    def _generate(self, ids: Sequence[int], tokens: int) -> Any:
        import numpy as np

        ids_BT = np.array([ids], np.int64)
        tensor, mask = self._ov.Tensor(ids_BT), self._ov.Tensor(np.ones_like(ids_BT))
        options = {"max_new_tokens": tokens, "ignore_eos": True, "do_sample": False}
        return self._pipeline.generate(self._genai.TokenizedInputs(tensor, mask), **options)


if __name__ == "__main__":
    serve(OpenVino)
