"""Where a model is served, as data: the only table of what each destination holds.

`--for`, `convert`, `inspect` and docs/destinations.md read it. What an engine holds is in its `Capabilities`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nbl_export.errors import UsageError
from nbl_export.records.capabilities import LINEAR_KINDS
from nbl_export.records.plan import PREDICTED_KV, USUAL_KIND

__all__ = ["ANYWHERE", "DESTINATIONS", "Destination", "describe_kind", "destination_named", "is_destination"]


@dataclass(frozen=True)
class Destination:
    """A program that runs an exported model.

    Attributes:
        engine, provider: of the run whose folder it takes; "" if it takes a form of any run.
        form: that `convert` writes for it; "" if it takes the folder of the run.
        kinds: methods that the form holds; None for those of the engine.
        weights: of the form, in words; "" if --precision says it.
        bare: the form has one matrix a layer, without a bias, on the normed input.
        architectures: of the form, as this tool writes it; empty for those of the run.
        keeps_first: layer 0 must keep its attention.
        command: that takes the form's folder, {} in it.
    """

    title: str
    engine: str = ""
    provider: str = "cpu"
    form: str = ""
    kinds: frozenset[str] | None = None
    weights: str = ""
    bare: bool = False
    architectures: tuple[str, ...] = ()
    keeps_first: bool = False
    command: str = ""

    def refuses(
        self, kinds: Iterable[str], held: frozenset[str] | None, architecture: str, layers: Iterable[int]
    ) -> str:
        """Why it cannot have a model, as a part of a sentence; "" if it can.

        Args:
            kinds: of the model's mixers. held: of the engine, if `kinds` is None.
            architecture: "" if it is not known. layers: that are replaced.
        """
        holds = held if self.kinds is None else self.kinds
        foreign = [] if holds is None else sorted(set(kinds) - holds)
        if foreign:
            return f"it does not hold {describe_kind(foreign[0])}"
        if architecture and self.architectures and architecture not in self.architectures:
            return f"nbl-export writes {', '.join(self.architectures)} for it, and not {architecture}"
        return "it takes its mask from layer 0, which is replaced" if self.keeps_first and 0 in layers else ""


ANYWHERE = Destination("")  # no destination is asked for: any engine, and what the engine holds
_STORED = "as the checkpoint stores them"
_NAS = ("llama", "mistral")
DESTINATIONS = {
    "genai": Destination("ONNX Runtime GenAI, CPU", "ort"),
    "cuda": Destination("ONNX Runtime GenAI, CUDA", "ort", "cuda"),
    "openvino": Destination("OpenVINO, OpenVINO GenAI", "openvino"),
    "trt": Destination("TensorRT", "trt"),
    "trt-rtx": Destination("TensorRT for RTX", "trt-rtx"),
    "transformers": Destination(
        "transformers", form="transformers", kinds=LINEAR_KINDS | {PREDICTED_KV}, weights=_STORED
    ),
    "vllm": Destination(
        "vLLM", form="transformers", kinds=LINEAR_KINDS | {PREDICTED_KV}, weights=_STORED,
        architectures=("llama", "mistral", "qwen2", "qwen3", "phi3"), command="vllm serve {}",
    ),
    "tensorrt-llm": Destination(
        "TensorRT-LLM", form="nemotron-nas", kinds=LINEAR_KINDS, weights="fp32", bare=True, architectures=_NAS,
        command="trtllm-serve {} --backend pytorch --trust_remote_code",
    ),
    "llama.cpp": Destination(
        "llama.cpp, ollama", form="nemotron-nas", kinds=LINEAR_KINDS, weights="its converter's", bare=True,
        architectures=_NAS, command="python convert_hf_to_gguf.py {} --outfile model.gguf",
    ),
    "mlx-lm": Destination(
        "mlx-lm", form="mlx", kinds=LINEAR_KINDS, weights="fp32", bare=True, architectures=_NAS, keeps_first=True,
        command='mlx_lm.generate --model {} --prompt "Write two sentences about the sea."',
    ),
    "edge-llm": Destination(
        "TensorRT-Edge-LLM", form="edge-llm", kinds=LINEAR_KINDS, weights="fp16",
        architectures=("llama", "mistral", "qwen2", "qwen3"), command="tensorrt-edgellm-export {} ONNX",
    ),
}  # fmt: skip
_ALSO = {
    "ort": "genai", "onnxruntime": "genai", "tensorrt": "trt", "tensorrt-rtx": "trt-rtx", "hf": "transformers",
    "nemotron-nas": "tensorrt-llm", "gguf": "llama.cpp", "ollama": "llama.cpp", "mlx": "mlx-lm",
    "tensorrt-edge-llm": "edge-llm",
}  # fmt: skip
_NEVER = {"sglang": "SGLang has no linear layers and no predicted KV; use vllm, or transformers"}
_SPOKEN = {PREDICTED_KV: "predicted KV", USUAL_KIND: "linear layers"}


def destination_named(name: str) -> str:
    """The name of a destination in the table; engines, forms and programs beside them have other names too.

    Raises:
        UsageError: there is none.
    """
    asked = name.lower()
    found = _ALSO.get(asked, asked)
    if found not in DESTINATIONS:
        raise UsageError(f"--for {name}: {_NEVER.get(asked) or 'destinations are ' + ', '.join(DESTINATIONS)}")
    return found


def is_destination(name: str) -> bool:
    """Whether the table has this name, or another name of a destination in it."""
    return _ALSO.get(name, name) in DESTINATIONS


def describe_kind(kind: str) -> str:
    """The layers of a kind, in words."""
    return _SPOKEN.get(kind, f"layers of kind {kind}")
