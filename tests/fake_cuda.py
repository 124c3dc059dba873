"""A CUDA device that is not there: tensors on it compute on the CPU, and refuse what a GPU refuses.

x.to("cuda") ─► OnGpu(x): says that it is on cuda:0, and holds a CPU tensor
OnGpu + OnGpu ─► OnGpu            the CPU computes it
OnGpu + CPU tensor ─► RuntimeError, as CUDA raises; not if the CPU tensor is one number, or an index
OnGpu.numpy() ─► TypeError, as torch raises
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

__all__ = ["GPU", "OnGpu", "fake_cuda"]

GPU = torch.device("meta")  # torch lets such a tensor say that it is there, and take gradients
_CPU = torch.device("cpu")
_MIXED = {  # operators that take tensors of both devices
    torch.ops.aten.copy_.default,
    torch.ops.aten._to_copy.default,
}
_INDEXED = {  # self may be on a GPU, and the indices on the CPU
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
}


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU,
        )  # fmt: skip
        made.held = held
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnGpu({self.held})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operator, args, kwargs or {})


def _compute(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = tree_flatten((args, kwargs))[0]
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    asked = next((d for d in given if isinstance(d, torch.device)), None)
    assert all(isinstance(t, OnGpu) or t.device == _CPU for t in tensors), f"{operator}: a tensor without values"
    on_gpu = any(isinstance(t, OnGpu) for t in tensors)
    if on_gpu and operator not in _MIXED:
        checked = [args[0]] if operator in _INDEXED else tensors
        if operator in _INDEXED and not isinstance(args[0], OnGpu):
            raise RuntimeError(f"{operator}: indices should be either on cpu or on the same device as the tensor")
        if any(not isinstance(t, OnGpu) and t.dim() for t in checked):
            raise RuntimeError(f"{operator}: Expected all tensors to be on the same device, but found a GPU and cpu")
    if operator is torch.ops.aten._fused_sdp_choice.default:
        return 0  # plain products: the fused operators have no CPU kernel of their GPU form
    to_gpu = on_gpu if asked is None else asked == GPU
    if operator is torch.ops.aten.copy_.default:
        to_gpu = isinstance(args[0], OnGpu)
    if kwargs.get("generator") is not None and to_gpu:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    held = lambda t: t.held if isinstance(t, OnGpu) else _CPU if isinstance(t, torch.device) else t  # noqa: E731
    found = operator(*tree_map(held, args), **tree_map(held, kwargs))
    if asked is not None and any(held(t) is found and isinstance(t, OnGpu) != to_gpu for t in tensors):
        found = found.clone()  # another device has other memory
    known = {id(t.held): t for t in tensors if isinstance(t, OnGpu)}
    if not to_gpu:
        return found
    return tree_map(lambda t: known[id(t)] if id(t) in known else OnGpu(t) if isinstance(t, torch.Tensor) else t, found)


class _Dispatch(TorchDispatchMode):
    """Makes new tensors on the GPU."""

    def __torch_dispatch__(self, operator: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(operator, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What reaches no dispatch mode: torch.tensor, lists as indices, tolist."""

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            args = args[0], tuple(torch.tensor(part) if isinstance(part, list) else part for part in args[1])
        if function is torch.Tensor.tolist:
            return function(args[0].cpu())
        return function(*args, **kwargs)


@contextmanager
def fake_cuda(free: int = 80 << 30) -> Iterator[SimpleNamespace]:
    """Within: torch sees one GPU with so many free bytes. The value notes the devices of products."""
    from nbl_export.methods.checkpoint import load
    from nbl_export.model import bfloat16, device, mapped

    seen = SimpleNamespace(free=free, products=set())

    def bf16_autocast(where: torch.device, enabled: bool) -> torch.autocast:
        seen.products.add(where)
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (seen.free, 80 << 30))
        patch.setattr(torch.cuda, "get_device_name", lambda *_: "Fake GPU")
        patch.setattr(device, "_gpu", lambda: GPU)
        patch.setattr(bfloat16, "has_native_bf16", lambda _: False)
        patch.setattr(bfloat16, "bf16_autocast", bf16_autocast)
        patch.setattr(load, "load_model", _without_modes(load.load_model))  # it makes real meta tensors
        patch.setattr(mapped, "mapped_model", _without_modes(mapped.mapped_model))
        with _Functions(), _Dispatch():
            yield seen


def _without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function in a thread of its own, which has none of torch's modes."""

    def run(*given: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, *given).result()

    return run
