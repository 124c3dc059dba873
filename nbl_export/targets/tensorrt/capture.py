"""Whether the steps of a plan can be captured as a CUDA graph: told by TensorRT-RTX's builder, without a GPU.

    can be captured       Layer(Myelin): ... , Layer(Myelin): ... [profile 1]        one layer for each profile
    cannot                Layer(TrainStation), Layer(Myelin), Layer(DeviceToShapeHost), ...    waits for the host

Two signs are needed (seen with TensorRT-RTX 1.7.1). With the flag REQUIRE_USER_ALLOCATION, the builder refuses kernels
that allocate memory or wait for the host. It still takes a network whose shapes depend on data, and splits the plan
where a size goes to the host. The builder lists the layers of a plan among its notes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nbl_export.errors import NblError
from nbl_export.targets.tensorrt.log import LAYERS_NOTE, Message, complaints

__all__ = ["ask_for_proof", "capturable"]

_FLAG = "REQUIRE_USER_ALLOCATION"
_WAITING = ("DeviceToShapeHost", "TrainStation")  # kinds of layers that wait for the host; the first names a tensor


def ask_for_proof(trt: Any, builder_config: Any) -> None:
    """Make the builder of TensorRT-RTX refuse what cannot be captured. Contexts then need memory of the user."""
    builder_config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


def capturable(said: Sequence[Message], plan: Any, name: str) -> bool | None:
    """Whether the steps of a plan can be captured; None if the builder lists no layers.

    Args:
        said: what the builder said, after `ask_for_proof`.
        plan: None if the builder gave no plan.
        name: of the network, for the error.

    Raises:
        NblError: the steps cannot be captured.
    """
    if plan is None:
        if why := [text for text in complaints(said) if _FLAG in text]:
            raise NblError(f"a CUDA graph cannot hold the steps of {name}, as decode needs: {why[0]}")
        return None
    notes = "\n".join(m.text for m in said if m.text.startswith(LAYERS_NOTE))
    layers = re.findall(r"^Layer\((\w+)\): (.*?)(?:, Tactic|$)", notes, re.MULTILINE)
    for waiting in _WAITING:
        if found := [layer for kind, layer in layers if kind == waiting]:
            raise NblError(f"a CUDA graph cannot hold the steps of {name}, as decode needs: they wait for {found[0]}")
    return True if layers else None
