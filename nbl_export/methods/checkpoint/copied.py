"""Writes an NBL checkpoint out of the original's files: no weight is loaded, and kept weights stay byte for byte.

model-00001-of-00002.safetensors ──► the same name     without the attention of replaced layers
model-00002-of-00002.safetensors ──┬► the same name
maps                             ──┘                   in float32
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import GenerationConfig

from nbl_export.files import safetensors_header, safetensors_tensors, write_json
from nbl_export.methods.applied import multiplier_of, stored_in
from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.hf_classes import empty_linearized
from nbl_export.model.checkpoint.pretrained import check_weights, config_of, tokenizer_of
from nbl_export.model.checkpoint.weights import INDEX, WEIGHTS, weight_files
from nbl_export.trust.model_settings import drop_code, read_object

__all__ = ["copy_linearized"]

_PART = 1 << 26  # bytes that are copied at once


def copy_linearized(checkpoint: Path, maps: Mapping[int, Mixer], tap: str, out: Path) -> bool:
    """Write an NBL checkpoint to `out`, which must not exist, with the tokenizer of `checkpoint`.

    Returns:
        whether it was written: a checkpoint can have other names than its model, and then has to be loaded.

    Raises:
        NblError: the model's architecture has no class here, or a file is damaged.
    """
    check_weights(checkpoint)
    config = config_of(checkpoint)
    model = empty_linearized(config, maps, tap)
    ours = {
        f"model.layers.{layer}.{stored_in(mixer)}.{name}": value.numpy()
        for layer, mixer in maps.items()
        for name, value in mixer.module(multiplier_of(config)).state_dict().items()
    }
    wanted = model.state_dict().keys() - ours.keys()
    places = {file: safetensors_tensors(file) for file in weight_files(checkpoint)}
    if (
        wanted
        - {name for tensors in places.values() for name in tensors}
        - set(getattr(model, "all_tied_weights_keys", {}))
    ):
        return False
    out.mkdir(parents=True)
    files: dict[str, str] = {}
    for file, tensors in places.items():
        kept = {name: facts for name, facts in tensors.items() if name in wanted}
        added = ours if file == list(places)[-1] else {}
        if kept or added:
            _write(out / file.name, file, kept, added)
            files |= dict.fromkeys([*kept, *added], file.name)
    if set(files.values()) != {WEIGHTS}:
        total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    _save_texts(model, checkpoint, out)
    return True


def _write(out: Path, source: Path, kept: Mapping[str, Any], added: Mapping[str, np.ndarray]) -> None:
    """Write a file with tensors of another file, and arrays in float32 behind them."""
    tensors = {name: (facts["dtype"], facts["shape"]) for name, facts in kept.items()}
    tensors |= {name: ("F32", array.shape) for name, array in added.items()}
    head, _ = safetensors_header(tensors, {"format": "pt"})
    with source.open("rb") as stream, out.open("wb") as target:
        target.write(head)
        for facts in kept.values():
            begin, end = facts["data_offsets"]
            stream.seek(begin)
            for start in range(begin, end, _PART):
                target.write(stream.read(min(_PART, end - start)))
        for array in added.values():
            target.write(np.ascontiguousarray(array, "<f4").tobytes())


def _save_texts(model: Any, checkpoint: Path, out: Path) -> None:
    """Write the configurations and the tokenizer."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    file = checkpoint / "generation_config.json"
    if file.is_file():
        generation = GenerationConfig.from_dict(read_object(file))
    else:
        generation = GenerationConfig.from_model_config(config)
    generation.save_pretrained(out)
    tokenizer_of(checkpoint).save_pretrained(out)
    drop_code(out)
