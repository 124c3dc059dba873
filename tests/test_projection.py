"""`nbl-export project`: the projection of `roofline` for a user, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbl_export.cost import read_intermediate_size
from nbl_export.records import DecoderSpec
from nbl_export.roofline import MachineRates, efficiencies
from nbl_export.roofline import project as projected

from .command import assert_refused, nbl

ASKED = ("project", "Llama-3.1-8B", "--layers", "24-31", "--tflops", "10", "--bandwidth", "100")


def test_rows_are_those_of_the_model_in_the_units_that_are_given() -> None:
    done = nbl(*ASKED, "--precision", "int4", "--prompt-tokens", "128", "--depth", "0,4096", "--json")
    assert done.status == 0, done.err
    rates = MachineRates.given(10e12, 100e9)
    expected = projected("Llama-3.1-8B", range(24, 32), rates, "int4", tokens=128, depths=(0, 4096))
    assert json.loads(done.out) == json.loads(json.dumps(expected))
    assert all(row["projection"] for row in expected)


def test_a_table_says_that_it_is_a_projection() -> None:
    done = nbl(*ASKED)
    assert done.status == 0, done.err
    assert "8 layers replaced: a projection" in done.out and "decode after 2048" in done.out
    assert "expected" not in done.out


def test_like_a_run_that_was_measured(finished: Path) -> None:
    (limit,) = json.loads((finished / "bench.json").read_text(encoding="utf-8"))["limits"]
    done = nbl(*ASKED, "--like", finished, "--json")
    assert done.status == 0, done.err
    shares = efficiencies(limit["rows"])
    for row in json.loads(done.out):
        for name, most in row["limit_tokens_per_second"].items():
            assert row["expected_tokens_per_second"][name] == pytest.approx(most * shares[row["phase"]])
    assert "expected" in nbl(*ASKED, "--like", finished).out


def test_a_run_on_another_machine(finished: Path) -> None:
    """Its own shape, layers and precision, which options overrule."""
    manifest = json.loads((finished / "nbl.json").read_text(encoding="utf-8"))
    spec, width = DecoderSpec(**manifest["decoder"]), read_intermediate_size(finished / "original")
    rates = ("--tflops", "1", "--bandwidth", "50", "--prompt-tokens", "16", "--depth", "0")
    machine = MachineRates.given(1e12, 50e9)
    for options, layers, precision in (
        ((), manifest["replaced_layers"], "fp32"),
        (("--layers", "2,", "--precision", "int4"), (2,), "int4"),
    ):
        done = nbl("project", finished, *rates, *options, "--json")
        assert done.status == 0, done.err
        name = manifest["model"].get("title") or manifest["model"]["name"]
        expected = projected(name, layers, machine, precision, tokens=16, depths=(0,), decoder=(spec, width))
        assert json.loads(done.out) == json.loads(json.dumps(expected))
    assert_refused(nbl(*ASKED[:2], *rates), 2, "which layers are replaced?")


@pytest.mark.parametrize(
    ("changed", "said", "status"),
    [
        (("--layers", "8"), ("is a count", "name the layers"), 2),
        (("--layers", "32,"), ("layer 32 does not exist",), 1),
        (("--layers", "0-31"), ("at least one stays",), 1),
        (("--tflops", "0"), ("--tflops 0 is no rate",), 2),
        (("--bandwidth", "nan"), ("--bandwidth nan is no rate",), 2),
        (("--precision", "int3"), ("--precision is one of", "int3"), 2),
        (("--depth", "0,x"), ("is not numbers of tokens",), 2),
        (("--depth", "131000"), ("not within the 131072 positions",), 2),
    ],
)
def test_what_is_refused(changed: tuple[str, ...], said: tuple[str, ...], status: int) -> None:
    assert_refused(nbl(*ASKED, *changed), status, *said)


def test_unknown_shapes_and_runs_that_tell_nothing(run: Path, tmp_path: Path) -> None:
    assert_refused(
        nbl("project", "Llama-9", *ASKED[2:]), 1, "neither a run directory nor a shape", "Llama-3.1-8B, Mistral-7B-v0.3"
    )
    assert_refused(nbl(*ASKED, "--like", tmp_path), 1, "is not a run directory")
    manifest = (run / "nbl.json").read_text(encoding="utf-8")
    (run / "nbl.json").write_text(manifest.replace('"decoder": {\n   "key"', '"other": {\n   "key"'), encoding="utf-8")
    assert_refused(nbl("project", run, *ASKED[4:]), 1, "is not finished")
    (run / "nbl.json").write_text(manifest, encoding="utf-8")
    bench = run / "bench.json"
    bench.write_text(bench.read_text(encoding="utf-8").replace('"limits"', '"limit"'), encoding="utf-8")
    assert_refused(nbl(*ASKED, "--like", run), 1, "bench.json")
