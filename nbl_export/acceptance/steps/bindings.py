"""The step that looks at inputs and outputs: types, places, and caches that share their memory."""

from __future__ import annotations

from nbl_export.acceptance.parts import Opened, Target
from nbl_export.acceptance.verdict import (
    DEFECT,
    LIBRARY,
    PLAN,
    RUNNER,
    Failed,
    Notes,
)
from nbl_export.targets.tensorrt.examine.examined import Tensor

__all__ = ["bindings"]

_PAST, _PRESENT = "past_key_values.", "present."


def bindings(target: Target, notes: Notes) -> None:
    """Every input and output is where the runner has it, and each cache is read and written in one place."""
    with target.opened(notes, graphs=False) as sessions:
        for opened in sessions:
            notes.doing(f"looking at the inputs and outputs of {opened.subject}")
            tensors = {tensor.name: tensor for tensor in opened.inside.tensors()}
            _require_recorded(opened, tensors)
            _require_on_device(opened, tensors)
            opened.decoder.begin(1)
            _require_bound(opened)
            notes.see(f"{opened.subject}: inputs and outputs", len(tensors))
            notes.see(f"{opened.subject}: caches in one place", len(opened.inside.caches))


def _require_recorded(opened: Opened, tensors: dict[str, Tensor]) -> None:
    """The engine has the inputs and outputs of engine.json, of the same types."""
    record = opened.record
    recorded = {info.name: info.dtype for info in (*record.inputs, *record.outputs)}
    if missing := sorted(recorded.keys() ^ tensors.keys()):
        where = "the engine" if missing[0] in recorded else "engine.json"
        raise Failed(f"{opened.subject}: {missing[0]} is missing in {where}", PLAN)
    for name, tensor in tensors.items():
        if tensor.dtype != recorded[name]:
            raise Failed(f"{opened.subject}: {name} is {tensor.dtype}, engine.json says {recorded[name]}", PLAN)


def _require_on_device(opened: Opened, tensors: dict[str, Tensor]) -> None:
    """No tensor is wanted in the processor's memory, and each present is the alias of its past."""
    for name, tensor in tensors.items():
        if tensor.host:
            raise Failed(
                f"{opened.subject}: the library wants {name} in the memory of the processor, the runner puts it on "
                "the GPU", LIBRARY,
            )  # fmt: skip
        expected = name.replace(_PRESENT, _PAST, 1) if name.startswith(_PRESENT) else ""
        if tensor.aliased not in ("", expected):
            raise Failed(f"{opened.subject}: {name} is an alias of {tensor.aliased}, not of {expected or 'none'}", PLAN)


def _require_bound(opened: Opened) -> None:
    """In each context, present and past have one address, and both contexts have the same."""
    contexts = opened.inside.addresses()
    for index, addresses in enumerate(contexts):
        for name, address in addresses.items():
            if not address:
                raise Failed(f"{opened.subject}: {name} has no address in context {index}", RUNNER, DEFECT)
            if name.startswith(_PRESENT) and address != addresses[name.replace(_PRESENT, _PAST, 1)]:
                raise Failed(
                    f"{opened.subject}: {name} and its past have different addresses in context {index}, so the cache "
                    "is not updated", RUNNER, DEFECT,
                )  # fmt: skip
            if address != contexts[0][name]:
                raise Failed(f"{opened.subject}: {name} has another address in context {index}", RUNNER, DEFECT)
