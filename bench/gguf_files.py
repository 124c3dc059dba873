"""GGUF files of several sets of layers: checks, what llama.cpp computes beside torch, and sizes.

    python bench/gguf_files.py RUN FILES --layers ";7,25,28,29" --types keep,q8_0 > bench/results/gguf-<model>.json

RUN is a finished run with moments of the normed input (`--maps linear`). FILES is a directory that gets the files,
NAME-<type>-<number of layers>.gguf. An empty set is the original in the form of an NBL file; its logits are compared
with the original file's. node-llama-cpp has to be installed (docs/serving.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.calibrate.moments_file import whole_moments
from nbl_export.graph.gguf.content import Content, read_content, write_content
from nbl_export.measure.benchmark import machine
from nbl_export.mixers import lmmse
from nbl_export.mixers.linear import Linear
from nbl_export.model.linearize import replaced
from nbl_export.model.torch_decoder import TorchDecoder
from nbl_export.options.goals import parse_layers
from nbl_export.run.deployed import Finished, open_finished
from nbl_export.run.progress import Ui
from nbl_export.run_directory import MOMENTS_FILE
from nbl_export.targets.gguf.check import PROMPTS, Answers, check_file, hear, judge
from nbl_export.targets.gguf.engine import LLAMA_CPP, read_gguf_facts
from nbl_export.targets.gguf.linearize import KEEP, linearized
from nbl_export.targets.gguf.write import content_of


def listen(path: Path, windows: Any) -> tuple[Answers, list[list[int]], np.ndarray]:
    """What llama.cpp says of a file, the ids of the prompts, and the logits behind the first one."""
    with LLAMA_CPP.open_runner(path) as runner:
        prompts = [runner.encode(text, chat=False) for text in PROMPTS]
        runner.begin(64)
        logits = np.array(runner.server.ask("logits", ids=prompts[0])["logits"])
        return hear(runner, prompts, windows), prompts, logits


def maps_of(run: Path, layers: tuple[int, ...]) -> dict[int, Linear]:
    """Maps without a bias in closed form, from the run's moments."""
    with whole_moments(run / MOMENTS_FILE) as file:
        return {i: Linear(*lmmse.fit(file.sums(i, "normed").moments(), i, bias=False)) for i in layers}


def measure(found: Finished, run: Path, files: Path, sets: list[tuple[int, ...]], kinds: list[str]) -> dict[str, Any]:
    """A row for each type and set of layers."""
    given = found.source.value.gguf
    content = read_content(given) if given else content_of(found.checkpoint.value)
    windows, rows = found.held_back.value.final, []
    torch_heard: dict[tuple[int, ...], Answers] = {}
    for kind in kinds:
        plain = (
            given
            if given and kind == KEEP
            else _write(content, {}, kind, files / f"{found.source.value.title}-{kind}.gguf")
        )
        heard, prompts, logits = listen(plain, windows)
        for layers in [(), *sets]:
            if layers not in torch_heard:
                with replaced(found.model.value, maps_of(run, layers), "normed"):
                    torch_heard[layers] = hear(TorchDecoder(found.model.value), prompts, windows)
        for layers in sets:
            maps = maps_of(run, layers)
            path = _write(content, maps, kind, files / f"{found.source.value.title}-{kind}-{len(layers)}.gguf")
            ours, _, its_logits = listen(path, windows)
            checks = [*check_file(path, content, maps, kind), *judge(torch_heard[()], heard, torch_heard[layers], ours)]
            facts = read_gguf_facts(path)
            rows.append({
                "type": kind, "layers": list(layers), "file_bytes": path.stat().st_size,
                "original_bytes": plain.stat().st_size, "cache_layers": facts.cache_layers,
                "cache_bytes_per_token": facts.cache_bytes_per_token,
                "perplexity": {"llama.cpp": ours.perplexity, "torch": torch_heard[layers].perplexity},
                "perplexity_of_original": {"llama.cpp": heard.perplexity, "torch": torch_heard[()].perplexity},
                "checks": [dataclasses.asdict(check) for check in checks],
                **({} if layers else {"logit_difference_from_original": float(np.abs(its_logits - logits).max())}),
            })  # fmt: skip
            print(f"{kind} {len(layers)} layers: {[c.metric for c in checks if not c.passed]}", file=sys.stderr)
    return {"machine": machine(), "versions": LLAMA_CPP.probe().reason, "rows": rows}


def _write(content: Content, maps: dict[int, Linear], kind: str, path: Path) -> Path:
    write_content(linearized(content, maps, kind, {}), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("files", type=Path)
    parser.add_argument("--layers", required=True)
    parser.add_argument("--types", default="keep,q8_0")
    options = parser.parse_args()
    options.files.mkdir(parents=True, exist_ok=True)
    with open_finished(options.run, Ui(quiet=True)) as found:
        count = found.run.manifest["num_layers"]
        sets = [tuple(parse_layers(text, count)) if text else () for text in options.layers.split(";")]  # type: ignore[arg-type]
        result = measure(found, options.run, options.files, sets, options.types.split(","))
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
