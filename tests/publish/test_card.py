"""The model card: what it says, where it has it from, and that its programs run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nbl_export.files import write_json
from nbl_export.publish import card
from nbl_export.publish import card as base_model
from nbl_export.publish.card import BaseModel
from nbl_export.trust.terminal import visible

from ..command import assert_refused, in_new_process, keys, nbl, snapshot
from ..damage import flip
from ..fake_hub import fake_hub

pytestmark = [pytest.mark.job, pytest.mark.process]

README = Path("model") / "README.md"


def written(run: Path, *arguments: object) -> str:
    done = nbl("card", run, *arguments)
    assert done.status == 0, done.err
    assert done.out.strip() == str(run / README)
    return (run / README).read_text(encoding="utf-8")


def metadata(text: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    found: dict[str, Any] = ModelCard(text).data.to_dict()
    return found


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    return found


def change(run: Path, **facts: Any) -> None:
    write_json(run / "nbl.json", {**manifest(run), **facts})


@pytest.fixture
def base(run: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that `run` was made from, which `run` believes to be the one."""
    facts = manifest(run)
    copy = Path(shutil.copytree(facts["places"]["model"], tmp_path / "base"))
    change(run, places={**facts["places"], "model": str(copy)})
    return copy


def test_an_exit_layer_is_not_called_replaced_attention(run: Path) -> None:
    report = json.loads((run / "report.json").read_text(encoding="utf-8")) | {"exit": {"layer": 2, "recent_tokens": 8}}
    text = card.render(manifest(run), report, card.find(manifest(run)))
    assert f"most of a prompt skips layers 2 to {report['num_layers'] - 1}" in text
    assert "| Layers with predicted KV | " in text and "A prompt of at most 9 tokens" in text
    assert "no key/value cache" not in text and "replaced by one linear layer" not in text


def test_what_it_says(run: Path) -> None:
    before = snapshot(run)
    text = written(run)
    report, page = json.loads((run / "report.json").read_text()), (run / "report.md").read_text(encoding="utf-8")
    said = metadata(text)
    assert said["pipeline_tag"] == "text-generation"
    assert {"onnx", "onnxruntime-genai"} <= set(said["tags"])
    assert "license" not in said and "base_model" not in said
    assert "| Licence | not stated by the base model" in text
    (layer,) = report["replaced_layers"]
    assert f"| Replaced layers | {layer} (counted from 0) |" in text
    for heading in ("## Speed", "## Quality loss"):
        table = re.search(rf"{heading}\n(.*?)\n#", page, re.DOTALL)
        assert table is not None and table[1].count("|") > 10
        assert table[1].strip() in text
    machine = report["machine"]
    assert f"Measured on {machine['cpu']}, {machine['cores']} core".replace("_", r"\_") in text
    assert "--calibration text.txt" in text and "--output DIR" in text
    assert f"nbl-export {report['versions']['nbl-export']}, " in text
    after = snapshot(run)
    assert {k for k in after if after[k] != before.get(k)} == {str(README), "nbl.json"}
    assert nbl("generate", run, "x", "--max-new-tokens", "1").status == 0  # the run is still whole


TEMPLATE = """{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}A: {% endif %}"""
POSITIONS = keys(decoder_source="mobius", precision="fp16")  # also caches in half precision


