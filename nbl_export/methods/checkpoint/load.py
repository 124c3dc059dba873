"""Torch model, tokenizer and sizes of a checkpoint; its form in safetensors, which transformers and exporters read.

An NBL checkpoint already has replaced layers (`nbl-export convert`). As the model of a job it gives:

    config.json, nbl_replaced_layers and nbl_tap  ─►  the plan
    self_attn.* of the replaced layers            ─►  the maps
    all else, with attention weights of zeros     ─►  a stock checkpoint (`hf.restored`), which exporters read

An NBL checkpoint lacks the removed attention weights. So no map can be fitted, and quality loss against the original
cannot be measured. Speed can be measured, since zeros take as long as other weights.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, NblError
from nbl_export.files import read_json, scratch_in
from nbl_export.graph.names import CONVERTED
from nbl_export.methods import METHODS
from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.source import Linearized, Source, log
from nbl_export.model.architectures import ARCHITECTURES, LINEARIZED, windows_of
from nbl_export.model.checkpoint import pretrained
from nbl_export.model.checkpoint.pretrained import (
    check_weights,
    config_of,
    explained,
    model_of,
    model_with,
    quiet_transformers,
    tokenizer_of,
)
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import Plan
from nbl_export.trust.model_settings import drop_code

__all__ = ["load_mapped", "load_maps", "load_model", "load_tokenizer", "materialise", "read_spec", "spec_of"]


_TENSOR = re.compile(r"(?:^|\.)layers\.(\d{1,9})\.self_attn\.(.+)$")


def read_spec(source: Source) -> DecoderSpec:
    """The decoder's sizes, read by optimum's normalized configs.

    Raises:
        NblError: its configuration contradicts itself.
    """
    quiet_transformers()
    _register(source)
    with explained(f"{source.name} has no usable decoder configuration"):
        config = config_of(source.gguf or source.directory)
        check_weights(source.gguf or source.directory)
        architecture = config.model_type.removeprefix(LINEARIZED if source.linearized else "")
        return spec_of(config, architecture)


def spec_of(config: Any, architecture: str) -> DecoderSpec:
    """The decoder's sizes of a configuration of transformers."""
    from optimum.utils import NormalizedTextConfigWithGQA

    normal = NormalizedTextConfigWithGQA(config)
    windows = windows_of(config)
    return DecoderSpec(
        architecture=architecture,
        num_layers=normal.num_layers,
        hidden_size=normal.hidden_size,
        num_heads=normal.num_attention_heads,
        num_kv_heads=normal.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or normal.hidden_size // normal.num_attention_heads,
        vocab_size=normal.vocab_size,
        max_positions=config.max_position_embeddings,
        sliding_window=next(filter(None, windows), None),
        full_layers=tuple(i for i, window in enumerate(windows) if window is None) if any(windows) else (),
    )


def _register(source: Source) -> None:
    """Register the classes of an NBL checkpoint with transformers."""
    if source.linearized is not None:
        import nbl_export.methods.checkpoint.hf_classes  # noqa: F401


def load_model(directory: Path) -> Any:
    """The torch model in float32, in evaluation mode, on the CPU.

    Raises:
        NblError: transformers cannot load the model, or it cannot be in memory.
    """
    from nbl_export.model.mapped import refuse_whole  # needs torch

    refuse_whole(directory, "this")
    return _loaded(directory)


def load_mapped(directory: Path) -> Any:
    """Like `load_model`, in the type of the stored weights if they all have one type. The weights stay in their files.

    Experts that are stored one by one take memory, and so do weights of several types. Such a model is in float32.
    """
    from nbl_export.model.mapped import stored_type

    experts = ARCHITECTURES[config_of(directory).model_type].experts
    dtype = None if experts else stored_type(directory)
    if dtype is None:
        return load_model(directory)
    model = _loaded(directory, dtype)
    _compute_buffers(model)
    return model


