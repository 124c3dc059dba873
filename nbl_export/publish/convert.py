"""Converts a finished run to a form that other engines read: `nbl-export convert DIR --to FORM`.

transformers   directory of `nbl_export.hf`'s classes, which vLLM's plugin reads too
nemotron-nas   directory for TensorRT-LLM, and for the converter of llama.cpp
mlx            directory for mlx-lm
edge-llm       directory for TensorRT-Edge-LLM
ngram          directory of the original decoder for ONNX Runtime GenAI, which proposes tokens from the text so far
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, ParityError, UsageError
from nbl_export.files import move_into_place, refuse_occupied
from nbl_export.options.options import NO_ORIGINAL
from nbl_export.publish.linear_maps import TAP, linear_maps, loss_of_change
from nbl_export.records.destinations import DESTINATIONS, destination_named, spoken_kind
from nbl_export.records.plan import CUT_KIND
from nbl_export.records.results import CheckResult
from nbl_export.run.deployed import Finished, open_finished
from nbl_export.run.progress import Ui
from nbl_export.run_directory import DECODERS

__all__ = ["FORMS", "convert"]

FORMS = ("transformers", "nemotron-nas", "mlx", "edge-llm", "ngram")
_READ_BY = {name: place.form for name, place in DESTINATIONS.items() if place.form}
_INSTEAD = (
    "use --to transformers or vllm, convert a run of linear layers (--layers N), or deploy DIR/model with ONNX Runtime "
    "GenAI"
)
_OF_LLAMA_CPP = ("gguf", "ollama")


def convert(output: Path, form: str, target: Path, ui: Ui, *, force: bool = False) -> Sequence[CheckResult]:
    """Write a run's model in a form at `target`, completely or not at all. Returns the checks that were made.

    Args:
        form: one of FORMS, or an engine that reads one.
        force: go on although verification failed.

    Raises:
        UsageError: no such form.
        NblError: `target` is there already, the run is not finished or failed, or its model has no such form.
        ParityError: what was written is not the model.
    """
    asked, form = form, _form_of(form)
    refuse_occupied(target)
    with open_finished(output, ui, force=force) as found:
        _refuse_unread(found, asked, form)
        if form == "transformers":
            return _save_checkpoint(found, target, ui)
        if form == "edge-llm":
            return _save_edge_llm(found, target, ui)
        if form == "ngram":
            return _save_ngram(found, target)
        return _save_nemotron_nas(found, target, form, ui)


def _form_of(asked: str) -> str:
    """The form that a destination reads, or that `asked` is itself."""
    if asked.lower() in _OF_LLAMA_CPP:
        raise UsageError(f"--to {asked} is llama.cpp's own: its convert_hf_to_gguf.py makes a GGUF file of "
                         "convert --to nemotron-nas (docs/serving.md)")  # fmt: skip
    if asked in FORMS:
        return asked
    with contextlib.suppress(UsageError):
        name = destination_named(asked)
        if name in _READ_BY:
            return _READ_BY[name]
        raise NblError(f"--to {asked} writes nothing: it takes the folder of a run that was made with --for {name}")
    names = ", ".join(name for name in _READ_BY if name not in (*FORMS, *_OF_LLAMA_CPP))
    raise UsageError(f"--to is {', '.join(FORMS)}, or a destination ({names}), not {asked!r}")


def _refuse_unread(found: Finished, asked: str, form: str) -> None:
    """Refuse layers and models that the destination does not read.

    Raises:
        NblError: the message has the reason.
    """
    if form == "ngram":
        return
    name = destination_named(asked)
    place = DESTINATIONS[name]
    kinds = {mixer.kind for mixer in found.maps.values()}
    if place.refuses(kinds, frozenset(), "", ()):
        spoken = spoken_kind(CUT_KIND if CUT_KIND in kinds else min(kinds))
        raise NblError(f"{found.run.path} has {spoken}, which --to {asked} does not hold; {_INSTEAD}")
    if reason := place.refuses(kinds, frozenset(), found.run.manifest["decoder"]["architecture"], found.maps):
        raise NblError(f"--to {asked} cannot have {found.run.path}: {reason}; nbl-export convert DIR lists who can")
    if name == "llama.cpp":
        from nbl_export.targets.checkpoint.nemotron_nas import check_vocabulary

        check_vocabulary(found.checkpoint.value, int(found.run.manifest["decoder"]["vocab_size"]))


def _save_checkpoint(found: Finished, target: Path, ui: Ui) -> list[CheckResult]:
    """Write the model with the stored weights of the original, and maps in float32. The classes in `hf` load it.

    The directory appears at `target` only if transformers finds each weight in its shape there.

    Raises:
        NblError: the model is not available, its architecture has no class, or what was written cannot be loaded.
    """
    from nbl_export.model.checkpoint.copied import check_loadable, copy_linearized
    from nbl_export.model.checkpoint.hf_classes import save_linearized

    checkpoint = found.checkpoint.value
    with found.run.scratch() as scratch, ui.task("saving"):
        if not copy_linearized(checkpoint, found.maps, found.tap, scratch / "saved"):
            save_linearized(found.model.value, checkpoint, found.maps, found.tap, scratch / "saved")
        check_loadable(scratch / "saved")
        move_into_place(scratch / "saved", target)
    return []


def _save_nemotron_nas(found: Finished, target: Path, form: str, ui: Ui) -> list[CheckResult]:
    """Write and check a directory; it appears at `target` only if its model computes what the run's does.

    Raises:
        NblError: the form does not hold the model.
        ParityError: the model that was read back computes something else.
    """
    from nbl_export.model.head import log_probabilities
    from nbl_export.model.linearize import replaced
    from nbl_export.targets.checkpoint import nemotron_nas

    nemotron_nas.check(found.model.value.config, tuple(found.maps), form)
    linear = linear_maps(found, ui)
    for sentence in (linear.change, loss_of_change(found, linear)):
        if sentence:
            ui.say(f"  {sentence}")
    with found.run.scratch() as scratch, ui.task("saving"):
        nemotron_nas.save(
            copy.deepcopy(found.model.value), found.checkpoint.value, linear.maps, form, scratch / "saved"
        )
        ids = found.final.value[0, :64].tolist()
        with replaced(found.model.value, linear.maps, TAP):
            expected = log_probabilities(found.model.value, ids)
        result = _compared(found, nemotron_nas.load(scratch / "saved"), expected, ids)
        move_into_place(scratch / "saved", target)
    return [result]


def _save_edge_llm(found: Finished, target: Path, ui: Ui) -> list[CheckResult]:
    """Write and check a directory in float16; it appears at `target` only if its model computes what the run's does.

    Raises:
        NblError: the form does not hold the model.
        ParityError: the model that was read back computes something else.
    """
    from nbl_export.model.head import log_probabilities
    from nbl_export.targets.checkpoint import edge_llm

    edge_llm.check(found.model.value.config, found.maps)
    with found.run.scratch() as scratch, ui.task("saving"):
        model = copy.deepcopy(found.model.value)
        edge_llm.save(model, found.checkpoint.value, found.maps, found.tap, scratch / "saved")
        ids = found.final.value[0, :64].tolist()
        expected = log_probabilities(model, ids)
        result = _compared(found, edge_llm.load(scratch / "saved"), expected, ids)
        move_into_place(scratch / "saved", target)
    for sentence in edge_llm.remarks(target):
        ui.say(f"  {sentence}")
    return [result]


def _save_ngram(found: Finished, target: Path) -> list[CheckResult]:
    """Write the original decoder with the options of n-gram decoding. Its graph is the run's, byte for byte.

    Raises:
        NblError: the run has no original, or none for ONNX Runtime GenAI.
    """
    from nbl_export.targets.onnx.ngram import write_ngram

    if found.original_is_gone:
        raise NblError(f"{found.run.path} has no original to decode with: {NO_ORIGINAL}; convert a run of that model")
    found.run.check("decoder")
    with found.run.scratch() as scratch:
        write_ngram(found.run.path / DECODERS["original"], scratch / "saved")
        move_into_place(scratch / "saved", target)
    return []


def _compared(found: Finished, written: Any, expected: Any, ids: Sequence[int]) -> CheckResult:
    """Log-probabilities of a model that was read back beside those of the run's model.

    Raises:
        ParityError: they differ.
    """
    from nbl_export.model.head import log_probabilities

    away = float(abs(log_probabilities(written, ids) - expected).max())
    metric = "largest difference of a log-probability"
    result = CheckResult("original", "nbl", metric, away, 0.0, away == 0.0, f"{away:.2g}")
    if not result.passed:
        raise ParityError(
            f"the checkpoint of {found.run.path} is not its model: logarithms of probabilities differ by {away:.2g}"
        )
    return result
