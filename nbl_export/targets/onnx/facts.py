"""Sizes of a GenAI directory, and the provider that it asks for.

The settings of genai_config.json that runners read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbl_export.errors import CorruptError, NblError, one_line
from nbl_export.graph.genai_config import providers_of, read_genai_config
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE
from nbl_export.graph.trust import read_proto
from nbl_export.targets.base import DecoderFacts

__all__ = ["CUDA", "GenaiSettings", "provider_of", "read_facts"]

CUDA = "cuda"  # GenAI's name of the provider, and the value of --provider
_HALVES = (10, 16)  # FLOAT16 and BFLOAT16 of TensorProto


def read_facts(directory: Path) -> DecoderFacts:
    """Sizes from genai_config.json and the graph; no weights are read.

    Raises:
        NblError: the directory proposes tokens, or genai_config.json lacks a size. CorruptError: a file is damaged.
    """
    settings = GenaiSettings.read(directory)
    if "speculative" in read_genai_config(directory):
        raise NblError(f"{directory} proposes tokens, so single steps say nothing: time whole answers in GenAI itself")
    if settings.head_dim is None:
        raise CorruptError(f"{directory / GENAI_CONFIG} gives no head_size; export the model again")
    cache = _cache_bytes(directory / GRAPH_FILE, settings.head_dim)
    return DecoderFacts(settings.vocab_size, settings.context_length, settings.head_dim, cache)


def _cache_bytes(graph: Path, head_dim: int) -> int:
    """Bytes that the caches of a graph take for a token.

    Args:
        head_dim: used if the graph only names that dimension of its caches.
    """
    inputs = read_proto(graph).graph.input
    caches = [v.type.tensor_type for v in inputs if v.name.startswith("past_key_values.")]
    sizes = ((t.shape.dim[1].dim_value, t.shape.dim[3].dim_value or head_dim, t.elem_type) for t in caches)
    return sum(heads * size * (2 if kind in _HALVES else 4) for heads, size, kind in sizes)


def provider_of(directory: Path) -> str:
    """The provider that a GenAI directory asks for: `CUDA`, or "cpu" if it asks for any other.

    Raises:
        CorruptError: genai_config.json is a link out of the directory.
    """
    return CUDA if CUDA in providers_of(directory) else "cpu"  # opening a damaged directory reports the error


@dataclass(frozen=True)
class GenaiSettings:
    """Settings of a decoder in genai_config.json: positions, vocabulary, the ids that end a text.

    head_dim: size of a head, if it is given.
    """

    context_length: int
    vocab_size: int
    end_ids: tuple[int, ...]
    head_dim: int | None = None

    @classmethod
    def read(cls, directory: Path) -> GenaiSettings:
        """Read the settings without loading the model.

        Raises:
            NblError: the file is missing, not JSON, has a refused key, or lacks one of the three settings.
        """
        path = directory / GENAI_CONFIG
        if not path.is_file():
            raise NblError(
                f"{directory} is not an ONNX Runtime GenAI model: {GENAI_CONFIG} is missing; export it again"
            )
        settings = read_genai_config(directory)
        try:
            model = settings["model"]
            end = model["eos_token_id"]
            ends = tuple(int(i) for i in (end if isinstance(end, list) else [end]))
            head = model.get("decoder", {}).get("head_size")
            head = None if head is None else int(head)
            return cls(int(model["context_length"]), int(model["vocab_size"]), ends, head)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise NblError(f"{path} cannot be read ({one_line(error)}); export the model again") from error
