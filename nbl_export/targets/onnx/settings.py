"""The settings of genai_config.json that runners read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbl_export.errors import NblError, one_line
from nbl_export.graph.genai_config import read_genai_config
from nbl_export.graph.names import GENAI_CONFIG

__all__ = ["GenaiSettings"]


@dataclass(frozen=True)
class GenaiSettings:
    """Settings of a decoder in genai_config.json: positions, vocabulary, the ids that end a text.

    lossless: whether tokens are proposed to the decoder (`rewrite.lossless`). head_dim: size of a head, if it is given.
    """

    context_length: int
    vocab_size: int
    end_ids: tuple[int, ...]
    pad_id: int | None = None
    lossless: bool = False
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
            pad = model.get("pad_token_id")
            pad = None if pad is None else int(pad)
            lossless = "draft" in model or "speculative" in settings
            head = model.get("decoder", {}).get("head_size")
            head = None if head is None else int(head)
            return cls(int(model["context_length"]), int(model["vocab_size"]), ends, pad, lossless, head)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise NblError(f"{path} cannot be read ({one_line(error)}); export the model again") from error
