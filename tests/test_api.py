"""The Python door: its pages' examples run, and nothing heavy is loaded."""

from __future__ import annotations

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

from .command import in_new_process

DOCS = Path(__file__).parent.parent / "docs"
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
    export, estimate = api.export, api.estimate
    monkeypatch.setattr(api, "export", lambda *a, **o: export(*a, calibration=text, **{**o, **SHORT}))
    monkeypatch.setattr(api, "estimate", lambda *a, **o: estimate(*a, **{**o, "layers": 1}))
    blocks = [block.replace(HUB_ID, str(checkpoint("llama"))) for block in examples()]
    names: dict[str, Any] = {}
    assert len(blocks) > 4
    for block in blocks:
        exec(compile(block, "example", "exec"), names)
    assert (tmp_path / "checkpoint" / "config.json").is_file()
    said = capsys.readouterr()
    assert "calibrate: reused" in said.err and "bench: reused" in said.err  # the same options as on the command line
    if examples is of_page:
        assert "1 of 3 replaced" in said.out and "abacus" in said.out


def test_the_report_is_that_of_the_run(finished: Path) -> None:
    run, report = nbl.open(finished), json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert run.status == "verified"
    for name in ("replaced_layers", "quality_loss", "rows", "ratios", "curve", "cache_bytes_per_token"):
        assert run.report[name] == report[name]


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
    with pytest.raises(NblError, match="not verified yet: run its command again"):
        _ = run.report
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
print(nbl.open({str(finished)!r}).report["quality_loss"][0]["text"])
print([m for m in ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "openvino", "typer") if m in sys.modules])
sys.exit()
"""
    done = in_new_process(code=code)
    assert done.out.splitlines()[-1] == "[]", done
