"""A stateful IR, compiled for the CPU, and the states of the batch it is running.

Facts of OpenVINO 2026.4 on x86 that the code relies on:

- The plugin computes in bfloat16 where the processor has it, and keeps keys and values in 8 bits. `exact` asks for
  float32 in both. A model may name the type of its cache (runtime option KV_CACHE_PRECISION); `compile_model` reads it.
- `VariableState.state` copies a state to float32 and back. Codes of 8 bits survive this up to rounding.
- A request that ran one sequence and then, after `reset_state`, a padded batch of two gives NaN with a cache of 8 bits.
  So another batch size gets another request.
- Scheduling hints make a second stream for two threads, unless the number of streams is given.

An IR one step at a time, for verification: logits of a batch, as numpy arrays.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, MissingPackageError, NblError
from nbl_export.graph.ir.anatomy import states_of
from nbl_export.graph.ir.files import precision_of, read_ir
from nbl_export.graph.ir.signals import kept_signal_stack
from nbl_export.graph.names import IR_FILE
from nbl_export.records.decoder import GraphContract, TensorInfo

__all__ = ["IrDecoder", "Session", "check_ids", "compiled", "load_openvino", "settings_of", "vocab_size_of"]

_TYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "u8": "8 bits", "u4": "4 bits"}
# Float32 arithmetic, caches in float32, and no activation in codes.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
_INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")


def load_openvino() -> ModuleType:
    """Import openvino.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise MissingPackageError("openvino", "openvino", "running an IR") from error


