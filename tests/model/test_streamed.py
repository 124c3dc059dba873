"""One layer in memory at a time: the same hidden states, losses and orders as with the whole model in memory."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.mixers.linear import Linear
from nbl_export.model import one_layer, streamed
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.cut import own_map
from nbl_export.model.mixes import Mixes
from nbl_export.model.streamed import StreamedModel
from nbl_export.model.switched import SwitchedModel
from nbl_export.plan.greedy import GreedyOrder, Judge, Search

from ..tiny import EVERY, LAYERS, VOCAB, cases, random_map

Checkpoint = Callable[[str], Path]
IDS = torch.randint(2, VOCAB, (4, 40), generator=torch.Generator().manual_seed(3))
SETS: dict[str, Collection[int]] = {"none": (), "low": (0,), "top": (2, 1), "two": (0, 2), "top again": (1, 2)}


def small_map(layer: int) -> Linear:
    found = random_map(layer)
    return Linear(found.weight * 0.1 * (layer + 1), found.bias * 0.1)


MAPS = {i: small_map(i) for i in range(LAYERS)}


def quiet(_done: int, _total: int) -> None:
    pass


@pytest.fixture(autouse=True)
def several_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "_BATCH_TOKENS", 80)


@pytest.fixture
def in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "available_bytes", lambda: 0)


def both(directory: Path, scratch: Path, tap: str = "residual", narrow: bool = False) -> tuple[Mixes, Mixes]:
    """The model in memory, and the same model layer by layer."""
    whole = SwitchedModel(load_model(directory), MAPS, tap, narrow=narrow)
    return whole, StreamedModel(directory, MAPS, tap, scratch, narrow=narrow)


@pytest.mark.parametrize("architecture", cases(EVERY))
def test_losses_are_those_of_the_whole_model(architecture: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of each window, for sets that share layers, with and without the norm before attention."""
    tap = "residual" if architecture in ("olmo2", "llama") else "normed"
    whole, layers = both(checkpoint(architecture), tmp_path, tap)
    expected, found = (model.window_losses(IDS, SETS) for model in (whole, layers))
    for name in SETS:
        for one, other in zip(expected[name], found[name], strict=True):
            assert other.positions == one.positions
            assert other.kl_sum == pytest.approx(one.kl_sum, rel=1e-3, abs=1e-6)
            assert (other.original_sum, other.nbl_sum) == pytest.approx((one.original_sum, one.nbl_sum), rel=1e-5)
    assert found["top"] == found["top again"] != found["two"]


