"""OpenVINO GenAI's LLMPipeline on a directory that optimum-intel exported (see `conversions`).

Prefill is timed as a generation of one token, decode between the stamps that the pipeline takes at each new token, so
that neither a tokenizer nor the rest of the call is in it. Its cache cannot be rewound from outside: each test runs its
prompt anew, and prefix caching is off. The precision it computes and keeps its cache in is its own choice, recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        directory = Path(config["model"])
        self._pipeline = openvino_genai.LLMPipeline(str(directory), "CPU", scheduler_config=scheduler, **settings)
        core = openvino.Core()
        model = core.read_model(directory / "openvino_model.xml")
        nominal, real = _bits(model)
        compiled = core.compile_model(model, "CPU", settings)
        self.facts = {
            "weight_bits": nominal,
            "bits_per_weight": real,
            "logits": "last",
            "decode": "greedy",
            "computes_in": str(compiled.get_property("INFERENCE_PRECISION_HINT")),
            "cache_in": str(compiled.get_property("KV_CACHE_PRECISION")),
            "versions": {"openvino": openvino.__version__, "openvino-genai": openvino_genai.__version__},
        }

    def time(self, kind: str, depth_ids: Sequence[int], ids: Sequence[int]) -> int:
        if kind == "pp":
            if depth_ids:
                raise ValueError("a chunk after cached tokens is not measured for OpenVINO GenAI")
            raw = self._generate(ids, 1).perf_metrics.raw_metrics
            return round(1000 * raw.m_times_to_first_token[0])
        stamps = self._generate(depth_ids, len(ids) + 1).perf_metrics.raw_metrics.m_new_token_times
        if len(stamps) != len(ids) + 1:
            raise ValueError(f"{len(stamps)} tokens came where {len(ids) + 1} were asked for")
        return round(1000 * (stamps[-1] - stamps[0]))

    def say(self, ids: Sequence[int], tokens: int) -> list[int]:
        return [int(i) for i in self._generate(ids, tokens).tokens[0]]

    def _generate(self, ids: Sequence[int], tokens: int) -> Any:
        import numpy as np

        ids_BT = np.array([ids], np.int64)
        tensor, mask = self._ov.Tensor(ids_BT), self._ov.Tensor(np.ones_like(ids_BT))
        options = {"max_new_tokens": tokens, "ignore_eos": True, "do_sample": False}
        return self._pipeline.generate(self._genai.TokenizedInputs(tensor, mask), **options)


def _bits(model: Any) -> tuple[int, float]:
    """Nominal bits of most weights that a MatMul reads, and bits for each with scales and zero points."""
    total, elements, seen = 0, 0, {}
    for node in model.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        constants = _constants(node.input_value(1).get_node())
        if not constants:
            continue
        sizes = [c.get_element_type().size * 8 if c.get_element_type().bitwidth == 0 else c.get_element_type().bitwidth
                 for c in constants]  # fmt: skip
        counts = [_count(c.get_output_shape(0)) for c in constants]
        count = max(counts)
        bits = sizes[counts.index(count)]
        total += sum(s * n for s, n in zip(sizes, counts, strict=True))
        elements += count
        seen[bits] = seen.get(bits, 0) + count
    return max(seen, key=lambda bits: seen[bits]), total / elements


def _constants(node: Any) -> list[Any]:
    """The constants that a value is computed from; none where anything else is."""
    if node.get_type_name() == "Constant":
        return [node]
    if node.get_type_name() not in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
        return []
    parts = [_constants(value.get_node()) for value in node.input_values()]
    return [c for part in parts for c in part] if all(parts) else []


def _count(shape: Any) -> int:
    count = 1
    for size in shape:
        count *= int(size)
    return count


if __name__ == "__main__":
    serve(OpenVino)
