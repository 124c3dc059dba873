"""The sweep: every point is what a plan of that many layers costs; what is recommended; how it reaches the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.plan.maps_file import load_maps
from nbl_export.report import console as printed
from nbl_export.report import plots
from nbl_export.run.stages.sweep import recommend
from nbl_export.text.window_intervals import increase_interval

from ..command import assert_refused, nbl
from ..tiny import LAYERS

pytestmark = pytest.mark.usefixtures("short_parts")


def facts_of(run: Path) -> Any:
    return json.loads((run / "nbl.json").read_text(encoding="utf-8"))


def swept(run: Path, *given: object) -> Any:
    done = nbl("plan", run, "--sweep", *given, "--json")
    assert done.status == 0, done.err
    written = json.loads((run / "sweep.json").read_text(encoding="utf-8"))
    assert json.loads(done.out) == written
    return written


def point(method: str, layers: int, increase: float | None) -> dict[str, Any]:
    upper = None if increase is None else increase
    return {"method": method, "layers": layers, "worst_increase": increase, "worst_upper": upper,
            "prefill": 1 + layers / 10}  # fmt: skip


def test_recommended_is_the_most_layers_within_ten_percent_of_which_no_fewer_are_beyond() -> None:
    points = [point("nbl", 0, 0.0), point("nbl", 1, 0.02), point("nbl", 2, 0.1), point("nbl", 3, 0.2),
              point("drop", 3, 0.01), point("nbl", 4, None)]  # fmt: skip
    assert recommend(points) == {"method": "nbl", "layers": 2}
    assert recommend([*points, point("distilled", 2, 0.05)]) == {"method": "distilled", "layers": 2}
    assert recommend([*points, point("distilled", 3, 0.09)]) == {"method": "distilled", "layers": 3}
    assert recommend([point("nbl", 0, 0.0), point("nbl", 1, 0.11)]) is None
    noisy = [{**point("nbl", 1, 0.02), "worst_upper": 0.03}, {**point("nbl", 2, 0.05), "worst_upper": 0.11}]
    assert recommend([*noisy, point("nbl", 3, 0.09)]) == {"method": "nbl", "layers": 1}
    assert recommend([point("nbl", 1, 0.11), point("nbl", 2, 0.05)]) is None
    assert recommend([{**point("nbl", 1, 0.02), "worst_upper": None}]) is None


def test_points_are_what_plans_of_that_many_layers_cost(run: Path, checkpoint: Any) -> None:
    sweep = swept(run, "--max-layers", "2")
    assert [(p["method"], p["layers"]) for p in sweep["points"]] == [(m, k) for m in ("nbl", "drop") for k in (0, 1, 2)]
    assert len(sweep["texts"]) == len(sweep["points"][0]["prices"]) >= 1
    for p in sweep["points"]:
        assert p["replaced_layers"] == sorted(sweep["order"][: p["layers"]])
        if p["layers"] == 0:
            assert (p["prefill"], p["decode"], p["worst_increase"], p["worst_upper"]) == (1.0, 1.0, 0.0, 0.0)
            assert all(price["kl"] == 0 for price in p["prices"])
    held = torch.tensor(_held(run))
    with torch.inference_mode():
        base = load_model(checkpoint("llama"))(held).logits[:, :-1].log_softmax(-1)
    for method, fit, count in (("nbl", "independent", 2), ("drop", "drop", 1)):
        assert nbl("plan", run, "--layers", count, "--fit", fit).status == 0
        layers = facts_of(run)["replaced_layers"]
        found = next(p for p in sweep["points"] if (p["method"], p["layers"]) == (method, count))
        assert layers == found["replaced_layers"]
        model = linearize(load_model(checkpoint("llama")), load_maps(run / "maps.safetensors", layers))
        with torch.inference_mode():
            ours = model(held, use_cache=False).logits[:, :-1].log_softmax(-1)
        price = found["prices"][0]
        assert price["kl"] == pytest.approx((base.exp() * (base - ours)).sum(-1).mean().item(), rel=1e-3)
        for name, p in (("perplexity_original", base), ("perplexity", ours)):
            loss = -p.gather(2, held[:, 1:, None]).mean()
            assert price[name] == pytest.approx(loss.exp().item(), rel=1e-3)
        assert price["increase"] == pytest.approx(price["perplexity"] / price["perplexity_original"] - 1)
        assert price["tokens"] == held.numel()
        loss = [-v.gather(2, held[:, 1:, None]).mean((1, 2)).double().numpy() for v in (base, ours)]
        assert price["increase_interval"] == pytest.approx(increase_interval(*loss).ends, rel=1e-3)
        assert found["worst_upper"] == max(p["increase_interval"][1] for p in found["prices"])


def _held(run: Path) -> Any:
    """The held-back windows that a sweep is taken on."""
    from nbl_export.options.options import JobOptions
    from nbl_export.options.places import located
    from nbl_export.run.job import Job
    from nbl_export.run.progress import Ui
    from nbl_export.run_directory import RunDirectory

    with RunDirectory.open_run(run, create=False) as opened:
        options = located(JobOptions.from_json(opened.manifest["options"]), opened.manifest)
        return Job(options, opened, Ui(quiet=True)).texts("deciding")[0][1].tolist()


def test_sweep_leaves_the_run_verified_and_shows_in_its_report(run: Path) -> None:
    assert "Quality against speed" not in (run / "report.md").read_text()
    done = nbl("plan", run, "--sweep")
    assert done.status == 0, done.err
    assert "plan: reused" in done.err and "sweep: done" in done.err and "report: done" in done.err
    assert "rewrite" not in done.err.replace("rewrite: reused", "") and "verify: reused" in done.err
    assert "modelled speed" in done.out
    assert facts_of(run)["status"] == "verified"
    report = (run / "report.md").read_text()
    assert "Quality against speed" in report and "All points of the sweep" in report
    assert "var(--nbl" in re.findall(r'id="tradeoff-.*?</figure>', (run / "report.html").read_text(), re.DOTALL)[0]
    again = nbl("plan", run, "--sweep")
    assert "sweep: reused" in again.err and again.out == done.out
    assert "report: reused" in nbl("report", run).err
    longer = nbl("plan", run, "--sweep", "--max-layers", "2")
    assert "sweep: done" in longer.err
    assert nbl("plan", run, "--layers", "1").status == 0
    assert (
        "sweep: reused" in nbl("plan", run, "--sweep", "--max-layers", "2").err
    )  # a sweep does not depend on the count


def test_main_job_does_not_sweep(same: tuple[object, ...], run: Path) -> None:
    assert not (run / "sweep.json").exists()
    assert "sweep" not in nbl(*same, "--output", run).err


def test_greedy_sweep_makes_its_order_once(run: Path) -> None:
    sweep = swept(run, "--select", "greedy", "--layers", "1", "--max-layers", "2")
    kept = facts_of(run)["greedy"]
    assert sweep["order"] == kept["steps"][-1]["layers"] and len(kept["steps"]) == 2
    assert nbl("plan", run, "--layers", "2").status == 0
    assert facts_of(run)["greedy"] == kept


def test_a_distilled_run_has_a_curve_up_to_its_layers(
    same: tuple[object, ...], tmp_path: Path, checkpoint: Any
) -> None:
    run = tmp_path / "run"
    training = ("--fit", "distilled", "--distill-steps", "2", "--label-weight", "0")
    assert nbl(*same, "--layers", "2", *training, "--output", run).status == 0
    sweep = swept(run)
    one, two = [p for p in sweep["points"] if p["method"] == "distilled"]
    assert one["replaced_layers"] == sweep["order"][:1]
    assert two["replaced_layers"] == facts_of(run)["replaced_layers"]
    assert one["distilled_for"] == two["distilled_for"] == 2 and facts_of(run)["status"] == "verified"
    maps = load_maps(run / "maps.safetensors", two["replaced_layers"])
    held = torch.tensor(_held(run))
    for found in (one, two):
        chosen = {i: maps[i] for i in found["replaced_layers"]}
        model = linearize(load_model(checkpoint("llama")), chosen, facts_of(run)["tap"])
        with torch.inference_mode():
            said = model(held, use_cache=False).logits[:, :-1].log_softmax(-1)
        loss = -said.gather(2, held[:, 1:, None]).mean()
        assert found["prices"][0]["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    report = (run / "report.md").read_text()
    assert "distilled for 2" in report
    assert ". Distilled maps are this run's own, trained together for 2 layers" in report


def test_a_distilled_run_of_given_layers_has_its_point(same: tuple[object, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = ("--layers", "1-2", "--fit", "distilled", "--distill-steps", "2", "--output", run)
    assert nbl(*same, *given).status == 0
    (found,) = [p for p in swept(run)["points"] if p["method"] == "distilled"]
    assert found["replaced_layers"] == facts_of(run)["replaced_layers"] == [1, 2]


def test_bad_lengths_are_refused(run: Path) -> None:
    assert_refused(nbl("plan", run, "--sweep", "--max-layers", LAYERS), 1, f"--max-layers {LAYERS}", "must keep one")
    assert_refused(nbl("plan", run, "--max-layers", "1"), 2, "--max-layers", "needs --sweep")


def test_plot_rings_the_recommended_point_and_leaves_out_what_is_not_finite() -> None:
    points = [point("nbl", k, 0.03 * k) for k in range(4)] + [point("drop", 0, 0.0), point("drop", 1, None)]
    drawn = plots.tradeoff(points, {"method": "nbl", "layers": 3})
    assert "3 layers" in drawn and "attention dropped" in drawn and "distilled" not in drawn
    assert "3 layers" not in plots.tradeoff(points, None)
    assert drawn == plots.tradeoff(points, {"method": "nbl", "layers": 3})


def test_plot_has_whiskers_of_the_text_that_suffers_most() -> None:
    points = [point("nbl", k, 0.03 * k) for k in range(4)]
    bare = plots.tradeoff(points, None)
    points[2]["prices"] = [{"increase": 0.02, "increase_interval": [0.018, 0.021]},
                           {"increase": 0.06, "increase_interval": [0.052, 0.068]}]  # fmt: skip
    assert plots._worst_interval(points[2]) == [[0.052, 0.068]] and plots._worst_interval(points[1]) == []
    drawn = plots.tradeoff(points, None)
    assert drawn.count('id="tradeoff-line2d') == bare.count('id="tradeoff-line2d') + 1


def test_table_says_what_is_not_finite_and_what_was_distilled_for_more_layers() -> None:
    from rich.console import Console

    price = {"text": "t", "kl": None, "perplexity_original": 5.0, "perplexity": None, "increase": None,
             "increase_interval": None, "kl_interval": None}  # fmt: skip
    p = {**point("distilled", 1, None), "prefill_tail_pruned": 1.2, "decode": 1.1, "prices": [price]}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    points = [{**p, "distilled_for": 1}, {**p, "distilled_for": 3}]
    console.print(printed.sweep_table({"order": [1], "texts": ["t"], "points": points, "recommended": None}))
    told = console.export_text()
    assert "not finite" in told and "distilled for 3" in told and "distilled for 1" not in told
