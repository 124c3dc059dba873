"""The command line end to end on tiny decoders: what the main job leaves behind, and every subcommand on it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from nbl_export.report.words import number
from nbl_export.targets.onnx.genai import GenaiRunner
from nbl_export.trust.terminal import visible
from nbl_export.version import __version__

from ..command import (
    TINY,
    Outcome,
    assert_refused,
    configured,
    in_new_process,
    keys,
    nbl,
    repeated,
    snapshot,
    stage_lines,
)
from ..jobs import until
from ..tiny import HEAD_DIM, LAYERS

pytestmark = [pytest.mark.job, pytest.mark.process]

Same = tuple[object, ...]

STAGES = ["calibrate", "plan", "decoder graph", "rewrite", "verify", "bench", "report"]
DEPLOYED = {"model.onnx", "all_logits.onnx", "model.onnx.data", "genai_config.json", "config.json",
            "generation_config.json", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
SUBCOMMANDS = ["calibrate", "plan", "rewrite", "verify", "bench", "report", "generate", "inspect", "doctor"]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def answer(*arguments: object) -> Any:
    """What a command prints with --json."""
    done = nbl(*arguments, "--json")
    assert done.status == 0, done.err
    return json.loads(done.out)


# -- what the main job leaves ----------------------------------------------------------------------------------


def test_leaves_the_files_of_the_run_directory_and_no_others(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names - {".lock"} == {
        "nbl.json", "text.safetensors", "sums.safetensors", "maps.safetensors", "original", "model", "verify.json",
        "bench.json", "report.html", "report.md", "report.json",
    }  # fmt: skip
    assert {p.name for p in (finished / "original").iterdir()} == DEPLOYED
    assert {p.name for p in (finished / "model").iterdir()} == DEPLOYED | {"nbl.json"}


def test_manifest_says_what_was_done(finished: Path, same: Same, text: Path) -> None:
    facts = read(finished / "nbl.json")
    assert facts["schema"] == 1
    assert facts["status"] == "verified"
    assert facts["model"]["name"] == str(same[1])
    assert facts["model"]["architecture"] == "llama"
    assert facts["num_layers"] == LAYERS
    assert facts["tap"] == "residual"
    assert facts["calibration"]["name"] == text.name
    assert facts["calibration"]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert facts["calibration"]["tokens"] == 1024
    assert {"torch", "transformers", "onnxruntime", "onnxruntime-genai"} <= set(facts["versions"])
    assert [s["layer"] for s in facts["scores"]] == list(range(LAYERS))
    assert all({"bound", "nmse", "relative_error"} <= set(s) for s in facts["scores"])
    smallest = min(facts["scores"], key=lambda s: s["bound"])
    assert facts["replaced_layers"] == [smallest["layer"]]  # a quarter of three layers, rounded
    options = facts["options"]
    assert (options["precision"], options["engine"], options["decoder_source"]) == ("int8", "ort", "genai")
    assert (options["context"], options["depths"], options["repetitions"]) == (64, [0], 1)


def test_the_report_says_that_int8_is_of_activations_too(finished: Path) -> None:
    assert read(finished / "nbl.json")["rounds_activations"] is True
    for page in ("report.md", "report.html"):
        assert "int8, activations too, with a scale a token" in (finished / page).read_text(encoding="utf-8")


def test_manifest_has_the_hash_of_every_file_and_the_seconds_of_every_stage(finished: Path) -> None:
    stages = read(finished / "nbl.json")["stages"]
    assert list(stages) == ["text", "calibrate", "plan", "decoder", "rewrite", "verify", "bench", "report"]
    said = re.findall(r": done in ([\d.]+) s$", finished.with_name("stderr").read_text(encoding="utf-8"), re.MULTILINE)
    assert [stage["seconds"] for stage in stages.values()] == pytest.approx([float(s) for s in said], abs=0.051)
    assert sum(stage["seconds"] for stage in stages.values()) > 0.1
    recorded = {name: digest for stage in stages.values() for name, digest in stage["files"].items()}
    found = snapshot(finished)
    found.pop("nbl.json")
    assert recorded == found


def test_every_rung_is_recorded_with_its_tolerance(finished: Path) -> None:
    result = read(finished / "verify.json")
    assert result["passed"] is True
    assert {(r["check"], r["subject"]) for r in result["checks"]} == {
        ("structure", "original"), ("structure", "nbl"), ("exporter", "original"), ("original", "original"),
        ("nbl", "nbl"), ("text", "original"), ("text", "nbl"), ("last_token", "original"), ("last_token", "nbl"),
        ("shipped", "nbl"),
    }  # fmt: skip
    unbounded = {(r["check"], r["subject"]) for r in result["checks"] if r["tolerance"] is None}
    assert unbounded == {("text", "original")}
    assert all(r["passed"] and (r["tolerance"] is None or r["value"] <= r["tolerance"]) for r in result["checks"])
    batched = [r for r in result["checks"] if r["check"] == "nbl" and "batch of 2" in r["detail"]]
    assert {r["metric"].rpartition(" ")[2] for r in batched} == {"prefill", "decode"}
    assert len(result["quality_loss"]) == 1 + 1  # the text's own end, and one that is not calibrated on
    assert all(p["kl_mean"] > 0 and 0 < p["top1_agreement"] < 1 for p in result["quality_loss"])
    assert result["cache_bytes_per_token"] == {"original": 3 * 2 * 2 * HEAD_DIM * 4, "nbl": 2 * 2 * 2 * HEAD_DIM * 4}


def test_answers_are_what_each_folder_writes_behind_the_prompts(finished: Path) -> None:
    answers = read(finished / "verify.json")["answers"]
    assert len({one["prompt"] for one in answers}) == 3
    for name, which in (("original", "original"), ("nbl", "model")):
        with GenaiRunner(finished / which) as runner:
            for one in answers:
                ids = runner.encode(one["prompt"], chat=False)
                assert one[name] == runner.text.behind(ids, runner.greedy(ids, 32)), (name, one["prompt"])
    assert all(one["original"] != one["nbl"] for one in answers)  # of a random model


def test_bench_keeps_raw_timings_and_report_has_a_row_of_each(finished: Path) -> None:
    bench, report = read(finished / "bench.json"), read(finished / "report.json")
    wanted = {(test, 0, variant) for test in ("pp16", "tg4") for variant in ("original", "nbl")}
    assert {(t["test"], t["depth"], t["variant"]) for t in bench["timings"]} == wanted
    assert all(len(t["samples_ns"]) == 1 for t in bench["timings"])
    assert {(r["test"], r["depth"], r["variant"]) for r in report["rows"]} == wanted
    for row in report["rows"]:
        assert row["tokens_per_second_median"] == row["samples"][0] > 0
        assert row["tokens_per_second_stdev"] == 0
    for figure in ("peak_memory_bytes", "kv_cache_bytes", "model_bytes"):
        assert all(facts[figure] > 0 for facts in report["variants"].values()), figure
    caches = {variant: facts["kv_cache_bytes"] for variant, facts in report["variants"].items()}
    assert caches["nbl"] * 3 == caches["original"] * 2
    assert {"cpu", "cores", "memory_bytes", "os"} <= set(report["machine"])
    assert report["status"] == "verified"


RESULT = ["verdict", "layers", "TTFT", "decode", "KV", "loss", "faster", "try"]


def test_stages_go_to_stderr_and_the_result_to_stdout(finished: Path) -> None:
    """And nothing else: no warnings, bars or log lines of libraries."""
    assert finished.with_name("stdout").read_text(encoding="utf-8") == f"{finished / 'report.html'}\n"
    said = finished.with_name("stderr").read_text(encoding="utf-8")
    assert stage_lines(Outcome(0, "", said)) == dict.fromkeys(STAGES, "done")
    quality_loss = [line for line in said.splitlines() if line.startswith("  perplexity ")]
    assert len(quality_loss) == 2 and all(" to " in line and "2,048 tokens" in line for line in quality_loss)
    busy = [line for line in said.splitlines() if "measured on a busy machine" in line]  # as it may be
    (curve,) = (line for line in said.splitlines() if line.startswith("  1 layer: "))
    assert curve.endswith(" prefill")
    stages, result = said.split("report: done")
    (checked,) = (line for line in said.splitlines() if line.startswith("  graphs: "))
    count = len(read(finished / "verify.json")["checks"])
    assert checked == f"  graphs: {count} of {count} checks passed"
    first = ["estimate", "method", "loss", "gain", curve, checked]
    assert len(stages.splitlines()) == 2 * (1 + len(STAGES)) - 1 + len(quality_loss) + len(busy) + len(first), said
    assert [line.split()[0] for line in result.splitlines()[1:] if line[2] != " "] == RESULT, said


def test_recorded_command_gives_the_same_run(finished: Path) -> None:
    done = nbl(*repeated(read(finished / "nbl.json")["command"]))
    assert set(stage_lines(done).values()) == {"reused"}, done.err


# -- other decoders, sources and precisions ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("mistral-window", ("--layers", "0,2")),
        ("llama", configured(decoder_source="mobius", layers="2")),
        ("llama", ("--precision", "int4")),
        ("llama", ("--precision", "int8", "--layers", "1,")),
    ],
    ids=["mistral with a window", "mobius", "int4", "int8"],
)
def test_main_job(
    architecture: str, options: Same, checkpoint: Any, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = snapshot(checkpoint(architecture))
    given = ("--model", checkpoint(architecture), "--calibration", text, *TINY, *options)
    done = nbl(*given, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert snapshot(checkpoint(architecture)) == before  # the model is only read
    facts = answer("inspect", tmp_path / "run")
    assert facts["status"] == "verified"
    assert facts["decoder"]["sliding_window"] == (16 if architecture == "mistral-window" else None)
    kept = LAYERS - len(facts["replaced_layers"])
    assert facts["variants"]["nbl"]["cache_layers"] == kept
    per_token = {name: v["kv_cache_bytes_per_token"] for name, v in facts["variants"].items()}
    assert read(tmp_path / "run" / "verify.json")["cache_bytes_per_token"] == per_token
    assert nbl("generate", tmp_path / "run", "The", "--max-new-tokens", 4).status == 0
    for which in ("original", "model"):
        assert read(tmp_path / "run" / which / "genai_config.json")["model"]["context_length"] == 512


def test_paths_with_spaces_and_other_scripts(
    checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative ones too; afterwards from another working directory, without model and text."""
    place = tmp_path / "my models, ü 模型"
    shutil.copytree(checkpoint("llama"), place / "tiny ‘llama’")
    shutil.copyfile(text, place / "text é.txt")
    monkeypatch.chdir(place)
    given = ("--model", "./tiny ‘llama’", "--calibration", "./text é.txt", *TINY)
    done = nbl(*given, "--output", "läufe/run 1")
    assert done.status == 0, done.err
    assert done.out == "läufe/run 1/report.html\n"
    assert nbl("generate", "läufe/run 1", "Größe 模型", "--max-new-tokens", 2).status == 0
    words = shlex.split(read(place / "läufe/run 1/nbl.json")["command"])
    assert words[words.index("--model") + 1] == "./tiny ‘llama’"
    monkeypatch.chdir(tmp_path)
    (place / "läufe/run 1/verify.json").unlink()  # verification needs model and text again
    done = nbl("verify", place / "läufe/run 1")
    assert done.status == 0, done.err


