"""Sources of decoder graphs x architectures x precision: does the exported graph compute what torch computes?

    python bench/architectures.py [--only qwen2,gemma3] [--sources openvino] [--output bench/results/architectures.json]

Each row of the first architectures (JOBS) takes a tiny random checkpoint through nbl-export (calibrate, plan,
decoder, rewrite, verify; for the static source only its form and the rewrite). The script then measures the largest
logit difference from torch itself, for the original graph and the NBL graph: two rows of random tokens, prefill and
cached steps. A row of another architecture in float32 has the status "parity": every subset of its layers is
replaced by random maps, and its NBL figure is the largest of all subsets. A refused row states the reason. The script
prints a table and writes JSON; --only and --sources keep the other rows in the file. Graphs of OpenVINO compute in
float32 here; int4 is compared with torch, so its figure is that of the rounded matrices.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from made import made

from nbl_export.errors import NblError, ParityError
from nbl_export.files import versions
from nbl_export.measure.benchmark import machine
from nbl_export.options.options import JobOptions
from nbl_export.options.rules import Case
from nbl_export.options.settle import judge
from nbl_export.records.plan import Plan
from tests.tiny import EVERY, LAYERS, VARIANTS, VOCAB, made_by, random_map, save_checkpoint, stdlib_text

RUNS = (
    ("genai", "fp32"),
    ("genai", "int4"),
    ("mobius", "fp32"),
    ("mobius", "fp16"),
    ("static", "fp32"),
    ("static", "int4"),
    ("openvino", "fp32"),
    ("openvino", "int4"),
)
JOBS = ("llama", "mistral-window", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "smollm3", "granite")
ALSO = {"gpt_oss": (("openvino", "int4"),)}
OF_OTHERS = (("genai", "fp32"), ("mobius", "fp32"), ("static", "fp32"), ("openvino", "fp32"))
PARITY = 1e-3  # largest logit difference
REPLACED = "1,2"  # of three layers
ROWS, SLOTS = (45, 27), 96  # tokens of the two rows, longer than the tiny windows
PACKAGES = ("torch", "transformers", "onnx-ir", "onnxruntime", "onnxruntime-genai", "mobius-onnx", "openvino", "nncf")


def rows() -> list[list[int]]:
    """Random token ids."""
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, n).tolist() for n in ROWS]


def torch_logits(checkpoint: Path, maps: Any = None) -> list[np.ndarray]:
    """Torch logits of each row alone, without a cache."""
    import torch

    from nbl_export.methods.applied import linearize
    from nbl_export.methods.checkpoint.load import load_model

    model = linearize(load_model(checkpoint), maps or {})
    with torch.inference_mode():
        return [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows()]


def worst(decoder: Any, expected: list[np.ndarray]) -> float:
    """Largest logit difference over a batch of the two rows."""
    from nbl_export.verify.ladder import run_rows

    return max(float(np.abs(g - e).max()) for g, e in zip(run_rows(decoder, rows()), expected, strict=True))


def through_the_pipeline(source: str, precision: str, checkpoint: Path, text: Path, run: Path) -> dict[str, Any]:
    """Run the stages up to verification, and measure the graphs."""
    from nbl_export.methods.checkpoint.load import read_spec
    from nbl_export.methods.checkpoint.source import resolve
    from nbl_export.methods.maps_file import load_maps
    from nbl_export.run.pipeline import run_calibration, run_stages
    from nbl_export.run.progress import Ui

    asked = {"precision": precision, "decoder_source": source, "layers": REPLACED, "context": 64}
    asked |= {"calibration": (str(text),), "calibration_tokens": 1024, "prompt_tokens": (16,), "generate_tokens": 4}
    asked |= {"depths": (0,), "engine": "openvino" if source == "openvino" else "ort"}
    run_calibration(str(checkpoint), asked, run, Ui(quiet=True))
    failed = ""
    try:
        run_stages(run, "verify", Ui(quiet=True))
    except ParityError as error:
        failed = str(error)
    facts = json.loads((run / "nbl.json").read_text())
    maps = load_maps(run / "maps.safetensors", facts["replaced_layers"])
    head_dim = read_spec(resolve(str(checkpoint))).head_dim
    found: dict[str, Any] = {"replaced_layers": facts["replaced_layers"]}
    for subject, name, chosen in (("original", "original", None), ("nbl", "model", maps)):
        found[subject] = worst(_decoder(run / name, head_dim), torch_logits(checkpoint, chosen))
    return {"status": "parity failed" if failed else "verified", "reason": failed, **found}


def _decoder(directory: Path, head_dim: int) -> Any:
    """The graph with all logits, in its own types; an IR in float32."""
    from nbl_export.graph.decoder import OnnxDecoder
    from nbl_export.graph.ir.session import IrDecoder
    from nbl_export.graph.names import ALL_LOGITS_IR, all_logits_file

    if (directory / ALL_LOGITS_IR).is_file():
        return IrDecoder(directory, ALL_LOGITS_IR, exact=True)
    return OnnxDecoder(directory, head_dim, file=all_logits_file(directory))


def static_form(precision: str, checkpoint: Path, text: Path, run: Path) -> dict[str, Any]:
    """The rewritten static form for TensorRT, on ONNX Runtime in float32."""
    from nbl_export.graph.decoder import OnnxDecoder
    from nbl_export.graph.names import STATIC_GRAPH_FILE
    from nbl_export.methods.checkpoint.load import load_model, load_tokenizer, read_spec
    from nbl_export.methods.checkpoint.source import resolve
    from nbl_export.methods.linear.collect import collect
    from nbl_export.methods.linear.maps import Linear
    from nbl_export.methods.lmmse import fit
    from nbl_export.methods.rewrite import rewrite
    from nbl_export.run.settled import capabilities_of, model_facts
    from nbl_export.targets.tensorrt import export as static

    spec = read_spec(resolve(str(checkpoint)))
    options = JobOptions(str(checkpoint), engine="trt", precision="fp16", decoder_source="static")
    judge(Case(options, capabilities_of("trt"), dataclasses.replace(model_facts(spec), decoder=None)))
    static.save_graph(static.build_form(checkpoint, SLOTS), run / "original")
    import torch

    ids = load_tokenizer(checkpoint).encode(text.read_text())[: 16 * 64]
    moments = collect(load_model(checkpoint), torch.tensor(ids).view(16, 64), lambda *_: None)["residual"]
    plan = Plan.of(LAYERS, dict.fromkeys((0, 1), "linear"))
    maps = {i: Linear(*fit(moments[i], i)) for i in plan.layers}
    rewrite(run / "original", run / "model", maps, plan.tap)
    found: dict[str, Any] = {"replaced_layers": list(plan.layers)}
    for subject, name, chosen in (("original", "original", None), ("nbl", "model", maps)):
        found[subject] = worst(
            OnnxDecoder(run / name, 0, file=STATIC_GRAPH_FILE, fp32_activations=True), torch_logits(checkpoint, chosen)
        )
    return {"status": "verified", "reason": "", **found}


def every_subset(source: str, precision: str, checkpoint: Path, run: Path) -> dict[str, Any]:
    """The original graph, and those with each subset of layers replaced by random maps."""
    from nbl_export.methods.checkpoint.load import read_spec
    from nbl_export.methods.checkpoint.source import resolve
    from nbl_export.run.settled import model_facts
    from nbl_export.targets import exporter_of
    from nbl_export.targets.base import ExportSettings

    spec, target = read_spec(resolve(str(checkpoint))), exporter_of(source)
    engine, asked = target.capabilities.name, "fp16" if source == "static" else precision  # static: in float32
    options = JobOptions(str(checkpoint), engine=engine, precision=asked, decoder_source=source)
    facts = model_facts(spec)
    judge(Case(options, target.capabilities, facts))
    target.export(checkpoint, run / "original", ExportSettings(source, precision, SLOTS))
    apart: dict[tuple[int, ...], float] = {}
    layers = range(spec.num_layers)
    for chosen in (s for count in range(len(layers)) for s in itertools.combinations(layers, count)):
        maps, directory = {i: random_map(i) for i in chosen}, run / ("original" if not chosen else str(chosen))
        if chosen:
            target.linearize(run / "original", directory, maps)
        apart[chosen] = worst(_opened(source, directory, spec.head_dim), _with_random_maps(checkpoint, chosen))
    found = {"original": apart.pop(()), "nbl": max(apart.values())}
    status = "parity" if max(found.values()) < PARITY else "parity failed"
    return {"status": status, "reason": "", "replaced_layers": [list(chosen) for chosen in apart], **found}


@functools.cache
def _with_random_maps(checkpoint: Path, chosen: tuple[int, ...]) -> list[np.ndarray]:
    return torch_logits(checkpoint, {i: random_map(i) for i in chosen})


def _opened(source: str, directory: Path, head_dim: int) -> Any:
    from nbl_export.graph.decoder import OnnxDecoder
    from nbl_export.graph.ir.session import IrDecoder
    from nbl_export.graph.names import IR_FILE, STATIC_GRAPH_FILE

    if source == "static":
        return OnnxDecoder(directory, head_dim, file=STATIC_GRAPH_FILE, fp32_activations=True)
    if source == "openvino":
        return IrDecoder(directory, IR_FILE, exact=True)
    return _decoder(directory, head_dim)


def row(architecture: str, source: str, precision: str, checkpoint: Path, text: Path, run: Path) -> dict[str, Any]:
    """One row of the table."""
    try:
        with _quiet():
            if architecture not in (*JOBS, *VARIANTS) and precision == "fp32":
                found = every_subset(source, precision, checkpoint, run)
            elif source == "static":
                found = static_form(precision, checkpoint, text, run)
            else:
                found = through_the_pipeline(source, precision, checkpoint, text, run)
    except NblError as error:
        found = {"status": "refused", "reason": str(error)}
    except Exception:
        found = {"status": "crashed", "reason": traceback.format_exc()}
    head = {"architecture": architecture, "source": source, "precision": precision}
    reason = str(found["reason"]).replace(str(run), "RUN").replace(str(checkpoint), architecture)
    return {**head, **found, "reason": reason}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def line(found: dict[str, Any]) -> str:
    """A row as text."""
    head = f"{found['architecture']:15s} {found['source']:7s} {found['precision']:5s} {found['status']:14s}"
    figures = "".join(f" {found[s]:9.2e}" for s in ("original", "nbl") if s in found)
    return f"{head}{figures}  {' '.join(found['reason'].split())[-300:]}"


def runs_of(name: str) -> tuple[tuple[str, str], ...]:
    """Sources and precisions of an architecture or variant."""
    if name in JOBS:
        return RUNS
    made = (OF_OTHERS[0], ("genai", "int4"), *OF_OTHERS[1:]) if name in made_by("genai") else OF_OTHERS
    return (*made, *ALSO.get(name, ()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="architectures, with commas")
    parser.add_argument("--sources", help="sources of graphs, with commas")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "architectures.json")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else [*EVERY, *VARIANTS]
    print(f"{'architecture':15s} {'source':7s} {'prec.':5s} {'status':14s}  original       nbl  max |logit difference|")
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text(stdlib_text(60_000), encoding="utf-8")
        for name in names:
            checkpoint = save_checkpoint(name, Path(scratch) / name)
            found = []
            for source, precision in runs_of(name):
                if given.sources and source not in given.sources.split(","):
                    continue
                run = Path(scratch) / f"{name}-{source}-{precision}"
                found.append(row(name, source, precision, checkpoint, text, run))
                print(line(found[-1]), flush=True)
            keep(given.output, name, found)
    rows = json.loads(given.output.read_text(encoding="utf-8"))["rows"]
    sys.exit(any(found["status"] == "crashed" for found in rows))


def keep(path: Path, name: str, found: list[dict[str, Any]]) -> None:
    """Replace an architecture's rows of the same sources in the file."""
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    order = [*EVERY, *VARIANTS]
    sources = {r["source"] for r in found}
    rows = [*(r for r in before if r["architecture"] != name or r["source"] not in sources), *found]
    rows.sort(key=lambda r: order.index(r["architecture"]))  # stable: the rows of an architecture keep their order
    entry = made(["python bench/architectures.py"], ["1,2"], chosen=False)
    about = {"made": entry, "machine": machine(), "versions": versions(PACKAGES), "rows_of_tokens": ROWS}
    value = {**about, "rows": rows}
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
