"""An NBL checkpoint as a stock torch model."""

from __future__ import annotations

from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.model.checkpoint.pretrained import model_with

__all__ = ["restored"]


def restored(model: Any) -> Any:
    """The stock model of a loaded NBL model: attention of replaced layers is zeros, and missing norms are ones.

    Raises:
        NblError: weights of neither attention nor norms are missing.
    """
    values = model.config.to_dict()
    replaced = tuple(f".{i}.self_attn." for i in values["nbl_replaced_layers"])
    values = {name: value for name, value in values.items() if not name.startswith("nbl_")}
    for name in ("architectures", "model_type"):
        values.pop(name, None)
    config = type(model.config).__mro__[1](**values)  # the stock class that this class derives from
    with torch.device("meta"):
        stock = model_with(config)
    kept = {name: value for name, value in model.state_dict().items() if not any(part in name for part in replaced)}
    missing = {name: value.shape for name, value in stock.state_dict().items() if name not in kept}
    foreign = [name for name in missing if ".self_attn." not in name and "norm" not in name]
    if foreign:
        raise NblError(f"the checkpoint lacks the weights {foreign[0]}; fetch the model again")
    blank = {n: torch.ones(shape) if n.endswith("norm.weight") else torch.zeros(shape) for n, shape in missing.items()}
    stock.load_state_dict({**kept, **blank}, assign=True)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    return stock
