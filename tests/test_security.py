"""What is never done, whatever a model says: SECURITY.md as tests."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbl_export.methods.checkpoint.load import load_model

from .command import TINY, configured, nbl
from .damage import name_code, named_code
from .jobs import until

pytestmark = [pytest.mark.job, pytest.mark.process]

PACKAGE = Path(__file__).parent.parent / "nbl_export"
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))

PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing",
           "torch.multiprocessing", "concurrent.futures.ProcessPoolExecutor"}  # fmt: skip
POOLS = {"multiprocessing", "ProcessPoolExecutor"}  # attributes: they pickle what they send to a process
MUST_BE = {"trust_remote_code": False, "use_kernels": False, "hf_remote": False, "allow_pickle": False,
           "weights_only": True, "shell": False, "use_safetensors": True, "local_files_only": True,
           "engine_host_code_allowed": False}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"torch.load", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
COLLECTIVES = {"broadcast_object_list", "scatter_object_list", "all_gather_object", "gather_object", "send_object_list",
               "recv_object_list"}  # of torch.distributed: they unpickle what arrives  # fmt: skip
RECEIVERS = {"recv"}  # of a connection of multiprocessing: it unpickles what arrives
# The connection to a child, and one `recv`: the child reads what its parent asks for. The parent reads JSON.
TRUSTED = {"child.py": ["multiprocessing", "recv"]}
MUST_SAY = {"from_pretrained": {"trust_remote_code"}, "from_config": {"trust_remote_code"}}


def findings(source: str) -> list[str]:
    """Where Python source reads pickles, runs code that it was given, or could be told to."""
    return list(_findings(ast.parse(source)))


def _findings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]} | {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            names = set()
        yield from sorted(names & (PICKLES | CALLS))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in CALLS | BUILTINS:
            yield ast.unparse(node.func)
        if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES | POOLS | RECEIVERS:
            yield node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUST_SAY:
            weights = {"use_safetensors"} if ast.unparse(node.func).endswith("LM.from_pretrained") else set()
            yield from (MUST_SAY[node.func.attr] | weights) - {keyword.arg for keyword in node.keywords}
        if isinstance(node, ast.keyword) and node.arg in MUST_BE and ast.unparse(node.value) != str(MUST_BE[node.arg]):
            yield ast.unparse(node)
        if isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "hf_remote"):
            yield str(node.value)


# Where files are read, other than by `files.read_small`, which is bounded: how often, and why.
READS = {
    "methods/sums_file.py": (1, "hashed in blocks"),
    "files.py": (3, "the bounded reader; hashes in blocks; a header that the library has checked"),
    "graph/files.py": (1, "made here, or checked by `parsed` before"),
    "graph/gguf_header.py": (1, "every number is bounded"),
    "graph/trust.py": (1, "bounded by protobuf's limit"),
    "graph/rowwise.py": (1, "the system's"),
    "measure/benchmark.py": (1, "the system's"),
    "measure/footprint.py": (1, "the system's"),
    "methods/checkpoint/copied.py": (1, "copied in blocks"),
    "model/checkpoint/pretrained.py": (1, "behind `read_header`, which bounds every count"),
    "model/memory.py": (3, "the system's"),
    "publish/card.py": (1, "the template of this package"),
    "report/document.py": (1, "the template of this package"),
    "run/estimate.py": (1, "the system's"),
    "targets/checkpoint/form.py": (1, "weights that were written here"),
    "targets/onnx/export_genai.py": (1, "a graph that was made here"),
    "targets/onnx_files.py": (2, "graphs of a finished run, which `read_proto` has read"),
    "graph/ir/files.py": (1, "mapped"),
    "targets/tensorrt/export.py": (1, "weights, mapped"),
    "targets/tensorrt/record.py": (1, "an engine of the user, of the recorded size"),
    "text/corpus.py": (1, "the first bytes up to a limit; hashed in blocks"),
}  # fmt: skip
READERS = {"read_text", "read_bytes", "open", "load_file", "GGUFReader", "PlainReader"}
LIBRARIES = {"onnx.load", "ir.load", "np.load", "np.fromfile", "json.load", "tomllib.load", "ModelCard.load"}
OTHERS = {"read_text", "corpus.read_text", "kernels.open", "variants[name].open", "found.open", "os.open"}  # bounded


def reads(source: str) -> list[str]:
    """Calls that may read a whole file."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [ast.unparse(call) for call in calls if _reads(call)]


