"""Converts a run to a checkpoint of the Nemotron-NAS form, and reads it back."""

from __future__ import annotations

import copy
from pathlib import Path

from nbl_export.errors import ParityError
from nbl_export.files import move_into_place
from nbl_export.publish.linear_maps import TAP, linear_maps, price_of_change
from nbl_export.records.results import RungResult
from nbl_export.run.deployed import Finished
from nbl_export.run.progress import Ui

__all__ = ["convert"]


def convert(found: Finished, target: Path, form: str, ui: Ui) -> list[RungResult]:
    """Write and check a directory; it appears at `target` only if its model computes what the run's does.

    Raises:
        NblError: the form does not hold the model.
        ParityError: the model that was read back computes something else.
    """
    from nbl_export.model.linearize import replaced
    from nbl_export.model.speech import Spoken
    from nbl_export.targets.checkpoint import nemotron_nas

    nemotron_nas.check(found.model.config, tuple(found.maps), form)
    linear = linear_maps(found, ui)
    for sentence in (linear.change, price_of_change(found, linear)):
        if sentence:
            ui.say(f"  {sentence}")
    with found.run.scratch() as scratch, ui.task("saving"):
        nemotron_nas.save(copy.deepcopy(found.model), found.checkpoint, linear.maps, form, scratch / "saved")
        ids = found.unseen[0, :64].tolist()
        with replaced(found.model, linear.maps, TAP):
            expected, _ = Spoken(found.model).score(ids)
        away = float(abs(Spoken(nemotron_nas.load(scratch / "saved")).score(ids)[0] - expected).max())
        result = RungResult(
            "b", "nbl", "largest difference of a log-probability", away, 0.0, away == 0.0, f"{away:.2g}"
        )
        if not result.passed:
            raise ParityError(
                f"the checkpoint of {found.run.path} is not its model: logarithms of probabilities differ by {away:.2g}"
            )
        move_into_place(scratch / "saved", target)
    return [result]
