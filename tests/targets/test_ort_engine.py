"""The ONNX Runtime engine: its probe, its runner on tiny decoders, and directories that are not models."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.targets.onnx import engine, genai
from nbl_export.targets.onnx.genai import GenaiRunner

from ..tiny import HEAD_DIM, VOCAB

pytest.importorskip("onnxruntime_genai", reason="needs the extra cpu")

TOKENS = 40


def tokens_of(runner: GenaiRunner, count: int = TOKENS) -> list[int]:
    return np.random.default_rng(3).integers(3, runner.settings.vocab_size, count).tolist()


def logits_after(runner: GenaiRunner, chunks: Sequence[Sequence[int]]) -> np.ndarray:
    runner.begin(sum(map(len, chunks)))
    for chunk in chunks:
        runner.append(chunk)
    return runner.last_logits().copy()


@pytest.fixture
def directory(genai_dirs: dict[str, Path]) -> Path:
    return next(iter(genai_dirs.values()))


@pytest.fixture
def runner(directory: Path) -> Iterator[GenaiRunner]:
    with GenaiRunner(directory, threads=1) as runner:
        yield runner


# -- probe ---------------------------------------------------------------------------------------------


def test_the_probe_names_the_versions() -> None:
    answer = engine.ORT.probe()
    assert answer.available, answer.reason
    assert importlib.metadata.version("onnxruntime-genai") in answer.reason


def test_the_probe_refuses_two_builds_of_one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "is_installed", lambda name: name in ("onnxruntime", "onnxruntime-gpu"))
    answer = engine.ORT.probe()
    assert not answer.available
    assert "onnxruntime and onnxruntime-gpu" in answer.reason


def test_the_probe_refuses_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_known_answer", lambda _: [17.0, 31.0])
    assert not engine.ORT.probe().available


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> SimpleNamespace:
        raise ImportError(name)

    monkeypatch.setattr(genai.importlib, "import_module", absent)
    answer = engine.ORT.probe()
    assert not answer.available
    assert "onnxruntime-genai" in answer.reason and "pip install '.[cpu]' in a clone" in answer.reason
    (tmp_path / "genai_config.json").write_text(
        json.dumps({"model": {"context_length": 8, "vocab_size": 9, "eos_token_id": 2}})
    )
    with pytest.raises(MissingPackageError):
        GenaiRunner(tmp_path)


# -- directories that are not models -------------------------------------------------------------------


def _truncate(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: shutil.rmtree(d), "genai_config.json is missing"),
        (lambda d: (d / "genai_config.json").unlink(), "genai_config.json is missing"),
        (lambda d: (d / "genai_config.json").write_text('{"model": 3'), "genai_config.json cannot be read"),
        (lambda d: (d / "genai_config.json").write_text('{"model": {}}'), "genai_config.json cannot be read"),
        (lambda d: (d / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda d: _truncate(d / "model.onnx"), "is not an ONNX model"),
        (lambda d: (d / "model.onnx.data").unlink(), "model.onnx.data, which holds weights of model.onnx, is missing"),
        (lambda d: _truncate(d / "model.onnx.data"), "does not load"),
    ],
)
def test_a_damaged_directory_is_one_sentence_with_its_path(
    damage: Callable[[Path], None], sentence: str, directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    damage(copy)
    with pytest.raises(NblError, match=sentence) as caught:
        GenaiRunner(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "the engine wrote to stderr by itself"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_hinders_text_alone(name: str, directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    (copy / name).write_text('{"a"')
    with GenaiRunner(copy, threads=1) as runner:
        assert len(runner.greedy([5, 6], 2)) == 2
        with pytest.raises(NblError, match="tokenizer"):
            runner.encode("Hello", chat=True)


# -- the runner ----------------------------------------------------------------------------------------


def _ending_at(directory: Path, ids: int | list[int], copy: Path) -> Path:
    shutil.copytree(directory, copy)
    config = json.loads((copy / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["eos_token_id"] = ids
    (copy / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy


def test_greedy_is_append_and_argmax(runner: GenaiRunner) -> None:
    prompt, answer = tokens_of(runner), []
    runner.begin(TOKENS + 6)
    runner.append(prompt)
    for _ in range(6):
        answer.append(int(runner.last_logits().argmax()))
        runner.append(answer[-1:])
    assert runner.greedy(prompt, 6) == answer


def test_chunks_give_the_logits_of_one_prefill(runner: GenaiRunner) -> None:
    ids = tokens_of(runner)
    whole = logits_after(runner, [ids])
    parts = logits_after(runner, [ids[:25], *([token] for token in ids[25:])])
    np.testing.assert_allclose(parts, whole, atol=1e-3 * float(np.abs(whole).max()))


@pytest.mark.parametrize("length", [0, 25])
def test_a_rewound_sequence_is_a_fresh_one(genai_dirs: dict[str, Path], length: int) -> None:
    for name, path in genai_dirs.items():
        with GenaiRunner(path, threads=1) as runner:
            ids = tokens_of(runner)
            chunks = [ids[:25], ids[25:]]
            fresh = logits_after(runner, chunks)
            runner.rewind(length)
            rest = chunks if length == 0 else chunks[1:]
            for chunk in rest:  # other tokens, which must leave no trace
                runner.append(chunk[::-1])
            assert np.abs(runner.last_logits() - fresh).max() > 0, name
            runner.rewind(length)
            for chunk in rest:
                runner.append(chunk)
            np.testing.assert_array_equal(runner.last_logits(), fresh, err_msg=name)


def test_a_sequence_does_not_outgrow_its_room(runner: GenaiRunner) -> None:
    runner.begin(4)
    runner.append([5, 6, 7])
    with pytest.raises(NblError, match="room for 4"):
        runner.append([8, 9])
    with pytest.raises(ValueError, match="cannot rewind"):
        runner.rewind(4)
    runner.append([8])


def test_a_failing_run_is_one_sentence_and_nothing_on_stderr(
    runner: GenaiRunner, capfd: pytest.CaptureFixture[str]
) -> None:
    runner.begin(4)
    with pytest.raises(NblError, match="failed on a chunk of 1 tokens") as caught:
        runner.append([runner.settings.vocab_size])  # the embedding has no such row
    assert str(runner.directory) in str(caught.value)
    assert capfd.readouterr().err == "", "the engine wrote to stderr by itself"


def test_a_prompt_as_long_as_the_context_is_refused(runner: GenaiRunner) -> None:
    context = runner.settings.context_length
    with pytest.raises(NblError, match=f"takes {context}"):
        runner.greedy([5] * context, 1)
    with pytest.raises(NblError, match="prompt is empty"):
        runner.greedy([], 1)


def test_the_end_of_the_context_ends_the_answer(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "copy"))
    config = json.loads((copy / "genai_config.json").read_text())
    config["model"]["context_length"] = config["search"]["max_length"] = 10
    (copy / "genai_config.json").write_text(json.dumps(config))
    with GenaiRunner(copy, threads=1) as runner:
        assert len(runner.greedy([5, 6, 7], 50)) == 7


def test_genais_own_tokenizer_gives_the_same_ids(runner: GenaiRunner) -> None:
    """As whoever deploys the directory uses it."""
    text = "naïve 😀 日本, and plain words"
    assert list(runner._og.Tokenizer(runner._model).encode(text)) == runner.encode(text, chat=False)


def test_a_stream_ends_at_any_of_several_end_ids(directory: Path, tmp_path: Path) -> None:
    """As of chat models: one id ends a text, another a turn. Here the second is a token of the answer."""
    prompt = [20]
    with GenaiRunner(directory, threads=1) as runner:
        tokens = runner.greedy(prompt, 24)
        end = next(token for token in tokens[4:] if token not in tokens[:4])
        until = "".join(runner.text.pieces(tokens[: tokens.index(end)]))
        whole = "".join(runner.stream(prompt, 24))
    assert len(until) < len(whole)
    never = next(token for token in range(3, VOCAB) if token not in tokens)
    cases: list[tuple[int | list[int], str]] = [
        ([never, end], until), ([end, never], until), ([never], whole), (end, until)
    ]  # fmt: skip
    for ids, expected in cases:
        with GenaiRunner(_ending_at(directory, ids, tmp_path / f"{ids}"), threads=1) as runner:
            assert "".join(runner.stream(prompt, 24)) == expected


def test_a_float32_graph_keeps_its_weights_in_the_file(exported: Callable[..., Path]) -> None:
    def unpacked(directory: Path) -> bool:
        options = OnnxDecoder(directory, HEAD_DIM).session.get_session_options()
        try:
            return bool(options.get_session_config_entry("session.disable_prepacking") == "1")
        except RuntimeError:  # ONNX Runtime's answer for an entry that nobody set
            return False

    assert unpacked(exported("llama"))
    assert not unpacked(exported("llama", precision="int4"))
