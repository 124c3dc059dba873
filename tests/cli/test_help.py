"""Where help is found: -h, a bare call, the hint behind a wrong call, and the page of options."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..command import assert_refused, nbl
from .test_cli import SUBCOMMANDS

pytestmark = pytest.mark.job


@pytest.mark.parametrize("command", [(), *((name,) for name in SUBCOMMANDS)], ids=str)
def test_h_is_help(command: tuple[str, ...]) -> None:
    short, long = nbl(*command, "-h"), nbl(*command, "--help")
    assert (short.status, short.err) == (0, "")
    assert short.out == long.out
    assert "-h, --help" in short.out


def test_a_bare_call_shows_the_help() -> None:
    bare = nbl()
    assert (bare.status, bare.out) == (2, "")
    assert bare.err == nbl("--help").out


@pytest.mark.parametrize(
    ("words", "part", "page"),
    [
        (("plan",), "Missing argument 'DIR'", "nbl-export plan --help"),
        (("generate", "runs/x"), "Missing argument 'PROMPT'", "nbl-export generate --help"),
        (("convert", "runs/x", "--to", "mlx"), "--to mlx needs --output", "nbl-export convert --help"),
        (
            ("bench", "runs/x", "--dept", "1"),
            "No such option '--dept'. (Did you mean one of: '--depth'",
            "nbl-export bench --help",
        ),
        (
            ("--layer", "1"),
            "No such option '--layer'. (Did you mean one of: '--exit-layer', '--layers'",
            "nbl-export --help",
        ),
        (("-m", "m"), "the main job needs --output", "nbl-export --help"),
        (("-o", "o"), "the main job needs --model;", "nbl-export --help"),
        (("--engine", "trt"), "the main job needs --model and --output", "nbl-export --help"),
        (("benhc",), "No such command 'benhc'. Did you mean 'bench'", "nbl-export --help"),
    ],
)
def test_a_wrong_call_names_the_page_that_helps(words: tuple[str, ...], part: str, page: str) -> None:
    refused = nbl(*words)
    assert_refused(refused, 2, part)
    assert refused.err.endswith(f"; see {page}\n")


def test_a_model_without_its_option(tmp_path: Path) -> None:
    for place in ("org/name", tmp_path, "models/m.gguf"):
        assert_refused(nbl(place, "--layers", "8"), 2, f"{place} is no command; give the model with --model {place}")