def settings_of(model: Any, *, exact: bool = False, threads: int | None = None) -> dict[str, Any]:
    """Settings of the CPU plugin for an IR; arguments as of `Session`."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings | _EXACT if exact or precision_of(model) == "fp32" else settings


def compiled(core: Any, model: Any, settings: Mapping[str, Any], path: Path) -> Any:
    """A model compiled for the CPU.

    Raises:
        CorruptError: OpenVINO cannot compile it.
    """
    try:
        with kept_signal_stack():
            return core.compile_model(model, "CPU", dict(settings))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CorruptError(f"OpenVINO cannot compile {path}: {reason}") from error


def check_ids(ids: np.ndarray, vocab_size: int, directory: Path) -> None:
    """Check that tokens are in the vocabulary, if its size is known.

    Raises:
        NblError: one is not.
    """
    if vocab_size > 0 and int(ids.max()) >= vocab_size:
        raise NblError(
            f"token {int(ids.max())} is beyond the {vocab_size} of {directory}: its tokenizer is of another model"
        )


def vocab_size_of(model: Any) -> int:
    """Width of the logits; -1 if it is not known."""
    return int(model.output("logits").get_partial_shape()[-1].get_max_length())


class Session:
    """A compiled IR with one inference request.

    Args:
        exact: float32 arithmetic and caches, whatever the model and the plugin prefer.
        threads: None is the plugin's choice.
    Raises:
        CorruptError: the files are damaged, or the IR is no decoder with states.
    """

    def __init__(
        self, directory: Path, file: str = IR_FILE, *, exact: bool = False, threads: int | None = None
    ) -> None:
        self.directory = directory
        core = load_openvino().Core()
        model = read_ir(directory, file)
        self.contract = _contract(model, directory / file)
        settings = settings_of(model, exact=exact, threads=threads)
        self._compiled = [compiled(core, part, settings, directory / file) for part in self.parts(model)]
        self._requests = [one.create_infer_request() for one in self._compiled]
        self.mask_BK = np.zeros((1, 0), np.int64)
        self._vocab_size = vocab_size_of(model)
        self._names = [{name for port in part.inputs for name in port.get_names()} for part in self._compiled]

    def parts(self, model: Any) -> list[Any]:
        """The models that run one after the other; states and inputs of the whole are among theirs."""
        return [model]

    def between(self, place: int, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Further inputs of part `place`, from outputs of the parts before."""
        return {}

    @property
    def arithmetic(self) -> str:
        """Types that the plugin has chosen, in words."""
        asked = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        kinds = [str(self._compiled[0].get_property(name).to_string()) for name in asked]
        inference, cache = (_TYPES.get(kind, kind) for kind in kinds)
        return f"computes in {inference}, with keys and values in {cache}"

    def begin(self, batch: int) -> None:
        """Start a batch with empty states."""
        if batch != len(self.mask_BK):
            self._requests = [compiled.create_infer_request() for compiled in self._compiled]
        for request in self._requests:
            request.reset_state()
        self.mask_BK = np.zeros((batch, 0), np.int64)

    def run(self, ids_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
        """Append tokens; returns float32 logits [B, T, V], or [B, 1, V] from a pruned graph. Padding is on the left.

        Raises: as `outputs`.
        """
        return np.asarray(self.outputs(ids_BT, valid_BT)["logits"], np.float32)

    def outputs(self, ids_BT: np.ndarray, valid_BT: np.ndarray) -> dict[str, np.ndarray]:
        """Append tokens; returns all outputs by name.

        Raises:
            NblError: a token is not in the vocabulary, or OpenVINO fails.
        """
        check_ids(ids_BT, self._vocab_size, self.directory)
        mask = np.concatenate([self.mask_BK, valid_BT], 1)
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids_BT.shape[1] :]
        feeds = dict(zip(_INPUTS, (ids_BT, mask, positions, np.arange(len(ids_BT), dtype=np.int32)), strict=True))
        try:
            found = self._infer(feeds)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-200:]
            raise NblError(f"{self.directory} failed on a chunk of {ids_BT.shape[1]} tokens: {reason}") from error
        self.mask_BK = mask
        return found

    def _infer(self, known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the parts in order."""
        for place, (request, names) in enumerate(zip(self._requests, self._names, strict=True)):
            known |= self.between(place, known)
            found = request.infer({name: known[name] for name in names & known.keys()}, share_inputs=False)
            known |= {name: np.array(value) for port, value in found.items() for name in port.get_names()}
        return known

    def cut(self, length: int) -> None:
        """Drop everything behind the first `length` tokens, padding included."""
        if length < self.mask_BK.shape[1]:
            cut = {name: np.ascontiguousarray(state[:, :, :length]) for name, state in self.states().items()}
            self.put_states(cut, self.mask_BK[:, :length])

    def states(self) -> dict[str, np.ndarray]:
        """Copies of the states by name; codes of 8 bits come as floats."""
        found = (state for request in self._requests for state in request.query_state())
        return {state.name: np.array(state.state.data) for state in found}

    def put_states(self, states: Mapping[str, np.ndarray], mask_BK: np.ndarray) -> None:
        """Go back to states and mask of the same batch."""
        if not mask_BK.shape[1]:
            self.begin(len(mask_BK))
            return
        tensor = load_openvino().Tensor
        for state in (state for request in self._requests for state in request.query_state()):
            state.state = tensor(states[state.name])
        self.mask_BK = mask_BK

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values as OpenVINO hands them out; codes of 8 bits are handed out as floats."""
        return sum(int(s.state.get_byte_size()) for request in self._requests for s in request.query_state())

    def close(self) -> None:
        """Free the model and its states."""
        del self._requests, self._compiled


def _contract(model: Any, path: Path) -> GraphContract:
    """Inputs, states as if they were inputs, and outputs.

    Raises:
        CorruptError: there is no input input_ids or no output logits.
    """
    inputs = [_info(port) for port in model.inputs]
    outputs = [_info(port) for port in model.outputs]
    if not any(i.name == "input_ids" for i in inputs) or not any(o.name == "logits" for o in outputs):
        raise CorruptError(f"{path} is no decoder with an input input_ids and an output logits")
    states = states_of(model)
    caches = [
        TensorInfo(f"past_key_values.{layer}.{part}", "float32", ("batch", s.heads, "tokens", s.head_size))
        for layer, pair in states.items()
        for part, s in zip(("key", "value"), pair, strict=True)
    ]
    return GraphContract((*inputs, *caches), tuple(outputs), tuple(states))


def _info(port: Any) -> TensorInfo:
    dims = tuple(d.get_length() if d.is_static else "?" for d in port.get_partial_shape())
    return TensorInfo(port.get_any_name(), port.get_element_type().to_string(), dims)


class IrDecoder(Session):
    """Runs batches of rows of different lengths, with the interface of `graph.decoder.OnnxDecoder`.

    Rows come padded on the right and run padded on the left, as transformers and OpenVINO GenAI pad a batch. So the
    last column of a pruned graph is each row's last token.
    """

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns float32 logits [B, T, V], or [B, 1, V] of each row's last token (pruned graph).

        Args:
            ids_BT: token ids.
            valid_BT: 1 for tokens, 0 for padding on the right; only a first chunk may be padded.
        """
        valid = np.ones_like(ids_BT) if valid_BT is None else valid_BT
        shifts = ids_BT.shape[1] - valid.sum(1)
        logits = self.run(_rolled(ids_BT, shifts), _rolled(valid, shifts).astype(np.int64))
        return _rolled(logits, -shifts) if logits.shape[1] == ids_BT.shape[1] else logits

    def mark(self) -> Any:
        """The state of the running batch, for `rewind`; copies the caches."""
        return self.states(), self.mask_BK

    def rewind(self, mark: Any) -> None:
        """Go back to the state `mark` of the same batch."""
        self.put_states(*mark)

    @property
    def cache_length(self) -> int:
        """Tokens that the states of the running batch hold, padding included."""
        return int(self.mask_BK.shape[1])


def _rolled(rows: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Rows moved along axis 1, each by its own number of places."""
    if not shifts.any():
        return rows
    return np.stack([np.roll(row, int(shift), 0) for row, shift in zip(rows, shifts, strict=True)])
