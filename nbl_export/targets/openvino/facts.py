"""Sizes of the decoder in an IR directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from nbl_export.errors import CorruptError
from nbl_export.targets.openvino.ir.anatomy import states_of
from nbl_export.targets.openvino.ir.files import precision_of, read_ir
from nbl_export.targets.openvino.ir.matrices import count_parameters

__all__ = ["IrFacts", "context_length", "read_ir_facts"]


@dataclass(frozen=True)
class IrFacts:
    """Sizes of a decoder.

    Attributes:
        precision: as nbl-export noted it; "" for a directory from elsewhere.
        parameters: elements of all weights; a shared weight counts once.
        cache_elements_per_token: of one sequence, in all states.
    """

    precision: str
    parameters: int
    vocab_size: int
    context_length: int
    head_dim: int
    cache_elements_per_token: int


def read_ir_facts(directory: Path) -> IrFacts:
    """Read graph and config.json of a directory.

    Raises:
        CorruptError: a file is missing or damaged, or the logits have no fixed size.
        RefusalError: the IR has no states.
    """
    model = read_ir(directory)
    states = [state for pair in states_of(model).values() for state in pair]
    vocab = model.output("logits").get_partial_shape()[-1]
    if vocab.is_dynamic:
        raise CorruptError(f"the logits of {directory} have no fixed size; export it again")
    return IrFacts(
        precision_of(model),
        count_parameters(model),
        vocab.get_length(),
        context_length(directory),
        states[0].head_size,
        sum(state.heads * state.head_size for state in states),
    )


def context_length(directory: Path) -> int:
    """Positions of the model, from config.json.

    Raises:
        CorruptError: the file is missing or does not state them.
    """
    path = directory / "config.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{path} does not state max_position_embeddings ({error}); export the directory again"
        ) from error
