"""Proposed tokens change no answer and no distribution; what cannot be done with them is one sentence."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nbl_export.errors import NblError
from nbl_export.graph.names import draft_file
from nbl_export.records.capabilities import GENAI_PROPOSERS, Proposer, proposers_of
from nbl_export.rewrite.speculative import add_draft, settle, write_target
from nbl_export.targets.onnx.genai import GenaiRunner, open_model
from nbl_export.targets.onnx.speculative import SpeculativeRunner

from ..tiny import VOCAB

NBL = Proposer("nbl", (("max_draft_tokens", 4),))


@pytest.fixture(scope="session")
def folder(genai_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its NBL version as a draft. Never write to it."""
    out = tmp_path_factory.mktemp("lossless") / "lossless"
    write_target(genai_dirs["original"], out)
    settle(out, NBL, {"nbl": add_draft(genai_dirs["nbl"], out, "nbl")})
    return out


def prompt(seed: int, count: int = 12) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(2, VOCAB, count)]


def block(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["draft"]
    return found


@pytest.mark.parametrize("proposer", [p for p in GENAI_PROPOSERS if p.draft != "int4"], ids=lambda p: p.name)
def test_answers_are_those_of_plain_decoding(proposer: Proposer, folder: Path, genai_dirs: dict[str, Path]) -> None:
    place = _without_draft(folder) if proposer.draft == "ngram" else folder
    with GenaiRunner(genai_dirs["original"], 1) as plain, SpeculativeRunner(place, 1) as runner:
        found = [runner.generation(prompt(seed), 40, dict(proposer.options)) for seed in range(4)]
        for seed, one in enumerate(found):
            expected = plain.greedy(prompt(seed), 40)
            assert list(one.tokens) == expected[: len(one.tokens)]
            assert len(one.tokens) == 40 or one.tokens[-1] in plain.settings.end_ids
            assert one.prefill_ns > 0
            assert one.decode_ns > 0
    assert sum(one.proposed for one in found) > 0
    assert sum(one.accepted for one in found) <= sum(one.proposed for one in found)


def _without_draft(folder: Path) -> Path:
    out = folder.parent / "ngram"
    if not out.exists():
        shutil.copytree(folder, out)
        settle(out, proposers_of("ngram", GENAI_PROPOSERS)[0], {})
        settings = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
        del settings["model"]["draft"]
        (out / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return out


def test_the_original_as_its_own_draft_is_always_accepted(
    folder: Path, genai_dirs: dict[str, Path], tmp_path: Path
) -> None:
    write_target(genai_dirs["original"], tmp_path / "own")
    own = add_draft(genai_dirs["original"], tmp_path / "own", "int4")
    with SpeculativeRunner(tmp_path / "own", 1, own) as runner:
        found = runner.generation(prompt(0), 40, dict(NBL.options))
    assert found.accepted == found.proposed > 0


def test_a_folder_has_its_proposer_and_no_other_draft(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "lossless"
    write_target(genai_dirs["original"], out)
    blocks = {name: add_draft(genai_dirs["nbl"], out, name) for name in ("int4", "nbl")}
    settle(out, NBL, blocks)
    assert (out / draft_file("nbl")).is_file()
    assert not list(out.glob("int4*"))
    assert not (out / "all_logits.onnx").exists()
    settings = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    assert settings["model"]["draft"]["filename"] == draft_file("nbl")
    assert settings["speculative"] == dict(NBL.options)
    for name in ("decoder", "draft"):  # else the threads of one spin while the other computes
        assert settings["model"][name]["session_options"]["session.force_spinning_stop"] == "1"


def test_the_runners_text_is_the_originals(folder: Path, genai_dirs: dict[str, Path]) -> None:
    with GenaiRunner(genai_dirs["original"], 1) as plain, SpeculativeRunner(folder, 1) as runner:
        ids = plain.encode("The assert statement", chat=False)
        assert list(runner.stream(ids, 24)) == list(plain.stream(ids, 24))


@pytest.mark.parametrize("draws", [4_000, pytest.param(20_000, marks=pytest.mark.fuzz)])
def test_sampling_keeps_the_originals_distribution(draws: int, folder: Path, genai_dirs: dict[str, Path]) -> None:
    """First tokens, and second tokens behind the likeliest first one, against the original's exact probabilities."""
    import onnxruntime_genai as og

    ids = prompt(7, 6)
    with GenaiRunner(genai_dirs["original"], 1) as plain:
        first_V = _probabilities(plain, ids)
    model = open_model(og, folder, 1, None, None)
    params = og.GeneratorParams(model)
    seen: Counter[int] = Counter()
    seconds: Counter[int] = Counter()
    top = int(first_V.argmax())
    for seed in range(draws):
        params.set_search_options(
            max_length=len(ids) + 2, do_sample=True, top_k=8, top_p=1.0, temperature=1.0, random_seed=seed
        )
        generator = og.Generator(model, params)
        generator.append_tokens(np.asarray(ids, np.int32))
        generator.generate_next_token()
        one = int(generator.get_next_tokens()[0])
        seen[one] += 1
        if one == top and not generator.is_done():
            generator.generate_next_token()
            seconds[int(generator.get_next_tokens()[0])] += 1
    with GenaiRunner(genai_dirs["original"], 1) as plain:
        second_V = _probabilities(plain, [*ids, top])
    assert _chi_squared(seen, first_V, 8) < 29.9  # 7 degrees of freedom, p = 0.0001
    assert _chi_squared(seconds, second_V, 8) < 29.9


def _probabilities(runner: GenaiRunner, ids: list[int]) -> np.ndarray:
    runner.begin(len(ids))
    runner.append(ids)
    logits = runner.last_logits().astype(np.float64)
    weights = np.exp(logits - logits.max())
    found: np.ndarray = weights / weights.sum()
    return found


def _chi_squared(seen: Counter[int], probabilities_V: np.ndarray, top_k: int) -> float:
    best = np.argsort(-probabilities_V)[:top_k]
    expected = probabilities_V[best] / probabilities_V[best].sum() * sum(seen.values())
    assert set(seen) <= set(best.tolist())
    counts = np.array([seen[int(i)] for i in best])
    return float((np.square(counts - expected) / expected).sum())


def test_a_batch_is_refused(folder: Path) -> None:
    with SpeculativeRunner(folder, 1) as runner, pytest.raises(NblError, match="takes one sequence"):
        runner.begin(32, 2)


def test_a_draft_of_another_vocabulary_is_refused(
    folder: Path, exported: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from tests.exports import build_decoder

    from ..tiny import save_checkpoint

    smaller = save_checkpoint("llama", tmp_path / "checkpoint", vocab_size=VOCAB + 8)
    build_decoder("genai", smaller, tmp_path / "draft", "fp32")
    out = Path(shutil.copytree(folder, tmp_path / "lossless"))
    other = add_draft(tmp_path / "draft", out, "int4")
    with pytest.raises(NblError, match="vocab") as caught:
        SpeculativeRunner(out, 1, other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [512, 600])
def test_a_prompt_that_leaves_no_room_is_refused(count: int, folder: Path) -> None:
    with SpeculativeRunner(folder, 1) as runner, pytest.raises(NblError, match=f"the prompt has {count} tokens"):
        runner.generation(prompt(0, count), 3, {})


def test_a_prompt_of_one_token_is_answered(folder: Path, genai_dirs: dict[str, Path]) -> None:
    with GenaiRunner(genai_dirs["original"], 1) as plain, SpeculativeRunner(folder, 1) as runner:
        assert list(runner.generation(prompt(0, 1), 3, {}).tokens) == plain.greedy(prompt(0, 1), 3)


def test_greedy_text_comes_from_the_loop_with_proposed_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not token by token, as the runner that it is made of does it."""
    monkeypatch.setattr(SpeculativeRunner, "append", lambda *_: pytest.fail("one step at a time"))
    with SpeculativeRunner(folder, 1) as runner:
        assert len(runner.greedy(prompt(0), 8)) == 8


@pytest.mark.parametrize(
    ("where", "key"), [("draft", "pipeline"), ("speculative", "library")], ids=["draft", "speculative"]
)
def test_strange_settings_are_refused(where: str, key: str, folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder, tmp_path / "lossless"))
    settings = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    place = settings if where == "speculative" else settings["model"]
    place[where][key] = "evil.so"
    (out / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(NblError, match=f"{where}.{key}, which is refused"):
        SpeculativeRunner(out, 1)


def test_a_draft_outside_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder, tmp_path / "lossless"))
    settings = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
    settings["model"]["draft"]["filename"] = "../model.onnx"
    (out / "genai_config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(NblError, match=r"filename, which is refused"):
        SpeculativeRunner(out, 1)
