"""The Python door: its pages' examples run, its values are those of the report, and nothing heavy is loaded."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nbl_export as nbl
from nbl_export import api
from nbl_export.errors import CorruptError, NblError
from nbl_export.records.quality import Interval
from nbl_export.report.page import summarize

from ..command import in_new_process
from ..report.test_report import BENCH, MANIFEST, VERIFY

pytestmark = pytest.mark.process

DOCS = Path(__file__).parent.parent.parent / "docs"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHORT: dict[str, Any] = {
    "layers": 1, "depths": 0, "repetitions": 1, "prompt_tokens": 16, "generate_tokens": 4, "compute_dtype": "float32",
    "calibration_tokens": 1024, "context": 64,
}  # as tiny.toml has it  # fmt: skip


def of_page() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / "python.md").read_text(encoding="utf-8"), re.M | re.S)


def of_notebook() -> list[str]:
    cells = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("examples", [of_page, of_notebook])
def test_examples_run(
    examples: Callable[[], list[str]], checkpoint: Any, text: Path, finished: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On a tiny model, with the small options of the finished run that lies where the examples write."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "smollm2")
    shutil.copyfile(text, tmp_path / "text.txt")
    export, estimate = api.export, api.estimate
    monkeypatch.setattr(api, "export", lambda *a, **o: export(*a, calibration=text, **{**o, **SHORT}))
    monkeypatch.setattr(api, "estimate", lambda *a, **o: estimate(*a, **{**o, "layers": 1}))
    blocks = [block.replace(HUB_ID, str(checkpoint("llama"))) for block in examples()]
    names: dict[str, Any] = {}
    assert len(blocks) > 5
    for block in blocks:
        exec(compile(block, "example", "exec"), names)
    assert (tmp_path / "checkpoint" / "config.json").is_file()
    said = capsys.readouterr()
    assert "calibrate: reused" in said.err and "bench: reused" in said.err  # the same options as on the command line
    if examples is of_page:
        assert "1 of 3 replaced" in said.out and "abacus" in said.out
        assert (tmp_path / "linear" / "config.json").is_file()


def test_values_are_those_of_the_report(finished: Path) -> None:
    run, report = nbl.open(finished), json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert (run.status, list(run.layers)) == ("verified", report["replaced_layers"])
    assert [s.verdict for s in run.speed] == [row["verdict"] for row in report["ratios"]]
    assert [p.prefill for p in run.curve()] == [p["prefill"] for p in report["curve"]["points"]]


def test_each_figure_has_its_own_place(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a report in which no two figures are equal, with a test at two depths."""
    report = summarize(copy.deepcopy(MANIFEST), copy.deepcopy(VERIFY), copy.deepcopy(BENCH))
    monkeypatch.setattr(api.Run, "_found", lambda _: report)
    run = nbl.open(finished)
    assert run.loss == (
        api.Loss("held-back calibration", 8192, 20.0, 25.0, Interval(0.25, 0.181, 0.3234),
                 Interval(0.1234, 0.1113, 0.1371), Interval(0.8, 0.7821, 0.8179)),
    )  # fmt: skip
    found = {(s.phase, s.tokens, s.depth): s for s in run.speed}
    assert [(where, s.original, s.nbl) for where, s in found.items()] == [
        (("prefill", 512, 0), 512 / 2.5, 512 / 1.5), (("decode", 128, 0), 128 / 5, 128 / 4),
        (("decode", 128, 64), 128 / 2, 128 / 4),
    ]  # fmt: skip
    assert found["prefill", 512, 0].ratio == Interval(2.0, 1.25, 3.0)


def test_what_a_model_says_is_no_html() -> None:
    shown = api.Answers("p", "<script>a</script>", 'b & "c"')._repr_html_()
    assert "&lt;script&gt;a&lt;/script&gt;" in shown and "b &amp; &quot;c&quot;" in shown and "<script>" not in shown


def test_a_notebook_shows_the_first_screen(finished: Path) -> None:
    shown = nbl.open(finished)._repr_html_() or ""
    assert shown.startswith("<iframe")
    assert (shown.count("<"), shown.count('"')) == (2, 10)  # the page is inert text of an attribute
    assert "KV cache" in shown and "Verification</h2>" not in shown


def test_an_unfinished_run_says_so(finished: Path, tmp_path: Path) -> None:
    manifest = json.loads((finished / "nbl.json").read_text(encoding="utf-8"))
    manifest["stages"] = {"calibrate": manifest["stages"]["calibrate"]}
    del manifest["replaced_layers"]
    (tmp_path / "nbl.json").write_text(json.dumps({**manifest, "status": "incomplete"}), encoding="utf-8")
    run = nbl.open(tmp_path)
    assert run._repr_html_() is None and "incomplete" in str(run)
    for ask in (lambda: run.loss, lambda: run.layers):
        with pytest.raises(NblError, match="yet: run its command again"):
            ask()
    with pytest.raises(NblError, match="does not exist"):
        nbl.open(tmp_path / "none")


def test_results_of_a_stranger_are_an_error_of_one_sentence(run: Path) -> None:
    found = json.loads((run / "verify.json").read_text(encoding="utf-8"))
    found["quality_loss"][0]["increase_interval"] = 7
    (run / "verify.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(CorruptError, match="'increase_interval' is of the wrong kind"):
        str(nbl.open(run))


def test_open_loads_nothing_heavy(finished: Path) -> None:
    code = f"""
import nbl_export as nbl
print(nbl.open({str(finished)!r}).loss[0].text, nbl.open({str(finished)!r}).speed[0].phase)
import nbl_export.api
print([m for m in ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "openvino", "click") if m in sys.modules])
sys.exit()
"""
    done = in_new_process(code=code)
    assert done.out.splitlines()[-1] == "[]", done