def _compute_buffers(model: Any) -> None:
    """Give computed buffers, such as the scale of an embedding, the values that they have in a float32 model."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        exact = model_with(copy.deepcopy(model.config))
    stored = model.state_dict().keys()
    for name, buffer in exact.named_buffers():
        if name not in stored:
            owner, _, field = name.rpartition(".")
            setattr(model.get_submodule(owner), field, buffer)


def _loaded(directory: Path, dtype: Any = None) -> Any:
    with explained(f"{directory} cannot be loaded by transformers"):
        return model_of(directory, dtype).eval()


_VOCABULARY = ("tokenizer.json", "*.model", "tekken.json", "vocab*")


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a checkpoint directory, or of a GGUF file.

    Raises:
        NblError: the directory has no tokenizer that transformers can load.
    """
    held = directory.is_file() or any(any(directory.glob(pattern)) for pattern in _VOCABULARY)
    if not held:  # transformers makes an empty one
        raise NblError(f"{directory} has no tokenizer ({', '.join(_VOCABULARY)}); put the model's own files there")
    with explained(f"{directory} has no usable tokenizer"):
        return tokenizer_of(directory)


def materialise(source: Source, target: Path) -> Path:
    """A directory with safetensors, config and tokenizer of a stock model.

    A GGUF or NBL checkpoint is converted into `target`; any other checkpoint is used in its own directory. `target` is
    renamed into place, so it is complete or absent. Later runs on the same model use `target` again, unless one of its
    files is missing or truncated.
    """
    if source.gguf is None and source.linearized is None:
        return source.directory
    try:
        if not _is_whole(target, source):
            _convert(source, target)
    finally:
        pretrained.forget()
    return target


def _convert(source: Source, target: Path) -> None:
    quiet_transformers()
    _register(source)
    origin = source.gguf or source.directory
    if target.exists() and not (target / CONVERTED).is_file():
        raise NblError(f"{target} is in the way of the converted model; move it")
    with scratch_in(target.parent) as scratch:
        made = scratch / "checkpoint"
        if source.gguf is not None:
            model, tokenizer = _dequantised(source.gguf)
        else:
            model, tokenizer = _restored(source.directory)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        drop_code(made)
        sizes = {f.name: f.stat().st_size for f in sorted(made.iterdir())}
        facts = {"fingerprint": source.fingerprint, "file": origin.name, "sizes": sizes}
        (made / CONVERTED).write_text(json.dumps(facts), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)


def _dequantised(gguf: Path) -> tuple[Any, Any]:
    from nbl_export.model.mapped import refuse_whole

    log.info("dequantising %s", gguf.name)
    refuse_whole(gguf, f"the conversion of {gguf.name} (safetensors need none)")
    model = _loaded(gguf)
    # transformers refuses to save a model that was loaded quantised; these weights are dequantised.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    return model, load_tokenizer(gguf)


def _restored(directory: Path) -> tuple[Any, Any]:
    from nbl_export.methods.checkpoint.hf_classes import restored

    log.info("writing the stock checkpoint of %s", directory.name)
    model = load_model(directory)
    with explained(f"{directory} cannot be loaded by transformers"):
        return restored(model), load_tokenizer(directory)


def _is_whole(target: Path, source: Source) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        facts = read_json(target / CONVERTED)
        same = facts["fingerprint"] == source.fingerprint
        return same and all((target / n).stat().st_size == size for n, size in facts["sizes"].items())
    return False


def load_maps(source: Any, num_layers: int) -> tuple[Plan, dict[int, Mixer]]:
    """Plan and maps of an NBL checkpoint. Maps, [D, D] and [D], are float32, whatever the stored type.

    Raises:
        CorruptError: the weights hold maps of other layers than config.json names.
    """
    from safetensors import safe_open

    replaced: Linearized = source.linearized
    kinds = dict(zip(replaced.layers, replaced.kinds, strict=True))
    found: dict[int, dict[str, Any]] = {}
    for file in source.weights:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                match = _TENSOR.search(name)
                if match and (int(match[1]) in kinds or match[2].startswith("linear.")):
                    found.setdefault(int(match[1]), {})[match[2]] = tensors.get_tensor(name).float().numpy()
    try:
        maps = {i: METHODS[kind].from_module(found.get(i, {})) for i, kind in kinds.items()}
    except KeyError:
        maps = {}
    if not maps or not found.keys() <= kinds.keys():
        raise CorruptError(
            f"{source.directory}: config.json names maps of layers {list(replaced.layers)}, the weights hold maps of "
            f"{sorted(found)}; fetch the model again"
        )
    kinds = dict(zip(replaced.layers, replaced.kinds, strict=True))
    plan = Plan.of(num_layers, kinds, replaced.tap, "given")
    return plan, maps
