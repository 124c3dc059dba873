"""`nbl-export project`: the projection of `roofline` for a user, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbl_export.cost.model import CostModel, read_intermediate_size, weight_bytes
from nbl_export.cost.roofline import MachineRates, efficiencies, shape_costs
from nbl_export.cost.roofline import project as projected
from nbl_export.records.decoder import DecoderSpec

from ..command import assert_refused, nbl

ASKED = ("project", "Llama-3.1-8B", "--layers", "24-31", "--tflops", "10", "--bandwidth", "100")


def test_rows_are_those_of_the_model_in_the_units_that_are_given() -> None:
    done = nbl(*ASKED, "--precision", "int4", "--prompt-tokens", "128", "--depth", "0,4096", "--json")
    assert done.status == 0, done.err
    rates = MachineRates.given(10e12, 100e9)
    costs, sizes = shape_costs("Llama-3.1-8B", "int4"), dict.fromkeys(range(24, 32), 4096**2)
    found = projected(costs, sizes, rates, "int4", tokens=128, depths=(0, 4096))
    expected = [{"shape": "Llama-3.1-8B", **row} for row in found]
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


@pytest.mark.parametrize(("options", "precision"), [((), "fp32"), (("--layers", "2,", "--precision", "int4"), "int4")])
def test_a_run_on_another_machine(options: tuple[str, ...], precision: str, finished: Path) -> None:
    """By the cost model of its own limits, which options overrule: caches of float32, the table of tokens."""
    rates = ("--tflops", "1", "--bandwidth", "50", "--prompt-tokens", "16", "--depth", "0")
    done = nbl("project", finished, *rates, *options, "--json")
    assert done.status == 0, done.err
    manifest = json.loads((finished / "nbl.json").read_text(encoding="utf-8"))
    replaced = [2] if options else manifest["replaced_layers"]
    spec, size = DecoderSpec(**manifest["decoder"]), weight_bytes(precision)
    costs = CostModel(spec, read_intermediate_size(finished / "original"), size, size, 4, token_table=True)
    sizes = dict.fromkeys(replaced, spec.hidden_size**2)
    name = manifest["model"].get("title") or manifest["model"]["name"]
    found = projected(costs, sizes, MachineRates.given(1e12, 50e9), precision, tokens=16, depths=(0,))
    expected = [{"shape": name, **row} for row in found]
    assert json.loads(done.out) == json.loads(json.dumps(expected))


def test_a_shape_has_no_layers_of_its_own() -> None:
    assert_refused(nbl(*ASKED[:2], *ASKED[4:]), 2, "the replaced layers are unknown")


@pytest.mark.parametrize(
    ("changed", "said", "status"),
    [
        (("--layers", "8"), ("is a count", "name the layers, for example 24-31"), 2),
        (("--layers", "32,"), ("layer 32 does not exist",), 1),
        (("--layers", "0-31"), ("at least one stays",), 1),
        (("--tflops", "0"), ("--tflops 0 is not a rate",), 2),
        (("--bandwidth", "nan"), ("--bandwidth nan is not a rate",), 2),
        (("--precision", "int3"), ("--precision is one of", "int3"), 2),
        (("--depth", "0,x"), ("--depth", "comma separated"), 2),
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
    (run / "nbl.json").write_text(manifest.replace('"rewrite": {\n   "key"', '"other": {\n   "key"'), encoding="utf-8")
    assert_refused(nbl("project", run, *ASKED[4:]), 1, "is not finished")
    (run / "nbl.json").write_text(manifest, encoding="utf-8")
    bench = run / "bench.json"
    bench.write_text(bench.read_text(encoding="utf-8").replace('"limits"', '"limit"'), encoding="utf-8")
    assert_refused(nbl(*ASKED, "--like", run), 1, "bench.json")
