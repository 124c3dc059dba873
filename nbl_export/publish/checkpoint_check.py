"""`nbl-export verify CHECKPOINT`: whether a converted checkpoint computes what the run's model computes.

    convert   the original's torch model with the maps applied ─► some logits ─► CHECKPOINT/nbl_check.json
    verify    the checkpoint, loaded by transformers            ─► its logits beside those of the file

Both are in float32 on a CPU. The classes of the checkpoint have no part in the values of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, NblError, ParityError
from nbl_export.files import read_json, write_json
from nbl_export.records.from_json import read_record, require
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import apart
from nbl_export.verify.ladder import TOLERANCES

__all__ = ["CHECK_FILE", "Expected", "compare", "expect", "is_checkpoint", "save", "verify_checkpoint"]

CHECK_FILE = "nbl_check.json"
_POSITIONS = 32  # at the end of the ids
_LIKELIEST = 32  # tokens whose logits are kept
_MOST_IDS = 4096
_PRECISION = "fp32"


@dataclass(frozen=True)
class Expected:
    """Some logits of a model behind a text.

    Attributes:
        ids: of the text, [T].
        positions: that are compared, [P].
        columns: tokens whose logits are compared, [P, C].
        logits: theirs, [P, C].
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    columns: tuple[tuple[int, ...], ...]
    logits: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        shapes = {np.shape(self.columns), np.shape(self.logits)}
        require(len(shapes) == 1 and np.shape(self.columns)[:1] == (len(self.positions),), "shapes do not match")
        require(len(self.ids) <= _MOST_IDS and min(self.ids, default=-1) >= 0, "ids are none, negative or too many")
        require(bool(self.positions) and set(self.positions) <= set(range(len(self.ids))), "a position is not there")
        require(bool(self.columns[0]) and min(map(min, self.columns)) >= 0, "a column is negative")


def expect(model: Any, ids: Sequence[int]) -> Expected:
    """Take logits of a model at the end of a text; positions that it leaves out are left out."""
    from nbl_export.model.head import all_logits

    logits_TV = all_logits(model, ids)
    last = range(max(0, len(ids) - _POSITIONS), len(ids))
    positions = [t for t in last if np.isfinite(logits_TV[t]).all()]
    columns = [np.argsort(-logits_TV[t])[:_LIKELIEST].tolist() for t in positions]
    logits = [logits_TV[t, own].tolist() for t, own in zip(positions, columns, strict=True)]
    return Expected(tuple(ids), tuple(positions), tuple(map(tuple, columns)), tuple(map(tuple, logits)))


def save(expected: Expected, directory: Path) -> None:
    """Write the file into a checkpoint."""
    write_json(directory / CHECK_FILE, dataclasses.asdict(expected))


def compare(model: Any, expected: Expected, directory: Path) -> CheckResult:
    """Logits of the model of a checkpoint beside those that are expected.

    Raises:
        CorruptError: the checkpoint has a smaller vocabulary than the file.
    """
    from nbl_export.model.head import all_logits

    most = max(max(map(max, expected.columns)), max(expected.ids))
    if most >= model.config.vocab_size:
        raise CorruptError(f"{directory / CHECK_FILE} names token {most}, which the checkpoint lacks; convert again")
    found_PV = all_logits(model, expected.ids)[list(expected.positions)]
    found = np.take_along_axis(found_PV, np.array(expected.columns), 1)
    value = apart(np.array(expected.logits), found)
    limit = TOLERANCES[_PRECISION].limit
    passed = bool(np.isfinite(value) and value <= limit)
    detail = f"last {len(expected.positions)} positions of {len(expected.ids)} tokens, transformers in float32 on a CPU"
    return CheckResult("checkpoint", "nbl", "relative rms logit difference", value, limit, passed, detail)


def is_checkpoint(directory: Path) -> bool:
    """Whether a folder is a checkpoint of transformers."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def verify_checkpoint(directory: Path) -> CheckResult:
    """Load a checkpoint that `convert` wrote, and compare it with what it should compute.

    Raises:
        NblError: the folder has no file to compare with, or cannot be loaded. CorruptError: the file is damaged.
    """
    from nbl_export.methods.checkpoint.load import load_model
    from nbl_export.methods.checkpoint.source import resolve

    path = directory / CHECK_FILE
    if not path.is_file():
        raise NblError(
            f"{directory} has no {CHECK_FILE}, which convert --to transformers or vllm writes if the model fits into "
            "memory; convert the run again"
        )
    try:
        expected = read_record(Expected, read_json(path))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); convert the run again") from error
    resolve(str(directory))  # refuses an unsafe folder
    import nbl_export.methods.checkpoint.hf_classes  # noqa: F401

    return compare(load_model(directory), expected, directory)


def refuse_failed(found: CheckResult, directory: Path) -> None:
    """Raise if the check failed.

    Raises:
        ParityError: the checkpoint computes something else.
    """
    if not found.passed:
        raise ParityError(
            f"{directory} does not compute what the run's model computes: {found.metric} {found.value}, tolerance "
            f"{found.tolerance}. Copy it again, or convert the run again"
        )
