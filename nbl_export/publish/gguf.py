"""Converts a run to a GGUF file for llama.cpp, and checks the file.

Maps for formats that store neither a bias nor another input than the normed one, from a finished run.

    maps of the run                     linear maps
    without a bias, normed input        the same
    with a bias, normed input           the bias folded into the matrix, from the moments of the normed input
    on the residual stream              fitted anew on the normed input

Moments of the normed input come from the run's moments.safetensors, or are collected again from the run's text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from nbl_export.errors import NblError, ParityError
from nbl_export.files import move_into_place
from nbl_export.graph.gguf.content import Content, Key, read_content, write_content
from nbl_export.mixers import kind_of
from nbl_export.mixers.base import Mixer
from nbl_export.records.results import CheckResult
from nbl_export.run.deployed import Finished
from nbl_export.run.progress import Ui
from nbl_export.run_directory import MOMENTS_FILE
from nbl_export.targets import owner_of
from nbl_export.targets.gguf import write as from_checkpoint
from nbl_export.targets.gguf.check import check_file
from nbl_export.targets.gguf.linearize import KEEP, check_base, linearized
from nbl_export.version import __version__

__all__ = ["TAP", "LinearMaps", "convert", "linear_maps", "loss_of_change"]


def convert(found: Finished, target: Path, kind: str, base: Path | None, ui: Ui) -> list[CheckResult]:
    """Write and check a file; it appears at `target` only if the checks pass.

    Args:
        kind: one of `linearize.TYPES`.
        base: a GGUF file of the original; None for the run's own source.

    Raises:
        NblError: the model has no form in llama.cpp's architecture deci.
        ParityError: the written file is not the model.
    """
    content = _base(found, base)
    linear = linear_maps(found, ui)
    with found.run.scratch() as scratch:
        path = scratch / "model.gguf"
        with ui.task("writing"):
            write_content(linearized(content, linear.maps, kind, _about(linear.maps)), path)
        results = check_file(path, content, linear.maps, kind)
        results += _run(found, linear, path, _original_file(content, found, base, kind, scratch), ui)
        for sentence in (linear.change, loss_of_change(found, linear)):
            if sentence:
                ui.say(f"  {sentence}")
        failed = next((r for r in results if not r.passed), None)
        if failed is not None:
            raise ParityError(f"the GGUF file of {found.run.path} is wrong: {failed.metric}: {failed.detail}")
        move_into_place(path, target)
    return results


def _base(found: Finished, base: Path | None) -> Content:
    """The original's content: from `base`, the run's GGUF file, or its checkpoint."""
    given = base or found.source.value.gguf
    if given is None:
        return from_checkpoint.content_of(found.checkpoint.value)
    content = read_content(given)
    check_base(content, given)
    spec = found.run.manifest["decoder"]
    sizes = {"block_count": spec["num_layers"], "embedding_length": spec["hidden_size"]}
    for name, wanted in sizes.items():
        if content.get(name) != wanted:
            raise NblError(f"{given} is another model: its {name} is {content.get(name)}, the run's model has {wanted}")
    return content


def _about(maps: Mapping[int, Mixer]) -> dict[str, Key]:
    """Keys that say what was done."""
    digest = hashlib.sha256()
    for _, mixer in sorted(maps.items()):
        digest.update(np.ascontiguousarray(mixer.product()).tobytes())
    return {
        "nbl.version": Key.text(__version__),
        "nbl.replaced_layers": Key.numbers(sorted(maps)),
        "nbl.maps_sha256": Key.text(digest.hexdigest()),
    }


def _original_file(content: Content, found: Finished, base: Path | None, kind: str, scratch: Path) -> Path:
    """The original as a GGUF of the same types: the given file, or the content without any map."""
    given = base or found.source.value.gguf
    if given is not None and kind == KEEP:
        return Path(given)
    path = scratch / "original.gguf"
    write_content(linearized(content, {}, kind, {}), path)
    return path


def _run(found: Finished, linear: LinearMaps, path: Path, original: Path, ui: Ui) -> list[CheckResult]:
    """What llama.cpp computes beside torch; nothing if it is not installed, which is said."""
    target = owner_of(path)
    assert target is not None, "a GGUF file was written"
    answer = target.probe()
    if not answer.available or found.original_is_gone:
        ui.say(f"  not run in llama.cpp: {answer.reason if not answer.available else 'the original is gone'}")
        return []
    from nbl_export.model.linearize import replaced
    from nbl_export.model.torch_decoder import TorchDecoder
    from nbl_export.targets.gguf.check import PROMPTS, hear, judge

    windows, heard = found.held_back.value.final, []
    with ui.task("running in llama.cpp and torch"):
        for file in (original, path):
            with cast(Any, target.open_runner(file)) as runner:  # scores, which no `TextRunner` has to
                prompts = [runner.encode(text, chat=False) for text in PROMPTS]
                heard.append(hear(runner, prompts, windows))
        before = hear(TorchDecoder(found.model.value), prompts, windows)
        with replaced(found.model.value, linear.maps, TAP):
            after = hear(TorchDecoder(found.model.value), prompts, windows)
    return judge(before, heard[0], after, heard[1])


TAP = "normed"


@dataclass(frozen=True)
class LinearMaps:
    """Maps without a bias on the normed input, and one sentence on how they differ from the run's maps."""

    maps: Mapping[int, Mixer]
    change: str = ""


