"""Stock tasks on local files: the harness' own prompts and metrics, and what a bad file is told."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError, UsageError

from ..evaluation_tiny import LAMBADA, PIQA, QUESTIONS, TASKS, write_rows, write_tasks

pytestmark = pytest.mark.engine

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'nbl-export[eval]'")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


def requests(task: Any, documents: list[dict[str, Any]]) -> list[Any]:
    """Prompts and continuations as the harness' own code makes them of stock documents."""
    made = []
    for document in documents:
        context = task.fewshot_context(document, num_fewshot=0)
        built = task.construct_requests(document, context, doc_id=0, task_name="t", repeats=1)
        made += [r.args for r in (built if isinstance(built, list) else [built])]
    return made


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_those_of_the_stock_task(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval.tasks import TaskManager

    from nbl_export.evaluation.tasks import _catalogue, load_benchmark

    benchmark = load_benchmark(name, data)
    task, documents = benchmark.task, TASKS[name]
    stock_set = datasets.Dataset.from_list(documents)
    splits = dict.fromkeys(("train", "validation", "test"), stock_set)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)  # only the download is not the harness'
    catalogue: TaskManager = _catalogue()
    stock = catalogue.load([name])["tasks"][name]
    task.build_all_requests(limit=None, rank=0, world_size=1)
    asked = [instance.args for instance in task.instances]
    assert asked == requests(stock, documents)
    assert len(asked) == {"lambada_openai": 3, "arc_easy": 9, "piqa": 4, "wikitext": 2}[name]
    assert task.aggregation() == stock.aggregation()
    assert benchmark.config["num_fewshot"] == 0
    for ours, theirs in zip(task.eval_docs, documents, strict=True):
        assert task.doc_to_target(ours) == stock.doc_to_target(theirs)


def test_the_validation_split_stands_in_for_a_test_split(tmp_path: Path) -> None:
    from nbl_export.evaluation.tasks import load_benchmark

    write_rows(tmp_path / "boolq" / "validation.jsonl", [{"question": "is it", "passage": "It is.", "label": 1}])
    boolq = load_benchmark("boolq", tmp_path)
    assert boolq.task.doc_to_text(boolq.task.eval_docs[0]) == "It is.\nQuestion: is it?\nAnswer:"
    assert boolq.data["split"] == "validation"


@pytest.mark.parametrize(
    ("task", "file", "content", "parts"),
    [
        ("piqa", "validation.jsonl", [PIQA[0], {"goal": "a", "label": 1}], ("line 2", "no field 'sol1'")),
        ("lambada_openai", "test.jsonl", [{"words": "a"}], ("does not fit", "'text'")),
        ("arc_easy", "test.jsonl", [{**QUESTIONS[0], "answerKey": "E"}], ("arc_easy", "'E'")),
        ("boolq", "validation.jsonl", [{"question": "is it", "label": 1}], ("boolq", "passage")),
        ("arc_easy", "test.jsonl", "", ("is empty",)),
        ("arc_easy", "test.jsonl", "\n \n", ("is empty",)),
        ("arc_easy", "test.jsonl", "{oops\n", ("line 1", "no row of JSON")),
        ("arc_easy", "test.jsonl", "[1]\n", ("line 1", "no row of JSON")),
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
    convert(files, data)
    for task, name in (("lambada_openai", "test"), ("arc_easy", "test"), ("piqa", "validation")):
        lines = (data / task / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == TASKS[task]


def test_a_task_that_is_none(data: Path) -> None:
    from nbl_export.evaluation.tasks import load_benchmark

    with pytest.raises(UsageError, match=r"has no task 'arc_eazy'; did you mean arc_easy"):
        load_benchmark("arc_eazy", data)
    for group in ("mmlu", "ai2_arc"):
        with pytest.raises(UsageError, match=rf"{group} is a group of tasks; lm_eval --model nbl-onnx runs it"):
            load_benchmark(group, data)
    with pytest.raises(NblError, match=r"hellaswag: its data set cannot be fetched .*give --data DIR with hella"):
        load_benchmark("hellaswag", data)
    with pytest.raises(NblError, match="is not a directory"):
        load_benchmark("piqa", data / "nowhere")


def sums(directory: Path, *, examples: int) -> Path:
    """Two documents of a task that has five examples in a prompt, and rows for these."""
    rows = [{"question": f"{k}?", "answer": f"#### {k}"} for k in range(2 + examples)]
    write_rows(directory / "gsm8k" / "test.jsonl", rows[:2])
    if examples:
        write_rows(directory / "gsm8k" / "train.jsonl", rows[2:])
    return directory


class Guesser:
    """A model that says nothing, and remembers the prompts."""

    rank, world_size, progress = 0, 1, None

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def generate_until(self, asked: list[Any]) -> list[str]:
        self.prompts += [request.args[0] for request in asked]
        return [""] * len(asked)

    def tok_encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def get_model_info(self) -> dict[str, Any]:
        return {}


def test_every_model_gets_the_same_examples_of_the_task(tmp_path: Path) -> None:
    from nbl_export.evaluation.tasks import load_benchmark, run_benchmark

    benchmark, models = load_benchmark("gsm8k", sums(tmp_path, examples=40)), (Guesser(), Guesser())
    found = [run_benchmark(benchmark, model, None) for model in models]
    assert benchmark.config["num_fewshot"] == 5 and found[0].items == 2
    assert models[0].prompts == models[1].prompts and [p.count("?") for p in models[0].prompts] == [6, 6]


def test_missing_examples_are_named(tmp_path: Path) -> None:
    from nbl_export.evaluation.tasks import load_benchmark

    with pytest.raises(NblError, match=r"gsm8k has 5 examples in a prompt; give .*gsm8k/train\.jsonl"):
        load_benchmark("gsm8k", sums(tmp_path / "none", examples=0))
    with pytest.raises(NblError, match="gsm8k has no prompt with 5 examples"):
        load_benchmark("gsm8k", sums(tmp_path / "few", examples=2))