@pytest.mark.parametrize(("options", "chat"), [(POSITIONS, False), ((), True)], ids=["positions", "chat"])
def test_programs_run_as_they_stand(
    run: Path, options: tuple[str, ...], chat: bool, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if options:
        assert nbl("rewrite", run, *options).status == 0
        assert nbl("report", run).status == 0
    if chat:
        (run / "model" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", written(run), re.DOTALL)
    monkeypatch.chdir(run / "model")
    spaces: list[dict[str, Any]] = [{"__name__": "__main__"} for _ in programs]
    genai, plain = spaces
    for program, space in zip(programs, spaces, strict=True):
        exec(program, space)
        assert capsys.readouterr().out.strip()
    tokens, wanted = genai["generator"].get_sequence(0).tolist(), plain["sequence"]
    # tokens, since GenAI's text ends at the first bytes that are not UTF-8
    assert tokens in (wanted, [*wanted, plain["tokenizer"].eos_token_id]) and len(wanted) > len(plain["prompt"])
    assert all(("apply_chat_template" in program) is chat for program in programs)


FRONT = "---\nlicense: apache-2.0\nlanguage: [en, fr]\n---\n# Base\n"


def test_licence_of_the_card_beside_the_weights(run: Path, base: Path) -> None:
    (base / "README.md").write_text(FRONT, encoding="utf-8")
    text = written(run)
    assert metadata(text)["license"] == "apache-2.0"
    assert metadata(text)["language"] == ["en", "fr"]
    assert "| Licence | apache-2.0; carried over from the card beside the weights |" in text


def test_licence_of_its_own_name(run: Path, base: Path) -> None:
    front = "---\nlicense: other\nlicense_name: tiny-terms\nlicense_link: LICENSE\n---\n"
    (base / "README.md").write_text(front, encoding="utf-8")
    said = metadata(written(run, "--base-model", "org/tiny"))
    link = "https://huggingface.co/org/tiny/blob/main/LICENSE"
    assert (said["license"], said["license_name"], said["license_link"]) == ("other", "tiny-terms", link)
    assert said["base_model"] == "org/tiny"
    assert "license_link" not in metadata(written(run))  # relative to what nobody has named


@pytest.mark.parametrize(
    "front", ["---\nlicense: [a, b]\n---\n", "---\nlicense: {\n---\n", "---\n- x\n---\n", "no front matter", "\xff"]
)
def test_a_card_that_is_none_says_nothing(run: Path, base: Path, front: str) -> None:
    (base / "README.md").write_bytes(front.encode("latin-1"))
    assert "license" not in metadata(written(run))


def test_another_model_says_nothing(run: Path, base: Path) -> None:
    (base / "README.md").write_text(FRONT, encoding="utf-8")
    config = base / "config.json"
    config.write_text(config.read_text() + "\n", encoding="utf-8")
    assert "license" not in metadata(written(run))
    shutil.rmtree(base)
    assert "license" not in metadata(written(run))


def gguf_facts(path: Path, **values: Any) -> dict[str, Any]:
    """Manifest of a run on a GGUF that holds nothing but metadata."""
    import gguf

    from nbl_export.methods.checkpoint import source as checkpoint

    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in values.items():
        key = f"general.{name.replace('__', '.')}"
        (writer.add_array if isinstance(value, list) else writer.add_string)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    source = checkpoint.resolve(str(path))
    return {"model": {"name": path.name, "title": source.title, "revision": None, "fingerprint": source.fingerprint},
            "places": {"model": str(path)}}  # fmt: skip


def test_metadata_of_a_gguf(tmp_path: Path) -> None:
    facts = gguf_facts(
        tmp_path / "tiny.Q4.gguf", license="mit", languages=["en"], repo_url="https://huggingface.co/org/tiny"
    )
    found = base_model.find(facts)
    terms = {"license": "mit", "language": ["en"]}
    assert found == BaseModel("tiny.Q4", "org/tiny", None, terms, "the metadata of tiny.Q4.gguf")
    bare = base_model.find(gguf_facts(tmp_path / "bare.gguf", repo_url="https://elsewhere.example/org/tiny"))
    assert bare == BaseModel("bare")


def test_licence_from_the_hub(run: Path, tmp_path: Path) -> None:
    with fake_hub() as hub:
        hub.cards["org/tiny"] = FRONT
        environment = hub.environment(tmp_path / "home")
        done = in_new_process("card", run, "--base-model", "org/tiny", **environment)
        assert done.status == 0, done.err
        text = (run / README).read_text(encoding="utf-8")
        assert metadata(text)["license"] == "apache-2.0"
        assert "carried over from the card of org/tiny" in text
        done = in_new_process("card", run, "--base-model", "org/other", **environment)
        assert done.status == 0, done.err
        assert metadata((run / README).read_text(encoding="utf-8"))["base_model"] == "org/other"
        assert "license" not in metadata((run / README).read_text(encoding="utf-8"))
        asked = len(hub.requests)
        offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
        assert in_new_process("card", run, "--base-model", "org/tiny", **offline).status == 0
        assert len(hub.requests) == asked
        assert "license" not in metadata((run / README).read_text(encoding="utf-8"))


def test_a_run_of_a_hub_model_knows_its_name(run: Path, tmp_path: Path) -> None:
    facts = manifest(run)
    revision = "0123456789abcdef0123456789abcdef01234567"
    model = {**facts["model"], "name": "org/tiny", "title": "org/tiny", "revision": revision}
    options = {**facts["options"], "model": "org/tiny"}
    change(run, model=model, options=options, places={**facts["places"], "model": None})
    text = written(run)
    assert metadata(text)["base_model"] == "org/tiny"
    assert f"revision {revision}" in text and " --model org/tiny " in text
    assert_refused(nbl("card", run, "--base-model", "org/other"), 1, "org/tiny", "org/other")
    (run / README).unlink()
    for name in ("x/y](https://evil.example) <img src=x>\n\n# Official", "../x", "x/y/z", "a/" + "b" * 200):
        change(run, model={**model, "name": name})
        assert_refused(nbl("card", run), 2, "the base model", "is not a hub id")
        assert not (run / README).exists()


def test_names_of_others_are_text(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    text = card.render(
        {**manifest(run), "command": "nbl-export --model \u202ex"},
        report,
        BaseModel("<script>x</script> | [a](b)\u202e", terms={"license": "mit\n---\nx: y"}, origin="`o`"),
    )
    assert "<script>" not in text and visible(text) == text
    assert r"\<script\>x\</script\> \| \[a\]\(b)".replace(r"\(", "(") in text
    assert metadata(text)["license"] == "mit\n---\nx: y" and "x" not in metadata(text)


def test_an_edited_card_is_not_overwritten(run: Path) -> None:
    first = written(run)
    assert written(run) == first
    (run / README).write_text(first + "mine\n", encoding="utf-8")
    assert_refused(nbl("card", run), 1, run / README, "--force")
    assert (run / README).read_text(encoding="utf-8").endswith("mine\n")
    assert written(run, "--force") == first


def test_only_finished_and_verified_runs(run: Path) -> None:
    whole = manifest(run)
    change(run, stages={k: v for k, v in whole["stages"].items() if k != "report"})
    assert_refused(nbl("card", run, "--force"), 1, run, "not finished")
    change(run, **{**whole, "status": "failed"})
    assert_refused(nbl("card", run), 1, run, "failed verification")
    assert not (run / README).exists()
    written(run, "--force")
    change(run, **{**whole, "options": {**whole["options"], "engine": "trt-rtx"}})
    assert_refused(nbl("card", run), 1, "trt-rtx", "--engine ort")
    change(run, **whole)
    flip(run / "bench.json")
    assert_refused(nbl("card", run, "--force"), 1, run / "bench.json", "is corrupted")


def test_what_is_no_run(run: Path, tmp_path: Path) -> None:
    assert_refused(nbl("card", tmp_path / "none"), 1, "does not exist")
    assert_refused(nbl("card", run / "model"), 1, "model directory")
    assert_refused(nbl("card", run, "--base-model", "tiny"), 2, "--base-model", "OWNER/NAME")


def test_places_of_this_machine_are_not_in_what_may_be_published(run: Path) -> None:
    written(run)
    facts = manifest(run)
    model = Path(facts["places"]["model"])
    places = [str(place.parent) for place in (model, Path(facts["places"]["calibration"][0]), run)]
    for file in (run / "model").iterdir():
        assert not [place for place in places if place.encode() in file.read_bytes()], file.name
    deployed = json.loads((run / "model" / "nbl.json").read_text(encoding="utf-8"))
    assert deployed["model"]["name"] == deployed["options"]["model"] == model.name
    assert deployed["scores"] == facts["scores"]
