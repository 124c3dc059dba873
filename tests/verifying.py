"""All checks of `verify` on graphs of a tiny model, as a run's stages make and check them; no job, no fitted maps."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.load import load_model, read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.rows import continuing_tokens
from nbl_export.records.plan import Plan
from nbl_export.records.results import CheckResult
from nbl_export.targets import load_engine
from nbl_export.targets.base import compiler
from nbl_export.verify import exporter
from nbl_export.verify.ladder import DECODE_STEPS, Probe
from nbl_export.verify.structure import VerificationContext
from nbl_export.verify.verifier import Verifier
from tests.exports import build_decoder

from .tiny import LAYERS, VOCAB, random_map

__all__ = ["ENGINES", "SLOTS", "verify_tiny"]

ENGINES = {"genai": "ort", "mobius": "ort", "static": "trt-rtx", "openvino": "openvino"}  # by source
SLOTS = 200  # of a cache of the static form
_PREFILL, _LONG = (29, 11), 180  # tokens of the short rows, beyond the tiny windows, and of the long row


def verify_tiny(
    checkpoint: Path,
    source: str,
    precision: str,
    work: Path,
    replaced: tuple[int, ...] = (0, 2),
    tap: str = "residual",
    mixer_of: Callable[[int], Mixer] = random_map,
    exported: Path | None = None,
    prompts: bool = True,
    written: Mapping[int, Mixer] | None = None,
    damage: Callable[[Path], None] | None = None,
) -> list[CheckResult]:
    """Export, prune, rewrite and verify in the folder `work`.

    Args:
        mixer_of: layer -> its mixer.
        exported: the original graph, which is copied instead of made.
        prompts: without them, no text is compared.
        written: mixers that the graph gets in place of those that are verified.
        damage: changes the directory of the NBL graph.
    """
    engine, spec = load_engine(ENGINES[source]), read_spec(resolve(str(checkpoint)))
    static = engine.capabilities.static
    maps = {i: mixer_of(i) for i in replaced}
    plan = Plan.of(LAYERS, {i: mixer.kind for i, mixer in maps.items()}, tap)
    cache_length = SLOTS if static else spec.max_positions
    verification = VerificationContext(engine, spec, plan, precision, "last", cache_length, _quiet)
    directories = {"original": work / "original", "nbl": work / "model"}
    if exported is None:
        build_decoder(source, checkpoint, directories["original"], precision, cache_length=cache_length)
    else:
        shutil.copytree(exported, directories["original"])
    engine.keep_last_token(directories["original"])
    engine.linearize(directories["original"], directories["nbl"], maps if written is None else written, plan.tap)
    if damage is not None:
        damage(directories["nbl"])
    run = directories
    if static:
        run = {subject: work / f"{subject}-float32" for subject in directories}
        for subject, directory in directories.items():
            compiler(engine).write_float32(directory, run[subject])
    made = Verifier(verification, _probe(prompts, continuing_tokens(mixer.reads for mixer in maps.values())), maps)
    made.run(directories, run)
    model = load_model(checkpoint)
    if precision in exporter.ROUNDED:
        windows = np.random.default_rng(1).integers(2, VOCAB, (2, 100))
        original = engine.open_graph(run["original"], spec.head_dim)
        result, _ = exporter.check_perplexity(model, original, precision, windows, lambda *_: None)
        return [*made.results, result]
    return [*made.results, *exporter.check_logits(model, precision, made.probe, made.references["original"])]


@contextlib.contextmanager
def _quiet(_title: str) -> Iterator[Any]:
    yield lambda *_: None


def _probe(prompts: bool, continuing: int | None) -> Probe:
    ids = np.random.default_rng(0).integers(2, VOCAB, _LONG + DECODE_STEPS).tolist()
    rows = [tuple(ids[: n + DECODE_STEPS]) for n in _PREFILL]
    short = () if continuing is None else (rows[0], rows[1][: continuing + 1 + DECODE_STEPS])
    return Probe(tuple(rows), (tuple(ids[20:44]), tuple(ids[90:114])) if prompts else (), 24, tuple(ids), short)
