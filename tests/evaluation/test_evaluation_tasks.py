"""Tasks of the harness as subjects: local rows, groups, examples, what identifies them, and what bad ones are told."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError, UsageError
from nbl_export.evaluation.tasks import load_tasks, run_task

from ..evaluation_tiny import LAMBADA, PIQA, QUESTIONS, TASKS, write_rows, write_task

pytestmark = pytest.mark.engine

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[eval]'")


PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def load(path: Path, limit: int | None = None) -> Any:
    (subject,) = load_tasks((str(path),), limit)
    return subject


@pytest.mark.parametrize(
    ("task", "split", "rows", "part"),
    [
        ("lambada_openai", "test", [{"words": "a"}], "'text' is undefined"),
        ("arc_easy", "test", [QUESTIONS[0], {**QUESTIONS[1], "answerKey": "E"}], "'E' is not in list"),
        ("boolq", "validation", [{"question": "is it", "label": 1}], "'passage' is undefined"),
        ("arc_easy", "test", [], "arc_easy"),
    ],
)
def test_a_bad_document_is_an_error_of_one_sentence(
    task: str, split: str, rows: list[dict[str, Any]], part: str, tmp_path: Path
) -> None:
    path = write_task(tmp_path, task, **{split: rows})
    with pytest.raises(NblError) as refusal:
        load(path)
    assert str(path) in str(refusal.value) and part in str(refusal.value), refusal.value
    assert "\n" not in str(refusal.value)


def test_a_task_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"'arc_eazy' is neither a file nor a task .*; lm_eval ls tasks lists them"):
        load_tasks(("arc_eazy",), None)
    with pytest.raises(NblError, match=r"hellaswag cannot be loaded .*; check the network, or give a YAML file"):
        load_tasks(("hellaswag",), None)


def test_the_page_describes_a_task_on_local_documents(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    rows = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("/data/questions.jsonl", str(rows)), encoding="utf-8")
    subject = load(path)
    assert (subject.name, subject.data["documents"]) == ("mine", 3)
    assert run_task(subject.value, Guesser(), None).metrics["acc"].value == 2 / 3  # the first choice of each


def test_a_group_is_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    stock = datasets.Dataset.from_list(QUESTIONS)
    splits = dict.fromkeys(("train", "validation", "test"), stock)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    found = load_tasks(("arc_easy", "ai2_arc"), 2)
    assert sorted((subject.name, subject.limit) for subject in found) == [("arc_challenge", 2), ("arc_easy", 2)]


def test_rows_identify_a_task_and_their_place_does_not(tmp_path: Path) -> None:
    first = load(write_task(tmp_path / "a", "piqa", validation=PIQA))
    assert load(write_task(tmp_path / "b", "piqa", validation=PIQA), limit=2).asked == first.asked
    assert load(write_task(tmp_path / "c", "piqa", validation=PIQA[::-1])).asked != first.asked
    assert load(write_task(tmp_path / "d", "piqa", validation=PIQA), limit=1).asked != first.asked


def test_examples_identify_a_task(tmp_path: Path) -> None:
    few, many = (load(sums(tmp_path / str(count), examples=count)) for count in (5, 40))
    assert few.config["num_fewshot"] == 5 and few.asked != many.asked


def sums(directory: Path, *, examples: int) -> Path:
    """Two documents of a task that has five examples in a prompt, and rows for these."""
    rows = [{"question": f"{k}?", "answer": f"#### {k}"} for k in range(2 + examples)]
    return write_task(directory, "gsm8k", test=rows[:2], train=rows[2:])


class Guesser:
    """A model that says nothing, and remembers the prompts."""

    rank, world_size, progress = 0, 1, None

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def loglikelihood(self, asked: list[Any]) -> list[tuple[float, bool]]:
        return [(0.0, False)] * len(asked)

    def generate_until(self, asked: list[Any]) -> list[str]:
        self.prompts += [request.args[0] for request in asked]
        return [""] * len(asked)

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def get_model_info(self) -> dict[str, Any]:
        return {}


def test_every_model_gets_the_same_examples_of_the_task(tmp_path: Path) -> None:
    subject = load(sums(tmp_path, examples=40))
    models = (Guesser(), Guesser())
    found = [run_task(subject.value, model, None) for model in models]
    assert found[0].items == 2
    assert models[0].prompts == models[1].prompts and [p.count("?") for p in models[0].prompts] == [6, 6]


def test_missing_examples_are_an_error_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(NblError, match=r"gsm8k\.yaml cannot be loaded"):
        load(sums(tmp_path, examples=2))


def test_files_in_other_forms_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    convert = importlib.import_module("stock_rows").convert

    files, data = tmp_path / "files", tmp_path / "data"
    words = [row["text"].rpartition(" ") for row in LAMBADA]
    write_rows(files / "lambada_openai/test.jsonl", [{"context": a, "continuation": f" {b}"} for a, _, b in words])
    forms = [
        {"question": r["question"], "choices": r["choices"]["text"], "gold": "ABCD".index(r["answerKey"])}
        for r in QUESTIONS
    ]
    write_rows(files / "arc_easy" / "test.jsonl", forms)
    write_rows(files / "piqa" / "valid.jsonl", [{k: v for k, v in row.items() if k != "label"} for row in PIQA])
    (files / "piqa" / "valid-labels.lst").write_text("0\n1\n")
    assert convert(files, data) == [data / f"{task}.yaml" for task in ("lambada_openai", "arc_easy", "piqa")]
    for task, name in (("lambada_openai", "test"), ("arc_easy", "test"), ("piqa", "validation")):
        lines = (data / task / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == TASKS[task]
    loaded = load_tasks((str(data / "piqa.yaml"),), None)
    assert [(subject.name, subject.data["documents"]) for subject in loaded] == [("piqa", 2)]
