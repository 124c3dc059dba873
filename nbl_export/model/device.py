"""Where torch computes: the CPU, or one CUDA GPU (`--device`). No GPU has run this; tests stand in for one.

    weights, and what a stage adds to them, fit into the GPU's free memory ─► the GPU
    one layer fits                                                         ─► calibration sends layers through the GPU
    nothing fits, or there is no GPU                                       ─► the CPU

Every tensor that meets the model goes to the model's device; results come back to the CPU.
Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nbl_export.errors import NblError

if TYPE_CHECKING:
    import torch

__all__ = ["choose_and_describe", "choose_device", "describe_device", "free_bytes", "guarded", "is_gpu"]

_SHARE = 0.6  # of free memory, for weights and sums in float32; the rest is for bfloat16 copies, states and logits


def choose_device(option: str, needed_bytes: int) -> torch.device:
    """The device for work of a size, for a value of `--device` (`options.options.DEVICES`).

    Raises:
        NblError: "cuda" is asked for, and torch sees no GPU.
    """
    import torch

    if option == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        fits = needed_bytes <= _SHARE * free_bytes()
        return _gpu() if fits else torch.device("cpu")
    if option == "cuda":
        why = (
            "this torch is built without CUDA"
            if torch.version.cuda is None
            else "torch sees no GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
        )
        raise NblError(f"--device cuda: {why}; use --device cpu")
    return torch.device("cpu")


def choose_and_describe(option: str, needed_bytes: int, say: Callable[[str], None]) -> torch.device:
    """As `choose_device`, for the weights of a model. A machine with a GPU says where torch computes."""
    found = choose_device(option, needed_bytes)
    if is_gpu(found):
        say(f"  torch computes on {describe_device(found)}")
    elif option != "cpu" and (free := free_bytes()):
        sizes = f"{needed_bytes / 2**30:.1f} GiB in float32, and the GPU has {free / 2**30:.1f} GiB free"
        say(f"  the torch model is on the CPU: its weights are {sizes}")
    return found


def _gpu() -> torch.device:
    import torch

    return torch.device("cuda", torch.cuda.current_device())


def is_gpu(device: Any) -> bool:
    """Whether a device is a GPU."""
    return bool(device.type != "cpu")


def free_bytes() -> int:
    """Free memory of the GPU; 0 if torch sees none."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def describe_device(device: Any) -> str:
    """The device's name for people."""
    import torch

    return f"{torch.cuda.get_device_name(device)} (CUDA)" if is_gpu(device) else "CPU"


@contextlib.contextmanager
def guarded(work: str, *, by_engine: bool = False) -> Iterator[None]:
    """Within: a GPU that fails or is full ends the work with one sentence. Afterwards torch gives free memory back.

    Args:
        by_engine: whether an engine works, which `--device` does not move to the CPU.

    Raises:
        NblError: torch or an engine had an error of CUDA.
    """
    full = "run the command again with --device cpu"
    failed = "run the command again, or with --device cpu"
    if by_engine:
        full = "end other programs on it (nvidia-smi lists them), or use a shorter sequence or a smaller --precision"
        failed = "run the command again, and see nvidia-smi"
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[0] if str(error) else ""
        if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in said:
            raise NblError(f"{work}: the GPU has too little memory; finished stages stay, so {full}") from error
        if "CUDA error" in said or "CUDA driver error" in said:
            raise NblError(f"{work}: the GPU failed ({said}); finished stages stay, so {failed}") from error
        raise
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()  # for engines that run on the same GPU
