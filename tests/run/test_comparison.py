"""bench on directories of any kind: what is measured, what it is held against, and the formats it comes in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..command import assert_refused, nbl, snapshot

pytestmark = pytest.mark.job

SHORT = ("--depth", 0, "--repetitions", 1, "--prompt-tokens", 8, "--generate-tokens", 3, "--threads", 1)


def measured(*arguments: object) -> Any:
    done = nbl("bench", *arguments, *SHORT, "--json")
    assert done.status == 0, done.err
    return json.loads(done.out)


# -- what is measured ------------------------------------------------------------------------------------------


def test_a_run_directory_stands_for_its_model_and_its_original_is_the_base(run: Path, finished: Path) -> None:
    before = snapshot(run)
    found, base = measured(run, finished / "model"), f"{run} (original)"
    assert found["base"] == base and list(found["variants"]) == [base, str(run), str(finished / "model")]
    assert found["variants"][str(run)]["path"] == str(run / "model")
    assert {(r["test"], r["base"]) for r in found["ratios"] if r["variant"] == str(run)} == {
        ("pp8", base),
        ("tg3", base),
    }
    assert (
        found["variants"][base]["kv_cache_bytes_per_token"] * 2
        == found["variants"][str(run)]["kv_cache_bytes_per_token"] * 3
    )  # of three layers one is replaced
    assert snapshot(run) == before  # no stage of it


def test_directories_are_held_against_the_one_named_and_else_the_first(finished: Path) -> None:
    model, original = finished / "model", finished / "original"
    alone = measured(model)
    assert (alone["base"], list(alone["variants"]), alone["ratios"]) == (None, [str(model)], [])
    two = measured(model, original)
    assert two["base"] == str(model) and {r["variant"] for r in two["ratios"]} == {str(original)}
    named = measured(model, "--against", original)
    assert named["base"] == str(original) and {r["variant"] for r in named["ratios"]} == {str(model)}


@pytest.mark.parametrize(
    ("arguments", "status", "parts"),
    [
        (("NONE", "RUN"), 1, ("NONE", "does not exist")),
        (("RUN", "--against", "NONE"), 1, ("NONE", "does not exist")),
        (("RUN", "RUN"), 1, ("named twice",)),
        (("RUN", "--against", "RUN/model"), 1, ("named twice",)),
        (("RUN/model", "RUN/original", "--depth", "600"), 1, ("nothing to measure", "512")),
        (("RUN", "--depth", "0,-5"), 2, ("--depth", "0,2048")),
        (("RUN", "--threads", "two"), 2, ("--threads", "integer")),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: tuple[str, ...], status: int, parts: tuple[str, ...], finished: Path, tmp_path: Path
) -> None:
    def placed(word: str) -> str:
        return word.replace("RUN", str(finished)).replace("NONE", str(tmp_path / "none"))

    assert_refused(nbl("bench", *map(placed, arguments)), status, *map(placed, parts))