def linear_maps(found: Finished, ui: Ui) -> LinearMaps:
    """The run's maps without a bias, on the normed input.

    Raises:
        NblError: they need moments that the run has not, and its model or text is not available.
    """
    products = {i: mixer.product() for i, mixer in found.maps.items()}
    made = {i: _map(weight) for i, weight in products.items() if weight is not None}
    biased = [i for i in sorted(products) if i not in made]
    if unfitted := [i for i in biased if not kind_of(found.maps[i].kind).fitted]:
        kind = found.maps[unfitted[0]].kind
        raise NblError(
            f"layer {unfitted[0]} is of the kind {kind}, and this form holds one matrix a layer; use the run's model/, "
            "or --to transformers"
        )
    if not biased and (found.tap == TAP or not any(m.tensors()["weight"].any() for m in made.values())):
        return LinearMaps(made)  # of the form already, or dropped attention
    refitted = {} if found.tap == TAP else products
    for i, moments in _moments(found, sorted(refitted or biased), ui):
        mixer = found.maps[i]
        near = kind_of(mixer.kind).fit(moments, i, bias=False) if refitted else mixer.as_product(moments, i)
        weight = None if near is None else near.product()
        if weight is None:
            raise NblError(f"layer {i} is of the kind {mixer.kind}, and this form holds one matrix a layer")
        made[i] = _map(weight)
    if not refitted:
        return LinearMaps(made, "The bias of each map is folded into its matrix.")
    change = "The maps act on the normed input instead of the residual stream, and are fitted anew in closed form."
    if found.fit == "distilled":
        change += " What distillation had gained is lost: --fit distilled --maps linear keeps it."
    return LinearMaps(made, change)


def _map(weight_DD: np.ndarray) -> Mixer:
    return kind_of("linear").from_tensors({"weight": weight_DD, "bias": np.zeros(len(weight_DD), np.float32)})


def _moments(found: Finished, layers: Sequence[int], ui: Ui) -> Iterator[tuple[int, Any]]:
    """Moments of the normed input of some layers."""
    from nbl_export.calibrate import collect
    from nbl_export.calibrate.moments_file import whole_moments

    path = found.run.path / MOMENTS_FILE
    if path.is_file():
        with whole_moments(path) as file:
            if TAP in file.taps:
                for i in layers:
                    yield i, file.sums(i, TAP).moments()
                return
    try:
        model, windows = found.model.value, found.windows.value[0]
    except NblError as error:
        raise NblError(f"{error}; or make a run for this form: {found.remake}") from error
    ui.say(f"  the run has no moments of the normed input; collecting them from {windows.numel()} tokens")
    with ui.task("collecting") as progress:
        sums = collect.collect(model, windows, progress, (TAP,))[TAP]
    for i in layers:
        yield i, sums[i]


def loss_of_change(found: Finished, linear: LinearMaps) -> str:
    """Perplexity of the run's maps and of the linear maps on text that fitted neither; "" if nothing changed."""
    if not linear.change or found.original_is_gone:
        return ""
    from nbl_export.model.switched import SwitchedModel

    found_on = found.held_back.value.final
    asked = ((found.maps, found.tap), (linear.maps, TAP))
    losses = [SwitchedModel(found.model.value, maps, tap).quality_loss(found_on, tuple(maps)) for maps, tap in asked]
    (original, before), (_, after) = (loss.perplexities for loss in losses)
    return f"Perplexity on held-back text: original {original:.4g}, maps of the run {before:.4g}, now {after:.4g}."