def _reads(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    writes = any(isinstance(mode, ast.Constant) and mode.value in ("w", "wb", "rb+", "r+b") for mode in call.args)
    return not writes and name not in OTHERS and (name in LIBRARIES or name.rpartition(".")[2] in READERS)


def test_files_are_read_by_one_bounded_reader() -> None:
    found = {name: len(reads((PACKAGE / name).read_text(encoding="utf-8"))) for name in FILES}
    assert {name: count for name, count in found.items() if count} == {
        name: count for name, (count, _) in READS.items()
    }


def test_no_pickle_no_code_of_others() -> None:
    assert len(FILES) > 200
    found = [(name, findings((PACKAGE / name).read_text(encoding="utf-8"))) for name in FILES]
    assert {name: what for name, what in found if what} == TRUSTED


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from multiprocessing.connection import Connection",
        "from concurrent.futures import ProcessPoolExecutor",
        "import concurrent.futures\nconcurrent.futures.ProcessPoolExecutor()",
        "import torch\ntorch.multiprocessing.spawn(f)",
        "pipe.recv()",
        "from torch import multiprocessing",
        "def f():\n    from cloudpickle import loads",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=True)",
        "from torch import load",
        "AutoConfig.from_pretrained(d)",
        "AutoTokenizer.from_pretrained(d, local_files_only=True)",
        "AutoModel.from_config(c)",
        "AutoModelForCausalLM.from_pretrained(d, trust_remote_code=False)",
        "AutoModelForCausalLM.from_pretrained(d, trust_remote_code=False, use_safetensors=None)",
        "dist.broadcast_object_list(said, src=0)",
        "dist.all_gather_object(said, value)",
        "AutoModel.from_pretrained(d, trust_remote_code=True)",
        "AutoModel.from_pretrained(d, trust_remote_code=asked)",
        "AutoModel.from_pretrained(d, **{'trust_remote_code': True})",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(word, shell=True)",
        "eval(text)",
        "os.system(text)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert len(findings(source)) >= 1


EVIL = """
from pathlib import Path
Path({marker!r}).write_text("ran")
class Config: pass
class Model: pass
class Tokenizer: pass
"""


def test_no_kernel_of_the_hub_is_taken(checkpoint: Callable[[str], Path]) -> None:
    """transformers 5.25 takes them unless it is told not to."""
    assert not load_model(checkpoint("llama")).use_kernels


@pytest.mark.parametrize("source", ["genai", "mobius"])
def test_code_in_a_model_directory_is_not_run(checkpoint: object, text: Path, tmp_path: Path, source: str) -> None:
    """The main job on a checkpoint whose files ask for code that lies beside them. Nothing written asks for it."""
    model, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(checkpoint("llama"), model)  # type: ignore[operator]
    (model / "evil.py").write_text(EVIL.format(marker=str(marker)), encoding="utf-8")
    name_code(model)
    arguments = ("--calibration", text, *TINY, *configured(decoder_source=source), "--output", tmp_path / "run")
    with until("verify"):
        done = nbl("--model", model, *arguments)
    assert not marker.exists()
    assert done.status == 0, done.err
    assert not list((tmp_path / "run").rglob("evil.py"))
    assert named_code(model) and not named_code(tmp_path / "run")


PAGE = (PACKAGE.parent / "SECURITY.md").read_text(encoding="utf-8")
TESTS = Path(__file__).parent
_NODE = re.compile(r"`([\w/]+\.py)::(\w+)`(?: \(`-m (\w+)`\))?")
_OPTIONAL = {"large", "fuzz", "mlx", "vllm", "edge_llm", "trt"}  # tests with these marks are often left out


def marks_of(file: str, name: str) -> set[str] | None:
    """Optional marks of a test function; None if the file has no such function."""
    path = TESTS / file
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    whole = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"]
    said = " ".join(ast.unparse(node) for test in found for node in (*whole, *test.decorator_list))
    return {mark for mark in re.findall(r"mark\.(\w+)", said) if mark in _OPTIONAL} if found else None


def unheld(page: str) -> list[str]:
    """Promises in the table of SECURITY.md without a test that is there and runs by default, or says how it runs."""
    found = []
    for promise, _, tests in (line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")):
        named = _NODE.findall(tests)
        held = [marks_of(file, name) == ({mark} if mark else set()) for file, name, mark in named]
        if tests.strip() != "test" and (
            not held or not all(held) or tests.count("`") % 2 or "::" in _NODE.sub("", tests)
        ):
            found.append(promise.strip())
    return found


def test_every_promise_names_a_test() -> None:
    assert PAGE.count("\n| ") > 15
    assert unheld(PAGE) == []
    settings = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r"not (\w+)", settings.partition("addopts")[2].partition("\n")[0])) == _OPTIONAL - {"trt"}


def test_a_promise_without_a_test_is_found() -> None:
    table = "| promise | how | test |\n|---|---|---|\n| a | held | `test_security.py::test_the_search_finds` |\n"
    assert unheld(table) == []
    for tests in (
        "", "`test_security.py`", "`test_security.py::test_of_nothing`", "`test_gone.py::test_the_search_finds`",
        "none for `test_security.py::findings", "`test_fuzz.py::test_hostile`",
        "`targets/test_trt_runner.py::test_logits_are_read_from_their_bits`",
        "`test_security.py::test_the_search_finds`, `test_security.py::gone`",
    ):  # fmt: skip
        assert unheld(f"{table}| b | loose | {tests} |") == ["b"], tests
    assert unheld(f"{table}| b | held | `test_fuzz.py::test_hostile` (`-m fuzz`) |") == []
