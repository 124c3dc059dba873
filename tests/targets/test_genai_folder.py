"""A folder that ONNX Runtime GenAI opens names no library, no file outside and no compiled code that would run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export.errors import NblError
from nbl_export.files import file_sha256
from nbl_export.graph.genai_config import read_genai_config

from ..command import Outcome, assert_refused, in_new_process, nbl

pytestmark = [pytest.mark.job, pytest.mark.process]

_CANARY = """
#include <stdio.h>
__attribute__((constructor)) static void sing(void) { FILE *f = fopen(MARKER, "w"); if (f) fclose(f); }
void *RegisterCustomOps(void *options, const void *api) { (void)options; (void)api; return 0; }
"""
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(genai_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a tiny model, to be made hostile."""
    return Path(shutil.copytree(genai_dirs["nbl"], tmp_path / "folder"))


def changed(folder: Path, change: Change) -> None:
    path = folder / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    change(settings)
    path.write_text(json.dumps(settings), encoding="utf-8")


def session(key: str, value: object) -> Change:
    return lambda settings: settings["model"]["decoder"]["session_options"].update({key: value})


def canary(folder: Path, marker: Path) -> Path:
    """A library in the folder whose loading makes the marker; genai_config.json asks for it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here to make a library that shows that it is loaded")
    source, library = marker.with_suffix(".c"), folder / "canary.so"
    source.write_text(_CANARY, encoding="utf-8")
    flags = ("-shared", "-fPIC", f'-DMARKER="{marker}"')
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    changed(folder, session("custom_ops_library", "canary.so"))
    return library


def recorded_again(run: Path) -> None:
    """As an attacker does who may write to the run: the hashes of nbl.json are those of the files."""
    manifest = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    for stage in manifest["stages"].values():
        stage["files"] = {name: file_sha256(run / name) for name in stage["files"]}
    (run / "nbl.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_the_canary_sings(folder: Path, tmp_path: Path) -> None:
    """What the tests below rely on: the library that they bring makes the marker when it is loaded."""
    import ctypes

    ctypes.CDLL(str(canary(folder, tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_library_beside_the_model_is_not_loaded(
    folder: Path, genai_dirs: dict[str, Path], tmp_path: Path, command: str
) -> None:
    canary(folder, tmp_path / "marker")
    words = {
        "generate": ("generate", folder, "x", "--max-new-tokens", 1),
        "bench": (
            "bench", folder, genai_dirs["original"], "--repetitions", 1, "--prompt-tokens", 8, "--generate-tokens", 2,
        ),
    }  # fmt: skip
    done = nbl(*words[command])
    assert_refused(done, 1, folder / "genai_config.json", "model.decoder.session_options.custom_ops_library", "remove")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("command", ["generate", "bench", "eval"])
def test_nor_one_in_a_run_directory(run: Path, tmp_path: Path, text: Path, command: str) -> None:
    canary(run / "model", tmp_path / "marker")
    recorded_again(run)
    words = {
        "generate": ("generate", run, "x", "--max-new-tokens", 1),
        "bench": ("bench", run, "--repetitions", 3),
        "eval": ("eval", run, "--perplexity", f"held={text}", "--ppl-context", 32, "--limit", 2, "--tasks", ""),
    }
    done = nbl(*words[command])
    said = [line for line in done.err.splitlines() if line.startswith("nbl-export: ")]
    assert (done.status, len(said)) == (1, 1), done
    assert f"{run / 'model' / 'genai_config.json'} sets model.decoder.session_options.custom_ops_library" in said[0]
    assert not (tmp_path / "marker").exists()


def test_nor_one_beside_a_given_graph(folder: Path, run: Path, tmp_path: Path, genai_dirs: dict[str, Path]) -> None:
    shutil.rmtree(folder)
    shutil.copytree(genai_dirs["original"], folder)
    canary(folder, tmp_path / "marker")
    out = tmp_path / "out"
    done = nbl("rewrite-graph", folder, "--maps", run / "maps.safetensors", "--output", out)
    assert_refused(done, 1, folder / "genai_config.json", "custom_ops_library")
    assert not (tmp_path / "marker").exists()
    assert not list(out.rglob("canary.so"))


def test_no_profile_is_written(folder: Path, tmp_path: Path) -> None:
    changed(folder, session("enable_profiling", str(tmp_path / "profile")))
    before = sorted(tmp_path.iterdir())
    assert_refused(nbl("generate", folder, "x", "--max-new-tokens", 1), 1, "session_options.enable_profiling")
    assert sorted(tmp_path.iterdir()) == before


_PROVIDERS = [
    ({"cuda": {"gpu_external_alloc": "4096"}}, "provider_options.cuda.gpu_external_alloc"),
    ({"NvTensorRtRtx": {"nv_runtime_cache_path": "/tmp/x"}}, "nv_runtime_cache_path"),
    ({"qnn": {"backend_path": "lib.so"}}, "provider_options.qnn"),
    ({"OpenVINO": {}}, "provider_options.OpenVINO"),
    ({"/tmp/lib.so": {}}, "provider_options./tmp/lib.so"),
    ({"cuda": {"sdpa_kernel": "../x"}}, "sdpa_kernel"),
]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        *((session("provider_options", [entry]), key) for entry, key in _PROVIDERS),
        (session("session.optimized_model_filepath", "/tmp/x"), "session.optimized_model_filepath"),
        (session("session.model_external_initializers_file_folder_path", "/"), "external_initializers"),
        (session("ep.context_file_path", "x"), "ep.context_file_path"),
        (session("log_id", "/etc/passwd"), "session_options.log_id"),
        (lambda s: s["model"]["decoder"].update(filename="../model.onnx"), "model.decoder.filename"),
        (lambda s: s["model"]["decoder"].update(filename="model.ort"), "model.decoder.filename"),
        (lambda s: s["model"]["decoder"].update(pipeline=[{}]), "model.decoder.pipeline"),
        (lambda s: s["model"]["decoder"].update(run_options={"enable_profiling": "x"}), "model.decoder.run_options"),
        (lambda s: s["model"]["decoder"].update(shared_initializers=[]), "shared_initializers"),
        (lambda s: s["model"].update(tokenizer_dir="/etc"), "model.tokenizer_dir"),
        (lambda s: s["model"].update(draft={"filename": "model.onnx"}), "model.draft"),
        (lambda s: s.update(speculative={"library": "x.so"}), "speculative.library"),
        (lambda s: s["model"].update(vision={"filename": "x.onnx"}), "model.vision"),
        (lambda s: s["model"].update(decoder="x"), "model.decoder"),
        (lambda s: s.update(engine={}), "engine"),
        (lambda s: s["search"].update(max_length="../x"), "search.max_length"),
    ],
)
def test_what_settings_may_not_say(folder: Path, change: Change, key: str) -> None:
    changed(folder, change)
    with pytest.raises(NblError, match="is refused") as caught:
        read_genai_config(folder)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model": {}, "model": {"decoder": {}}}', "'model' occurs twice"),
        ('{"model": {"vocab_size": NaN}}', "NaN is not a JSON number"),
        ('{"model": {}} // {', "cannot be read"),
        ("[]", "not a model configuration"),
        ('{"model": {"type": "\\u0061"}}', "backslash"),
        ("[" * 100_000, "cannot be read"),
        ('{"model": {}}' + " " * (1 << 20), "larger than 1 MiB"),
    ],
)
def test_settings_that_parsers_read_differently(folder: Path, text: str, said: str) -> None:
    (folder / "genai_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(NblError, match=said):
        read_genai_config(folder)


_OF_THE_HUB: dict[str, Any] = {  # as published models have them, beside what our two sources write
    "provider_options": [{"cuda": {"enable_cuda_graph": "0", "enable_skip_layer_norm_strict_mode": "1"}}],
    "intra_op_num_threads": 4,
    "enable_mem_pattern": False,
    "graph_optimization_level": "ORT_ENABLE_ALL",
    "session.intra_op.allow_spinning": "1",
}


@pytest.mark.parametrize("source", ["genai-fp32", "genai-int4", "genai-fp16", "mobius-cpu", "mobius-default"])
def test_what_exporters_write_passes(given_graph: Callable[[str], Path], source: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(given_graph(source), tmp_path / "folder"))
    assert read_genai_config(folder)["model"]["decoder"]["filename"] == "model.onnx"
    changed(folder, lambda s: s["model"]["decoder"]["session_options"].update(_OF_THE_HUB))
    changed(
        folder,
        lambda s: s["model"]["decoder"].update(sliding_window={"window_size": 8, "layers": [0], "alignment": "right"}),
    )
    changed(folder, lambda s: s["model"].update(eos_token_id=[1, 2], bot_token_id=3))
    assert read_genai_config(folder)["model"]["eos_token_id"] == [1, 2]


# -- the graph ---------------------------------------------------------------------------------------------------


def edited(folder: Path, change: Callable[[Any], None]) -> None:
    proto = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(proto)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


def generated(folder: Path) -> Outcome:
    return nbl("generate", folder, "x", "--max-new-tokens", 1)


_ADDRESSES = ("*/_ORT_MEM_ADDR_/*", "*/_ORT_NATIVE_ENDIAN_MEM_ADDR_/*")  # in the library of onnxruntime 1.32


@pytest.mark.parametrize("place", ["../secret.data", "absolute", "link", *_ADDRESSES])
def test_a_graph_reads_no_weights_outside_its_directory(folder: Path, tmp_path: Path, place: str) -> None:
    outside = tmp_path / "secret.data"
    assert generated(folder).status == 0
    (folder / "model.onnx.data").rename(outside)
    if place == "link":
        (folder / "model.onnx.data").symlink_to(outside)
    else:
        if place in _ADDRESSES:  # a file of this name does not make it a name
            (folder / place).parent.mkdir(parents=True)
            shutil.copyfile(outside, folder / place)
        edited(folder, lambda proto: _place_weights(proto, str(outside) if place == "absolute" else place))
    said = {"link": "is a link out of its directory", **dict.fromkeys(_ADDRESSES, "an address of memory")}
    assert_refused(generated(folder), 1, folder, said.get(place, "outside its directory"))


def _place_weights(proto: Any, place: str) -> None:
    entries = [e for t in proto.graph.initializer for e in t.external_data if e.key == "location"]
    assert entries
    for entry in entries:
        entry.value = place


def _hidden(proto: Any, node: Any) -> None:
    """A node in a branch of an If of a function, where a search of the graph alone does not come."""
    inner = onnx.helper.make_node("If", ["c"], ["o"], then_branch=onnx.helper.make_graph([node], "t", [], []))
    proto.functions.append(onnx.helper.make_function("local", "F", ["c"], ["o"], [inner], []))


@pytest.mark.parametrize("where", ["graph", "function"])
def test_compiled_code_in_a_graph_is_not_run(folder: Path, where: str) -> None:
    node = onnx.helper.make_node("EPContext", [], ["o"], domain="com.microsoft", embed_mode=0, ep_cache_context="x.bin")
    edited(folder, lambda proto: proto.graph.node.append(node) if where == "graph" else _hidden(proto, node))
    assert_refused(generated(folder), 1, folder / "model.onnx", "EPContext", "compiled code")
    assert_refused(nbl("inspect", folder), 1, "EPContext")


def test_a_tensor_of_an_attribute_reads_nothing_outside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(4))
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    edited(folder, lambda proto: _hidden(proto, onnx.helper.make_node("Constant", [], ["o"], value=tensor)))
    assert_refused(generated(folder), 1, "keeps weights in '../secret'", "it is not read")


def test_options_of_a_session_in_a_graph_are_not_taken(folder: Path, tmp_path: Path) -> None:
    """ONNX Runtime takes them from a graph's metadata if ORT_LOAD_CONFIG_FROM_MODEL is set in the environment."""
    options = json.dumps({"session_options": {"enable_profiling": 1}})
    edited(folder, lambda proto: onnx.helper.set_model_props(proto, {"ort_config": options}))
    (tmp_path / "here").mkdir()
    code = f"import os; os.chdir({str(tmp_path / 'here')!r})"
    done = in_new_process("generate", folder, "x", "--max-new-tokens", 1, code=code)
    assert done.status == 0, done.err
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_module.json", "genai_config.json", "model.onnx"])
def test_no_file_of_the_folder_is_a_link_out_of_it(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert_refused(generated(folder), 1, folder / name, "is a link out of its directory")
