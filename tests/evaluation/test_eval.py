"""`nbl-export eval` on a tiny run: eval.json, the report, what is kept and what is measured again, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ..command import assert_refused, keys, nbl, snapshot
from ..damage import edit, truncate
from ..evaluation_tiny import write_tasks

pytestmark = [pytest.mark.engine, pytest.mark.job]

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")

LIMIT = 1e-5  # kernels of one row and of many add up in another order


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def words(data: dict[str, Path], text: Path) -> tuple[object, ...]:
    """Options of the evaluation below."""
    return (
        "--tasks", ",".join(map(str, data.values())),
        "--perplexity", f"held={text}", "--ppl-context", 32, "--limit", 5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(finished: Path, words: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an eval.json of everything. Never write to it."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "run"))
    done = nbl("eval", run, *words)
    assert done.status == 0, done.err
    assert "lambada_openai" in done.out and "held" in done.out
    assert "it/s]" not in done.err  # the harness' own progress bars
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


def read(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "eval.json").read_text())
    return value


def test_eval_json_holds_every_task_and_variant(evaluated: Path) -> None:
    value = read(evaluated)
    asked = {(e["task"], e["variant"]) for e in value["results"]}
    names = ("perplexity:held", "lambada_openai", "arc_easy", "piqa", "wikitext")
    assert asked == {(task, variant) for task in names for variant in ("original", "nbl")}
    items = {e["task"]: e["items"] for e in value["results"]}
    assert items == {"perplexity:held": 5, "lambada_openai": 3, "arc_easy": 3, "piqa": 2, "wikitext": 2}
    arc = next(e for e in value["results"] if (e["task"], e["variant"]) == ("arc_easy", "nbl"))
    assert arc["metrics"]["acc"]["value"] == sum(map(float, arc["scores"]["acc"].split())) / 3
    assert arc["data"]["sha256"] and arc["config"]["doc_to_text"] == "Question: {{question}}\nAnswer:"
    assert value["lm_eval"]


def test_perplexity_is_that_of_a_direct_computation(evaluated: Path, text: Path) -> None:
    """On the same graph, whose products round to 8 bits; test_scorer.py compares graphs of floats with torch."""
    import numpy as np

    from nbl_export.methods.checkpoint.load import load_tokenizer
    from nbl_export.targets import owner_of

    model = evaluated / "model"
    target = owner_of(model)
    assert target is not None
    decoder = target.open_graph(model, target.facts(model).head_dim)
    ids = load_tokenizer(model)(text.read_text(), verbose=False)["input_ids"]
    losses: list[float] = []
    for row in np.array(ids[: 5 * 32]).reshape(5, 32):
        decoder.begin(1)
        logits_TV = decoder.step(row[None])[0, :-1].astype(np.float64)
        sums_T = np.log(np.exp(logits_TV).sum(1))
        losses += (sums_T - logits_TV[np.arange(31), row[1:]]).tolist()
    rows = [r for r in read(evaluated)["table"] if r["task"] == "perplexity:held"]
    expected = float(np.exp(np.mean(losses)))
    assert rows[0]["figures"]["nbl"]["value"] == pytest.approx(expected, rel=LIMIT)


def test_differences_are_paired(evaluated: Path) -> None:
    import numpy as np

    value = read(evaluated)
    row = next(r for r in value["table"] if (r["task"], r["metric"]) == ("arc_easy", "acc_norm"))
    scores = {e["variant"]: np.array([float(x) for x in e["scores"]["acc_norm"].split()])
              for e in value["results"] if e["task"] == "arc_easy"}  # fmt: skip
    (graphs,) = row["differences"]
    apart = scores["nbl"] - scores["original"]
    assert graphs["value"] == pytest.approx(apart.mean())
    assert graphs["stderr"] == pytest.approx(apart.std(ddof=1) / 3**0.5)


def test_the_report_shows_it(evaluated: Path) -> None:
    page = (evaluated / "report.md").read_text()
    assert "### Benchmarks" in page
    assert "| arc\\_easy | acc ↑ | 3 |" in page
    assert len(json.loads((evaluated / "report.json").read_text())["quality"]["table"]) >= 8


def test_what_was_measured_is_kept(run: Path, data: dict[str, Path], words: tuple[object, ...]) -> None:
    before = read(run)
    again = nbl("eval", run, *words)
    assert again.status == 0 and "evaluate: reused" in again.err
    assert read(run) == before
    more = nbl("eval", run, "--tasks", f"{data['piqa']},{data['lambada_openai']}", "--limit", 1)
    assert more.status == 0, more.err
    measured = [line for line in more.err.splitlines() if line.startswith("  ")]
    assert [line.split(": ")[:2] for line in measured] == [
        [f"  {variant}", task] for variant in ("original", "nbl") for task in ("piqa", "lambada_openai")
    ]
    after = read(run)
    assert after["results"][: len(before["results"])] == before["results"]
    assert len(after["results"]) == len(before["results"]) + 4


def test_another_model_invalidates(run: Path, data: dict[str, Path]) -> None:
    (layer,) = json.loads((run / "nbl.json").read_text())["replaced_layers"]
    assert nbl("rewrite", run, *keys(layers=f"{(layer + 1) % 3},")).status == 0
    assert "eval" not in json.loads((run / "nbl.json").read_text())["stages"]
    done = nbl("eval", run, "--tasks", data["piqa"], "--limit", 5)
    assert done.status == 0, done.err
    value = read(run)
    assert measured(done.err) == ["nbl"]  # the original's graph is the same
    assert {e["variant"] for e in value["results"]} == {"original", "nbl"}


def measured(err: str) -> list[str]:
    """Variants of which a figure was told; a slow machine tells progress too."""
    return [line.split(":")[0].strip() for line in err.splitlines() if line.startswith("  ") and " items, " in line]


@pytest.mark.parametrize(
    ("options", "status", "parts"),
    [
        ((), 2, ("nothing to evaluate", "--tasks")),
        (("--tasks", "arc_eazy"), 2, ("arc_eazy", "lm_eval ls tasks")),
        (("--perplexity", "no-file-named"), 2, ("--perplexity", "NAME=FILE")),
        (("--perplexity", "a=x.txt,a=y.txt"), 2, ("two texts have the same name",)),
        (("--perplexity", "a=/nowhere.txt"), 1, ("/nowhere.txt",)),
        (("--perplexity", "a={text}", "--ppl-context", 1024), 1, ("--ppl-context 1024", "512 positions")),
    ],
)
def test_bad_options_change_nothing(
    options: tuple[object, ...], status: int, parts: tuple[str, ...], finished: Path, text: Path
) -> None:
    before = snapshot(finished)
    assert_refused(nbl("eval", finished, *(str(o).replace("{text}", str(text)) for o in options)), status, *parts)
    assert snapshot(finished) == before


def spoil(**changes: Any) -> Any:
    """What changes a value of the first entry."""

    def change(run: Path) -> None:
        value = read(run)
        value["results"][0].update(changes)
        (run / "eval.json").write_text(json.dumps(value))

    return change


DAMAGED: dict[str, Any] = {
    "cut": lambda run: truncate(run / "eval.json", 500),
    "binary": lambda run: (run / "eval.json").write_bytes(b"\xff\0"),
    "deep": lambda run: (run / "eval.json").write_text("[" * 100_000),
    "another schema": lambda run: edit(run / "eval.json", schema=99),
    "no metrics": spoil(metrics=None),
    "no number": spoil(seconds=float("nan")),
    "scores of words": spoil(scores={"acc": "d"}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_eval_json_is_not_written_over(case: str, run: Path, data: dict[str, Path]) -> None:
    """Its figures may have taken hours."""
    DAMAGED[case](run)
    before = snapshot(run)
    refused = nbl("eval", run, "--tasks", data["piqa"], "--limit", 1)
    assert refused.status == 1
    assert "eval.json" in refused.err and "move it away" in refused.err and "Traceback" not in refused.err
    assert snapshot(run) == before
