"""A model larger than memory: the bits of the model in memory, with one block's weights at a time."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear.greedy import Judge
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.losses import PartialReplacement
from nbl_export.methods.predicted_kv.sums import own_map
from nbl_export.model import mapped
from nbl_export.model.mapped import mapped_model

from ..tiny import EVERY, LAYERS, VOCAB, cases, random_map

Checkpoint = Callable[[str], Path]
IDS = torch.randint(2, VOCAB, (4, 40), generator=torch.Generator().manual_seed(3))
SETS: dict[str, Collection[int]] = {"none": (), "low": (0,), "top": (2, 1), "two": (0, 2)}


def small_map(layer: int) -> Linear:
    found = random_map(layer)
    return Linear(found.weight * 0.1 * (layer + 1), found.bias * 0.1)


MAPS: dict[int, Mixer] = {i: small_map(i) for i in range(LAYERS)}


def quiet(_done: int, _total: int) -> None:
    pass


def both(
    directory: Path, scratch: Path, tap: str = "residual", bf16_matmul: bool = False, maps: Any = None
) -> tuple[PartialReplacement, PartialReplacement]:
    """The model in memory, and the mapped model."""
    maps, model = maps or MAPS, mapped_model(directory, head=True)
    whole = PartialReplacement(load_model(directory), maps, tap, bf16_matmul=bf16_matmul)
    return whole, PartialReplacement(model, maps, tap, bf16_matmul=bf16_matmul, scratch=scratch)


@pytest.mark.parametrize("architecture", cases(EVERY))
def test_logits_and_losses_are_those_of_the_whole_model(
    architecture: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """To the last bit. Of each window, for sets that share layers, with and without the norm before attention."""
    directory, tap = checkpoint(architecture), "residual" if architecture in ("olmo2", "llama") else "normed"
    with torch.inference_mode():
        assert torch.equal(mapped_model(directory)(IDS).logits, load_model(directory)(IDS).logits)
    expected, found = (model.window_losses(IDS, SETS) for model in both(directory, tmp_path, tap))
    assert found == expected and len({losses[0].nbl_sum for losses in found.values()}) == len(SETS)


@pytest.mark.parametrize("bf16_matmul", [False, True])
def test_effects_are_those_of_the_whole_model_and_kept_states_leave_no_file(
    bf16_matmul: bool, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Any] = []
    memmap = mapped.np.memmap

    def noted(file: Any, *given: Any, **named: Any) -> Any:
        files.append(file)
        return memmap(file, *given, **named)

    monkeypatch.setattr(mapped.np, "memmap", noted)
    alone = [
        Judge(model, [IDS]).alone(quiet) for model in both(checkpoint("gemma3"), tmp_path, bf16_matmul=bf16_matmul)
    ]
    for expected, found in zip(*(vars(each).values() for each in alone), strict=True):
        assert torch.equal(found, expected)
    assert len(files) == LAYERS and not list(tmp_path.iterdir())


def test_other_mixers_begin_at_the_states_of_the_same_original(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As in the choice of kinds: the original runs without mixers, and once."""
    directory, others = checkpoint("llama"), {i: random_map(i) for i in (1, 2)}
    model = load_model(directory)
    passes: list[Any] = []
    model.get_decoder().layers[0].register_forward_hook(lambda *given: passes.append(given))
    first, second = PartialReplacement(model, {}, "residual"), PartialReplacement(model, others, "residual")
    runs = first.runs(IDS, again=True)
    found = []
    for shared in (runs.of(second), runs.of(second)):
        found.append([*shared.last([(1,), (1, 2)]), shared.original])
    assert len(passes) == 1
    fresh = PartialReplacement(model, others, "residual").runs(IDS, again=False)
    for expected, *seen in zip([*fresh.last([(1,), (1, 2)]), fresh.original], *found, strict=True):
        for one in seen:
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)


def test_a_map_that_reads_another_layer_is_computed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("llama")
    map_2 = own_map(load_model(directory), 2, 1, 8)
    expected, found = (model.window_losses(IDS, {"one": (2,)}) for model in both(directory, tmp_path, maps={2: map_2}))
    assert found == expected


def test_one_block_is_in_memory_and_a_pass_reads_each_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = mapped_model(checkpoint("llama")), list[str]()
    get = mapped.WeightReader._get

    def watch(self: Any, name: str, device: torch.device) -> torch.Tensor:
        full = [n.removeprefix("model.") for n, p in model.named_parameters() if p.device.type != "meta"]
        read.append(name)
        assert {_block(n) for n in full} <= {_block(name)}, "two blocks have weights"
        return get(self, name, device)

    monkeypatch.setattr(mapped.WeightReader, "_get", watch)
    with torch.no_grad():
        model(IDS)
    stored = [name.removeprefix("model.") for name, _ in load_model(checkpoint("llama")).named_parameters()]
    tied = [] if "lm_head.weight" in stored else ["embed_tokens.weight"]  # the head reads it again
    assert sorted(read) == sorted([*stored, *tied])
    assert all(p.device.type == "meta" for p in model.parameters()) and model.device.type == "cpu"


def _block(name: str) -> str:
    return ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])


def test_a_disk_without_room_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = both(checkpoint("llama"), tmp_path)
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 10))
    with pytest.raises(OSError, match="No space left") as caught:
        model.runs(IDS, again=True).original  # noqa: B018
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("lacking", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("narrowed", [False, True])
def test_a_weight_that_is_missing_or_has_another_shape_is_named(
    narrowed: bool, lacking: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    directory = Path(shutil.copytree(checkpoint("mistral"), tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    weight = tensors.pop(lacking)
    if narrowed:
        tensors[lacking] = weight[1:].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    model = mapped_model(directory)
    with pytest.raises(NblError, match="has shape" if narrowed else "lacks the weight") as caught, torch.no_grad():
        model(IDS)
    assert lacking.removeprefix("model.") in str(caught.value)
    assert all(p.device.type == "meta" for p in model.parameters())
