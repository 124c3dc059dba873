"""The only module that calls transformers on a model: none of its code runs, no pickle is read, nothing is fetched.

A model is a checkpoint directory or a GGUF file. What lies beside a GGUF file does not belong to the model.
transformers would read settings and templates there, so it gets an empty directory and the file's absolute path.

A GGUF file is opened once. Each reader takes seconds, because it makes an array for each word of the vocabulary.
transformers makes one reader for the configuration, one for the weights and one for the tokenizer, and one map of
tensor names for each submodule. `shared` gives it the same reader and the same map each time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.files import safetensors_tensors
from nbl_export.graph.gguf_header import read_header
from nbl_export.graph.names import MANIFEST
from nbl_export.model.checkpoint.weights import INDEX, WEIGHTS, weight_files
from nbl_export.trust.model_settings import CONFIG_BYTES, check_checkpoint, read_object

__all__ = [
    "check_weights",
    "config_of",
    "explained",
    "model_of",
    "model_with",
    "quiet_transformers",
    "read_config",
    "tokenizer_of",
]


def quiet_transformers() -> None:
    """Turn off progress bars and advice of transformers; the stages report progress themselves."""
    os.environ["TQDM_DISABLE"] = "1"
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError("transformers", "export", "reading a checkpoint") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Within: whatever a library raises on a damaged model becomes one sentence.

    Raises:
        NblError: what is wrong, and the library's message, unless that refers to a report that is not shown.
    """
    try:
        yield
    except (MemoryError, NblError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if "ignore_mismatched_sizes" in str(error):
            reason = "weights do not have the shapes that config.json states; fetch the model again"
        raise NblError(f"{what}: {reason}") from error


@contextlib.contextmanager
def _checked(model: Path) -> Iterator[dict[str, Any]]:
    """Arguments with which transformers finds a model and nothing else. Refuses an unsafe folder."""
    quiet_transformers()
    if not model.is_file():
        check_checkpoint(model)
        yield {"pretrained_model_name_or_path": str(model)}
        return
    with tempfile.TemporaryDirectory(prefix="nbl-export-") as empty, shared():
        yield {"pretrained_model_name_or_path": empty, "gguf_file": str(model.absolute())}


def config_of(model: Path) -> Any:
    """The configuration of a checkpoint or of a GGUF file.

    transformers makes rotary tables by its sizes before it compares a weight. So no size is larger than what is there.

    Raises:
        NblError: the folder is unsafe, or a size is beyond the weights. Whatever transformers raises on a damaged
            model.
    """
    with _checked(model) as given:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(trust_remote_code=False, local_files_only=True, **given)
    widest = _widest(model)
    for name, size in vars(config).items():
        if widest is not None and _WIDTH.search(name) and isinstance(size, int | float) and not size <= widest:
            raise NblError(f"{model} states {name} {size}, and its widest weight has {widest}; fetch the model again")
    return config


_WIDTH = re.compile("_(?:size|dim|heads)$")  # in names of sizes that some weight has


def _widest(model: Path) -> int | None:
    """The largest size of a tensor that holds numbers; None for a folder without weights."""
    if model.is_file():
        shapes: Iterable[Any] = (tensor.shape.tolist() for tensor in reader(model).tensors)
    elif not any((model / name).exists() for name in (INDEX, WEIGHTS)):
        return None
    else:
        shapes = (facts["shape"] for file in weight_files(model) for facts in safetensors_tensors(file).values())
    return max((max(shape) for shape in shapes if shape and 0 not in shape), default=0)


def check_weights(model: Path) -> None:
    """Compare names and shapes of the weights that the configuration asks for with those in the files.

    The model is built on torch's meta device, so no weight is allocated and none is read. Weights of a quantised
    checkpoint have other names; they are left to their reader. Files that have not changed are compared once.

    Raises:
        NblError: the folder is unsafe, or transformers would not load it.
    """
    files = [file for file in (sorted(model.iterdir()) if model.is_dir() else [model]) if file.exists()]
    with explained(f"{model} cannot be loaded by transformers"):
        _check_weights(model, tuple((f.name, s.st_ino, s.st_size, s.st_mtime_ns) for f in files for s in [f.stat()]))


@functools.lru_cache(maxsize=16)
def _check_weights(model: Path, _files: tuple[tuple[Any, ...], ...]) -> None:
    config = config_of(model)
    if model.is_file():
        _check_gguf(model, config)
    elif getattr(config, "quantization_config", None) is None:
        _load(model, device_map="meta")  # the names are matched as in a real load


def model_of(model: Path, dtype: Any = None) -> Any:
    """The model.

    Args:
        dtype: torch's type of its weights; default: float32.

    Raises:
        NblError: the folder is unsafe or quantised, or lacks a weight. Whatever transformers raises on a damaged model.
    """
    if model.is_dir() and getattr(config_of(model), "quantization_config", None) is not None:
        raise NblError(f"{model} is quantised; give the original as --model, this one as --quantized-model")
    check_weights(model)
    return _load(model, dtype)


def _load(model: Path, dtype: Any = None, **more: Any) -> Any:
    with _checked(model) as given:
        import torch
        from transformers import AutoModelForCausalLM

        loaded, report = AutoModelForCausalLM.from_pretrained(
            dtype=dtype or torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            use_kernels=False,  # compiled code of the hub, which transformers 5.25 takes unless told not to
            local_files_only=True,
            **given,
            **more,
        )
    _refuse_missing(model, report["missing_keys"])
    return loaded


def _refuse_missing(where: Path, missing: Iterable[str]) -> None:
    names = sorted(missing)
    if names:
        raise NblError(f"{where} lacks the weights {names[0]} and {len(names) - 1} more; fetch the model again")


def _check_gguf(file: Path, config: Any) -> None:
    """Compare a model's parameters with the tensors of a GGUF file, by transformers' map of their names."""
    import torch
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    with torch.device("meta"):
        model = model_with(config)
    with shared():
        names = get_gguf_hf_weights_map(model, TensorProcessor())
    shapes = {names[name]: shape for name, shape in read_header(file).shapes.items() if name in names}
    parameters = {name: tuple(value.shape) for name, value in model.named_parameters()}  # a tied one once
    _refuse_missing(file, parameters.keys() - shapes.keys())
    other = [name for name, shape in parameters.items() if shapes[name] != shape]
    if other:
        found = list(shapes[other[0]])
        stated = list(parameters[other[0]])
        raise NblError(f"{file} has {other[0]} in shape {found}, and its keys state {stated}; fetch the model again")


def model_with(config: Any) -> Any:
    """A float32 model of a configuration, with the weights of no checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


def tokenizer_of(model: Path) -> Any:
    """The tokenizer of a checkpoint or of a GGUF file.

    Raises:
        NblError: the folder is unsafe. Whatever transformers raises on a damaged model.
    """
    with _checked(model) as given:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(trust_remote_code=False, local_files_only=True, **given)


def reader(path: str | os.PathLike[str], _mode: str = "r") -> Any:
    """A `gguf.GGUFReader` of a file; the same one until the file changes or `forget` is called.

    Raises:
        CorruptError: the head of the file is damaged, or states more than any model has.
    """
    facts = os.stat(path)
    return _reader(os.path.abspath(path), facts.st_size, facts.st_mtime_ns)  # transformers gets no relative path


def forget() -> None:
    """Release the reader and the map: for a vocabulary of 150,000 words it takes hundreds of megabytes."""
    _reader.cache_clear()
    _name_map.cache_clear()


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Within: whoever asks the gguf package for a reader gets the one of `reader`."""
    import gguf

    kept = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = reader
    gguf.get_tensor_name_map = _name_map
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = kept


@functools.lru_cache(maxsize=1)
def _reader(path: str, _size: int, _changed_ns: int) -> Any:
    import numpy as np
    from gguf.gguf_reader import GGUFReader

    class PlainReader(GGUFReader):
        """Makes plain arrays of the mapped file, which take less than half the memory and time of `np.memmap`."""

        def _get(self, *place: Any, **how: Any) -> Any:
            self.data: Any = np.asarray(self.data)
            return super()._get(*place, **how)

    read_header(Path(path))
    return PlainReader(path)


@functools.lru_cache(maxsize=1)
def _name_map(architecture: Any, layers: int) -> Any:
    from gguf.tensor_mapping import get_tensor_name_map

    return get_tensor_name_map(architecture, layers)


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a checkpoint's config.json.

    Raises:
        NblError: it is missing, or cannot be read.
    """
    path = directory / "config.json"
    if not path.is_file():
        if (directory / MANIFEST).is_file():
            raise NblError(f"{directory} is a run directory, not a model; give the model that the run was made from")
        raise NblError(f"{directory} is not a model directory: it has no config.json")
    return read_object(path, CONFIG_BYTES)