# -- subcommands -----------------------------------------------------------------------------------------------


def test_stages_by_hand_make_the_same_run(
    same: Same, checkpoint: Any, text: Path, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    few = ("--calibration-tokens", 1024, *keys(context=64, compute_dtype="float32"))
    done = nbl("calibrate", "--model", checkpoint("llama"), "--output", run, "--calibration", text, *few)
    assert (done.status, done.out) == (0, f"{run / 'sums.safetensors'}\n"), done.err
    assert answer("inspect", run)["status"] == "incomplete"
    assert "not finished: give the command again" in " ".join(nbl("inspect", run).out.split())
    assert "not finished" not in nbl("inspect", finished).out
    assert answer("plan", run, "--layers", 1)["replaced_layers"] == read(finished / "nbl.json")["replaced_layers"]
    done = nbl("rewrite", run)
    assert (done.status, done.out) == (0, f"{run / 'model'}\n"), done.err
    assert answer("verify", run)["passed"] is True
    short = ("--depth", 0, "--repetitions", 1, "--prompt-tokens", 16, "--generate-tokens", 4)
    assert len(answer("bench", run, *short)["rows"]) == 4
    done = nbl("report", run)
    assert (done.status, done.out) == (0, f"{run / 'report.html'}\n"), done.err
    assert set(stage_lines(nbl(*same, "--output", run)).values()) == {"reused"}
    ours, theirs = snapshot(run), snapshot(finished)
    timed = {"nbl.json", "bench.json", "report.html", "report.md", "report.json", "model/nbl.json"}
    assert {n: h for n, h in ours.items() if n not in timed} == {n: h for n, h in theirs.items() if n not in timed}


def test_tables_hold_the_figures(run: Path) -> None:
    planned, measured = answer("plan", run), answer("bench", run)
    table = nbl("plan", run).out
    for score in planned["scores"]:
        row = next(line for line in table.splitlines() if line.split()[:2] == ["│", str(score["layer"])])
        assert all(number(score[name]) in row for name in ("bound", "nmse", "relative_error")), row
        assert ("replaced" in row) == (score["layer"] in planned["replaced_layers"])
    table = nbl("bench", run).out
    assert "Speed" in table
    assert all(number(row["tokens_per_second_median"]) in table for row in measured["rows"])


def test_json_is_alone_on_stdout_and_stderr_is_quiet(run: Path) -> None:
    for command in ("plan", "verify", "bench", "inspect"):
        done = nbl(command, run, "--json")
        assert json.loads(done.out)
        assert done.err == "", command


def test_doctor_names_every_engine_with_its_reason() -> None:
    from nbl_export.targets import ENGINES

    found = answer("doctor")
    assert set(found) == {*ENGINES, "ort --provider cuda"}
    assert all(isinstance(engine["available"], bool) and engine["reason"] for engine in found.values())
    assert found["ort"]["available"], found["ort"]["reason"]
    halves = nbl("doctor").out.split("Could be added")
    for name, engine in found.items():
        assert all(word in halves[not engine["available"]] for word in name.split()), name


def test_generate_streams_text_of_either_decoder(finished: Path) -> None:
    """Three forms of the same answer; the original's is what the runner says for the original directory."""
    limit = ("--max-new-tokens", 6)
    said = nbl("generate", finished, "The language", *limit)
    assert said.status == 0, said.err
    assert said.out.endswith("\n")
    assert nbl("generate", finished / "model", "The language", *limit).out == said.out
    assert nbl("generate", finished, "The language", *limit, "--raw").out == said.out  # no template to leave out
    with GenaiRunner(finished / "original") as runner:
        expected = "".join(runner.stream(runner.encode("The language", chat=False), 6))
    original = visible(expected) + "\n"
    assert nbl("generate", finished, "The language", *limit, "--original").out == original
    both = nbl("generate", finished, "The language", *limit, "--both")
    assert both.out == f"original:\n{original}NBL:\n{said.out}"
    assert_refused(nbl("generate", finished, "Hi", "--both", "--original"), 2, "give one of --original and --both")
    assert_refused(nbl("generate", finished / "model", "Hi", "--both"), 2, "holds one decoder", "run directory")


def test_generate_applies_a_chat_template_but_not_with_raw(run: Path) -> None:
    plain = nbl("generate", run, "Say yes", "--max-new-tokens", 6).out
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}Answer:"
    (run / "model" / "chat_template.jinja").write_text(template, encoding="utf-8")
    arguments = ("generate", run / "model", "Say yes", "--max-new-tokens", 6)
    assert nbl(*arguments).out != plain
    assert nbl(*arguments, "--raw").out == plain


