"""Looks into a session of the runner: tensors of the engine, addresses, caches, layers. For acceptance.

Names are those of TensorRT's API ("ICudaEngine", "IExecutionContext", "EngineInspector"), equal in TensorRT for RTX.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.targets.tensorrt.examine.elements import empty, narrowed, widened
from nbl_export.targets.tensorrt.runner import TrtSession

__all__ = ["SPOILT", "Examined", "Tensor"]

SPOILT = -12_288.0  # exact in every float type, and no logit of a decoder

_DTYPES = {
    "HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32", "INT64": "int64", "INT32": "int32", "BOOL": "bool",
}  # fmt: skip
_PAST, _PRESENT = "past_key_values", "present"


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine.

    Attributes:
        aliased: the input that an output must share its memory with; "" if there is none.
        host: whether the library wants it in the memory of the processor, as a value or as a shape.
    """

    name: str
    is_input: bool
    dtype: str
    aliased: str
    host: bool


class Examined:
    """A session with a view into it.

    Args:
        session: begun or not; this object is of no use after the session is closed.
        trt: the imported library.
    """

    def __init__(self, session: TrtSession, trt: Any) -> None:
        self.session = session
        self._trt, self._device = trt, session._device

    @property
    def _engine(self) -> Any:
        """Not kept here, so that closing the session frees the engine."""
        return self.session._engine

    # -- the engine ------------------------------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, ...]:
        """All inputs and outputs of the engine."""
        engine = self._engine
        return tuple(self._tensor(engine.get_tensor_name(i)) for i in range(engine.num_io_tensors))

    def _tensor(self, name: str) -> Tensor:
        engine, trt = self._engine, self._trt
        kind = engine.get_tensor_dtype(name).name
        on_host = engine.get_tensor_location(name) == trt.TensorLocation.HOST or engine.is_shape_inference_io(name)
        return Tensor(
            name,
            engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
            _DTYPES.get(kind, kind.lower()),
            str(engine.get_aliased_input_tensor(name) or ""),
            bool(on_host),
        )

    def layers(self) -> Any:
        """What the inspector says of the engine: JSON of the library, its text if it is no JSON, or None."""
        inspector = self._engine.create_engine_inspector()
        if inspector is None:
            return None
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        try:
            return json.loads(text)
        except ValueError:
            return text

    # -- what the runner has bound ---------------------------------------------------------------------

    def addresses(self) -> tuple[dict[str, int], ...]:
        """Addresses by name, one record a context."""
        names = [tensor.name for tensor in self.tensors()]
        return tuple({name: int(c.get_tensor_address(name)) for name in names} for c in self.session._contexts)

    @property
    def caches(self) -> tuple[str, ...]:
        """Names of the cache inputs, in the order of the engine's record."""
        return tuple(i.name for i in self.session.contract.inputs if i.name.startswith(f"{_PAST}."))

    def read_cache(self, name: str) -> np.ndarray:
        """A copy of one cache of the running batch as float32 [B, Hkv, S, head]."""
        host = empty(self._shape(name), self._dtype(name))
        self._device.download(self._address(name), host)
        self._device.synchronize()
        return widened(host, self._dtype(name))

    def write_cache(self, name: str, array: np.ndarray) -> None:
        """Replace one cache of the running batch, float32 [B, Hkv, S, head]."""
        host = narrowed(array, self._dtype(name))
        self._device.upload(self._address(name), host)
        self._device.synchronize()

    def spoil_logits(self, tokens: int) -> None:
        """Write `SPOILT` over the logits of so many tokens, so that a step that does not run cannot go unseen."""
        logits = next(info for info in self.session.contract.outputs if info.name == "logits")
        rows = self.session._batch * (1 if logits.shape[1] == 1 else tokens)
        host = narrowed(np.full(rows * int(logits.shape[-1]), SPOILT, np.float32), logits.dtype)
        self._device.upload(self.session._buffers["logits"], host)
        self._device.synchronize()

    def captured(self) -> bool:
        """Whether the decode step is replayed from a graph that the runner has captured."""
        return self.session._step._replay is not None

    def _address(self, name: str) -> int:
        return self.session._caches[name][0]

    def _dtype(self, name: str) -> str:
        return next(info.dtype for info in self.session.contract.inputs if info.name == name)

    def _shape(self, name: str) -> tuple[int, ...]:
        info = next(info for info in self.session.contract.inputs if info.name == name)
        return (self.session._batch, *(int(n) for n in info.shape[1:]))