@pytest.mark.parametrize("saving", [None, lambda gone: 0.1 * len(gone) + 0.2 * (LAYERS - 1 in gone)])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_order_is_that_of_the_whole_model(
    architecture: str, saving: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    found = []
    for model in both(checkpoint(architecture), tmp_path):
        search = Search(Judge(model, [IDS[:2], IDS[2:]]), GreedyOrder(), saving, quiet)
        search.extend(LAYERS - 1)
        found.append((search.order, search.extrapolate([LAYERS]).beyond[0]))
    (expected, last), (order, end) = found
    for one, other in zip((*expected.steps, last), (*order.steps, end), strict=True):
        assert other.layers == one.layers
        assert other.kl == pytest.approx(one.kl, rel=1e-3) and other.rises == pytest.approx(one.rises, rel=1e-3)


def test_products_in_bfloat16_give_nearly_the_same_effects(checkpoint: Checkpoint, tmp_path: Path) -> None:
    narrow, layers = both(checkpoint("llama"), tmp_path, narrow=True)
    wide = StreamedModel(checkpoint("llama"), MAPS, "residual", tmp_path)
    expected, found, exact = (Judge(m, [IDS]).alone(quiet).kl_NK.mean(0) for m in (narrow, layers, wide))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert not torch.allclose(found, exact, rtol=1e-4), "products were not in bfloat16"


def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A list that gets each layer that is loaded, and how many others have weights then; the head is number -1."""
    before: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    loaded: list[tuple[int, int]] = []
    fill = one_layer.WeightReader.fill

    def watch(self: Any, module: torch.nn.Module, renamed: Callable[[str], str]) -> None:
        names = [renamed(name) for name, _ in module.named_parameters()]
        numbers = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
        assert len(numbers) <= 1
        others = [m for m in before if any(p.device.type != "meta" for p in m.parameters())]
        loaded.append((min(numbers, default=-1), len(others)))
        before.add(module)
        fill(self, module, renamed)

    monkeypatch.setattr(one_layer.WeightReader, "fill", watch)
    return loaded


def test_one_layer_is_in_memory_and_a_pass_reads_each_once(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = entered(monkeypatch)
    model = StreamedModel(checkpoint("llama"), MAPS, "residual", tmp_path)
    judge = Judge(model, [IDS])
    judge.alone(quiet)
    assert [layer for layer, _ in loaded] == [0, 1, 2, -1]  # then the head
    judge.together((1, 2))
    assert [layer for layer, _ in loaded[4:]] == [1, 2, -1]  # the original is known up to layer 1
    model.window_losses(IDS, SETS)
    assert [layer for layer, _ in loaded[7:]] == [0, 1, 2, -1]  # all sets in one pass
    assert {others for _, others in loaded} == {0}


def test_mixes_run_only_the_layers_in_which_they_differ(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    runs: list[Any] = []
    run = StreamedModel._run

    def count(*given: Any) -> None:
        runs.append(given)
        run(*given)

    monkeypatch.setattr(StreamedModel, "_run", count)
    model = StreamedModel(checkpoint("llama"), MAPS, "residual", tmp_path)
    seen = model.runs(IDS, again=True)
    alone = list(seen.last([(i,) for i in range(LAYERS)], lambda done, total: steps.append((done, total))))
    assert len(runs) == 2 + 3 + 4 and steps == [(2, 9), (5, 9), (9, 9)]
    list(seen.last([(1,), (1, 2)]))
    assert len(runs) == 9 + 1 + 2  # layer 1 once for both
    list(seen.last([(), (2,)]))
    assert len(runs) == 12 + 1
    for layer, before in enumerate(alone):  # passes change nothing that later passes begin with
        torch.testing.assert_close(next(seen.last([(layer,)])), before)


def test_other_mixers_begin_at_the_states_of_the_same_original(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As in the choice of kinds: the original runs without mixers, and once."""
    directory, others = checkpoint("llama"), {i: random_map(i) for i in (1, 2)}
    model = load_model(directory)
    passes: list[Any] = []
    model.get_decoder().layers[0].register_forward_hook(lambda *given: passes.append(given))
    whole = SwitchedModel(model, {}, "residual"), SwitchedModel(model, others, "residual")
    layers = StreamedModel(directory, {}, "residual", tmp_path), StreamedModel(directory, others, "residual", tmp_path)
    found = {}
    for name, (first, second) in {"whole": whole, "layers": layers}.items():
        runs = first.runs(IDS, again=True)
        for shared in (runs.of(second), runs.of(second)):
            found[name] = [*shared.last([(1,), (1, 2)]), shared.original]
    assert len(passes) == 1
    fresh = SwitchedModel(model, others, "residual").runs(IDS, again=False)
    for expected, *seen in zip([*fresh.last([(1,), (1, 2)]), fresh.original], *found.values(), strict=True):
        for one in seen:
            torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("in_files")
def test_hidden_states_go_to_files_that_leave_nothing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    whole, layers = both(checkpoint("llama"), tmp_path)
    found = Judge(layers, [IDS])
    torch.testing.assert_close(found.alone(quiet).kl_NK, Judge(whole, [IDS]).alone(quiet).kl_NK, rtol=1e-3, atol=1e-6)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_a_layer_is_read(
    checkpoint: Checkpoint, in_files: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = entered(monkeypatch)
    monkeypatch.setattr(streamed.shutil, "disk_usage", lambda _path: SimpleNamespace(free=1 << 19))
    model = StreamedModel(checkpoint("llama"), MAPS, "residual", tmp_path)
    with pytest.raises(NblError, match=r"hidden states of 4 variants of the model take .* has room for 0\.0 GiB"):
        model.runs(IDS.repeat(8, 1), again=True).original  # noqa: B018
    assert not loaded


def test_a_missing_head_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = Path(shutil.copytree(checkpoint("mistral"), tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(NblError, match=r"lacks the weight .*lm_head\.weight"):
        StreamedModel(directory, MAPS, "residual", tmp_path).head  # noqa: B018


def test_a_map_that_reads_another_layer_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("llama")
    far = replace(own_map(load_model(directory), 2, 8), cut=1)
    with pytest.raises(NblError, match="layer 2 reads an earlier layer"):
        StreamedModel(directory, {2: far}, "residual", tmp_path)