def test_version() -> None:
    assert nbl("--version").out == f"{__version__}\n"


# -- what is loaded, and what is not needed ----------------------------------------------------------------------

_WATCH = """
import atexit, sys
heavy = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "tensorrt", "mobius")
atexit.register(lambda: print("LOADED", [m for m in heavy if sys.modules.get(m)], file=sys.stderr))
"""
_NO_TORCH = """
sys.modules.update(torch=None, transformers=None, onnx_ir=None, mobius=None, optimum=None, matplotlib=None)
"""


def test_help_loads_neither_torch_nor_an_engine() -> None:
    done = in_new_process("--help-all", code=_WATCH)
    assert done.status == 0, done.err
    assert done.err == "LOADED []\n"
    assert all(name in done.out for name in (*SUBCOMMANDS, "--calibration-tokens", "  decoder_source"))


def test_a_finished_run_is_served_without_torch_and_without_its_model(run: Path) -> None:
    """Moved to a machine that only runs engines: bench, report, generate and inspect."""
    manifest = read(run / "nbl.json")
    manifest["options"] |= {"model": "/not/there", "calibration": ["/not/there.txt"]}
    manifest["places"] = {"model": "/not/there", "calibration": ["/not/there.txt"]}
    (run / "nbl.json").write_text(json.dumps(manifest))
    code = _WATCH + _NO_TORCH
    done = in_new_process("bench", run, "--generate-tokens", 3, code=code)
    assert done.status == 0, done.err
    assert "3 new" in done.out
    assert "'onnxruntime_genai'" in done.err.splitlines()[-1]
    (run / "report.html").unlink()
    for arguments in (("report", run), ("inspect", run), ("generate", run, "The", "--max-new-tokens", "2")):
        done = in_new_process(*arguments, code=code)
        assert done.status == 0, done.err
    assert (run / "report.html").exists() and "<svg" not in (run / "report.html").read_text(encoding="utf-8")
    assert nbl("inspect", run, "--json").status == 0


def test_maps_are_distilled_on_the_normed_input(same: Same, tmp_path: Path) -> None:
    with until("distill"):
        done = nbl(*same, "--fit", "distilled", *configured(distill_steps=2), "--output", tmp_path / "run")
    assert done.status == 0, done.err
    facts = read(tmp_path / "run" / "nbl.json")
    assert (facts["tap"], facts["fit"]["kind"]) == ("normed", "distilled")
    assert not list((tmp_path / "run").glob("*.partial.safetensors"))
