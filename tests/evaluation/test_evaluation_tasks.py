"""Stock tasks on local files: the harness' own prompts and metrics, and what a bad file is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError, UsageError
from nbl_export.evaluation.local_data import find_local, wikitext_pages

from ..evaluation_tiny import LAMBADA, PIQA, PIQA_LABELS, QUESTIONS, WIKI, write_rows, write_tasks

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'nbl-export[eval]'")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


def stock_documents(task: str) -> list[dict[str, Any]]:
    """The tiny files' content as rows of the stock data sets, written down by hand."""
    if task == "lambada_openai":
        return [{"text": f"{row['context']} {row['continuation']}"} for row in LAMBADA]
    if task == "piqa":
        return [{**row, "label": label} for row, label in zip(PIQA, PIQA_LABELS, strict=True)]
    if task == "wikitext":
        # The blank line in front of the first title is an article of its own nowhere: it holds nothing.
        first, second = WIKI.index(" = First"), WIKI.index(" = Second")
        return [{"page": WIKI[first : second - 1]}, {"page": WIKI[second:]}]
    return [
        {
            "question": row["question"],
            "choices": {"text": row["choices"], "label": list("ABCD")[: len(row["choices"])]},
            "answerKey": "ABCD"[row["gold"]],
        }
        for row in QUESTIONS
    ]


def requests(task: Any, documents: list[dict[str, Any]]) -> list[Any]:
    """Prompts and continuations as the harness' own code makes them of stock documents."""
    made = []
    for document in documents:
        context = task.fewshot_context(document, num_fewshot=0)
        built = task.construct_requests(document, context, doc_id=0, task_name="t", repeats=1)
        made += [r.args for r in (built if isinstance(built, list) else [built])]
    return made


@pytest.mark.parametrize("name", ["lambada_openai", "arc_easy", "piqa", "wikitext"])
def test_prompts_are_those_of_the_stock_task(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval.tasks import TaskManager

    from nbl_export.evaluation.tasks import _catalogue, load_benchmark

    benchmark = load_benchmark(name, data)
    documents = stock_documents(name)
    stock_set = datasets.Dataset.from_list(documents)
    splits = dict.fromkeys(("train", "validation", "test"), stock_set)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)  # only the download is not the harness'
    catalogue: TaskManager = _catalogue()
    stock = catalogue.load([name])["tasks"][name]
    benchmark.task.build_all_requests(limit=None, rank=0, world_size=1)
    asked = [instance.args for instance in benchmark.task.instances]
    assert asked == requests(stock, documents)
    assert len(asked) == {"lambada_openai": 3, "arc_easy": 9, "piqa": 4, "wikitext": 2}[name]
    assert benchmark.task.aggregation() == stock.aggregation()
    assert benchmark.config["num_fewshot"] == 0
    for ours, theirs in zip(benchmark.task.eval_docs, documents, strict=True):
        assert benchmark.task.doc_to_target(ours) == stock.doc_to_target(theirs)


def test_rows_of_the_stock_data_set_are_taken_as_they_are(tmp_path: Path) -> None:
    from nbl_export.evaluation.tasks import load_benchmark

    write_rows(tmp_path / "arc_easy" / "test.jsonl", stock_documents("arc_easy"))
    write_rows(tmp_path / "boolq" / "validation.jsonl", [{"question": "is it", "passage": "It is.", "label": 1}])
    assert len(load_benchmark("arc_easy", tmp_path).task.eval_docs) == 3
    boolq = load_benchmark("boolq", tmp_path)
    assert boolq.task.doc_to_text(boolq.task.eval_docs[0]) == "It is.\nQuestion: is it?\nAnswer:"
    assert boolq.data["split"] == "validation"


def test_articles_begin_at_their_titles() -> None:
    assert [page.split("\n")[0] for page in wikitext_pages(WIKI)] == [" = First = ", " = Second = "]


@pytest.mark.parametrize(
    ("task", "file", "content", "parts"),
    [
        ("piqa", "validation.jsonl", [{"goal": "a", "sol1": "b", "label": 0}], ("document 1", "'sol2'", "piqa")),
        ("piqa", "validation.jsonl", [{**PIQA[0], "label": 0}, {"goal": "a", "label": 1}], ("document 2", "'sol1'")),
        ("piqa", "validation.jsonl", [{**PIQA[0], "label": 2}], ("document 1", "neither 0 nor 1")),
        ("lambada_openai", "test.jsonl", [{"context": "a"}], ("document 1", "'continuation'")),
        ("lambada_openai", "test.jsonl", [{"context": "a", "continuation": "two words"}], ("not one word",)),
        ("arc_easy", "test.jsonl", [{**QUESTIONS[0], "gold": 4}], ("document 1", "gold 4 of 4")),
        ("arc_easy", "test.jsonl", [{**QUESTIONS[0], "gold": None}], ("document 1", "'gold'")),
        ("boolq", "validation.jsonl", [{"question": "is it", "label": 1}], ("boolq", "passage")),
        ("arc_easy", "test.jsonl", "", ("is empty",)),
        ("arc_easy", "test.jsonl", "\n \n", ("is empty",)),
        ("arc_easy", "test.jsonl", "{oops\n", ("line 1", "not JSON")),
        ("arc_easy", "test.jsonl", "[1]\n", ("line 1", "not an object")),
        ("wikitext", "wiki.test.raw", "\n", ("is empty",)),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(
    task: str, file: str, content: Any, parts: tuple[str, ...], tmp_path: Path
) -> None:
    from nbl_export.evaluation.tasks import load_benchmark

    path = tmp_path / task / file
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
    with pytest.raises(NblError) as refusal:
        load_benchmark(task, tmp_path)
    assert all(part in str(refusal.value) for part in (str(path), *parts)), refusal.value
    assert "\n" not in str(refusal.value)


def test_answers_that_do_not_fit_their_questions_are_refused(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    (tmp_path / "piqa" / "valid-labels.lst").write_text("0\n")
    with pytest.raises(NblError, match="1 answers for the 2 documents"):
        find_local("piqa", tmp_path, {"validation_split": "validation"})


def test_a_task_that_is_none(data: Path) -> None:
    from nbl_export.evaluation.tasks import load_benchmark

    with pytest.raises(UsageError, match=r"has no task 'arc_eazy'; did you mean arc_easy"):
        load_benchmark("arc_eazy", data)
    with pytest.raises(UsageError, match="ai2_arc is a group of tasks"):
        load_benchmark("ai2_arc", data)
    with pytest.raises(NblError, match=r"task hellaswag: .* has no file for it, and its data set cannot be fetched"):
        load_benchmark("hellaswag", data)
    with pytest.raises(NblError, match="is not a directory"):
        load_benchmark("piqa", data / "nowhere")
