"""Builds decoder.onnx into a plan (TensorRT's serialised engine) with engine.json beside it; complete or absent.

DIR/model/decoder.onnx ─ parse ─ build ─► scratch ─ rename ─► DIR/engine/model/

A build that a library refuses for its attention is tried again, with more allowed each time:

    fused attention ─► casts to bfloat16 around attention ─► decode of 1 to 2 tokens ─► attention may be decomposed

Each build of a large model takes minutes. So a build that is refused for another reason, such as memory, ends there.
Errors of the builder decide, never warnings: it skips a tactic that finds too little memory, and takes another.

TensorRT-RTX's builder tells, without a GPU, whether the steps of a plan can be captured as a CUDA graph:

    can be captured       Layer(Myelin): ... , Layer(Myelin): ... [profile 1]        one layer for each profile
    cannot                Layer(TrainStation), Layer(Myelin), Layer(DeviceToShapeHost), ...    waits for the host

Two signs are needed (seen with TensorRT-RTX 1.7.1). With the flag REQUIRE_USER_ALLOCATION, the builder refuses kernels
that allocate memory or wait for the host. It still takes a network whose shapes depend on data, and splits the plan
where a size goes to the host. The builder lists the layers of a plan among its notes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.files import file_sha256, friendly_os_errors, scratch_in, write_json
from nbl_export.graph.names import ALL_LOGITS_FILE, STATIC_GRAPH_FILE
from nbl_export.graph.trust import read_proto
from nbl_export.records.decoder import ITEMSIZE, GraphContract
from nbl_export.targets.base import BuildSettings
from nbl_export.targets.gpu import Gpu, find_gpu
from nbl_export.targets.tensorrt.library import Library, load_library
from nbl_export.targets.tensorrt.messages import (
    LAYERS_NOTE,
    Message,
    Messages,
    complaints,
    errors,
    ignored_inputs,
    messages_of,
    require,
    skipped,
)
from nbl_export.targets.tensorrt.network import (
    DECOMPOSABLE,
    FUSED,
    FUSED_BF16,
    ParsedNetwork,
    allow_decomposing,
    attend_in_bf16,
    bypass_unit_scale,
    copied_heads,
    lacks_kernel,
    parse,
)
from nbl_export.targets.tensorrt.plan_file import Plan, finished, plan_writer
from nbl_export.targets.tensorrt.record import ENGINE_FILE, RECORD_FILE, EngineRecord
from nbl_export.targets.tensorrt.static.schedule import Profile, engine_profiles, in_two_tokens
from nbl_export.targets.tensorrt.timings import begin_with, keep, timings_file
from nbl_export.trust.contained import check_inside
from nbl_export.trust.user_lists import remember

__all__ = ["build_engine", "capturable"]

_logger = logging.getLogger(__name__)

_GRAPH = STATIC_GRAPH_FILE
_KERNEL_BYTES = 64 << 20
_FP16_ALONE = "7.5"  # compute capability without bf16 and int4
_FLAG = "REQUIRE_USER_ALLOCATION"
_WAITING = ("DeviceToShapeHost", "TrainStation")  # kinds of layers that wait for the host; the first names a tensor


# What a refusal says if attention has no kernel: TensorRT-RTX 1.7.1; TensorRT 11.1 and 11.2 (issue 955 of NVIDIA's
# TensorRT-Model-Connect); and what the builder says of any node without a kernel, since a decoder is one node.
_NO_KERNEL = ("dedicated kernel", "live inputs")
_PERHAPS_NO_KERNEL = ("attention", "could not find any implementation")
_NO_MEMORY = ("outofmemory", "out of memory", "insufficient memory", "insuficient memory", "memory is insufficient")


@dataclass(frozen=True)
class _Built:
    plan: Plan
    attention: str  # FUSED, FUSED_BF16 or DECOMPOSABLE
    profiles: tuple[Profile, ...]
    capturable: bool | None  # None: the builder does not say
    seconds: float


@dataclass(frozen=True)
class _Refusal:
    """Why there is no plan. of_attention: attention has no kernel, so another way may build."""

    why: str
    of_attention: bool


def build_engine(library: Library, source: Path, out: Path, settings: BuildSettings) -> EngineRecord:
    """Build the plan of `source`/decoder.onnx, with two optimisation profiles, into the directory `out`, replacing it.

    Raises:
        NblError: the graph is refused, warns, does not build or cannot be captured; or the disk is full. `out` stays.
        CorruptError: the graph keeps weights outside its folder.
    """
    trt = load_library(library)
    log = messages_of(trt)
    graph = source / _GRAPH
    if not graph.is_file():
        raise NblError(f"{source} holds no {_GRAPH}; export it with --engine {library.capabilities.name}")
    read_proto(graph)
    parsed = parse(trt, log, graph)
    bypass_unit_scale(parsed)
    contract = parsed.contract
    two_rows = parsed.precision == "int4" or contract.logits == "last"
    profiles = engine_profiles(settings.max_batch, settings.prefill_chunk, _slots(contract), two_rows=two_rows)
    computes = _targets(library, settings.targets, parsed.precision)
    with friendly_os_errors(out), _replacing(out) as scratch:
        asked = computes if settings.targets else ()
        built = _build(parsed, log, profiles, asked, library, scratch / ENGINE_FILE)
        record = _record(library, parsed, settings, computes, built)
        write_json(scratch / RECORD_FILE, record.to_json())
        if _has_copies(record.plan_bytes, sum(f.stat().st_size for f in _files(graph))):
            _logger.warning("%s is larger than the weights: the library may have stored matrices twice", out)
        _copy_text_files(source, scratch)
    try:
        remember(record.plan_sha256)
    except NblError as error:
        _logger.warning("%s will run only with --trust-engine: %s", out / ENGINE_FILE, error)
    return record


def _slots(contract: GraphContract) -> int:
    return next(int(info.shape[2]) for info in contract.inputs if info.name.startswith("past_key_values."))


def _at_hand(library: Library) -> tuple[str, ...]:
    """The compute capability of this machine's GPU, if the library builds for that alone."""
    gpu = find_gpu()
    return (gpu.compute,) if isinstance(gpu, Gpu) and not library.default_targets else ()


def _targets(library: Library, asked: Sequence[str], precision: str) -> tuple[str, ...]:
    """Compute capabilities that the plan is for.

    Raises:
        NblError: a capability is unknown to the library, cannot be chosen, or lacks the precision.
    """
    title = library.capabilities.title
    if not library.default_targets:
        here = _at_hand(library)
        if asked and tuple(asked) != here:
            raise NblError(
                f"{title} builds for the GPU at hand, not for {', '.join(asked)}; use --engine {library.other}"
            )
        _refuse_weak(here, precision)
        return here
    for compute in asked:
        if compute not in library.computes:
            known = ", ".join(library.computes)
            raise NblError(
                f"{title} has no kernels for compute capability {compute}, it is for {known}; use --engine "
                f"{library.other}"
            )
    _refuse_weak(asked, precision)
    return tuple(asked) or library.default_targets


def _refuse_weak(computes: Sequence[str], precision: str) -> None:
    for compute in computes:
        if compute == _FP16_ALONE and precision != "fp16":
            raise NblError(f"compute capability {compute} has no {precision}: use --precision fp16 for it")


def _build(
    parsed: ParsedNetwork, log: Messages, profiles: Sequence[Profile], targets: Sequence[str], library: Library,
    path: Path,
) -> _Built:  # fmt: skip
    """Build a plan to `path`, in the first way that the library has kernels for.

    Raises:
        NblError: the library refuses every way, or refuses one for another reason than attention.
    """
    started = time.perf_counter()
    name = parsed.network.name
    failed = f"{library.capabilities.title} does not build {name}"
    refused: list[str] = []
    if known := lacks_kernel(library, parsed):
        refused.append(known)
    gpu = find_gpu()
    timed = timings_file(parsed.trt.__version__, gpu) if isinstance(gpu, Gpu) and not library.jit else None
    if any(p.decodes and p.tokens[2] > 1 for p in profiles):
        _logger.warning("%s: %s; a smaller --max-seq-len needs none of it", name, _two_tokens(parsed, profiles))
    for attention, chosen, said in _ways(
        parsed, tuple(profiles), only_last=bool(known), narrow=_FP16_ALONE not in (targets or _at_hand(library))
    ):
        if refused:
            _logger.warning("%s: %s: %s", name, said, refused[-1])
        with log.explaining(failed):
            config = _config(parsed, chosen, targets, library)
            if timed is not None:
                begin_with(config, timed)
        plan, proven, refusal = _attempt(parsed, log, config, library, failed, path)
        if timed is not None:
            keep(config, timed)
        if plan is not None:
            return _Built(plan, attention, chosen, proven, time.perf_counter() - started)
        refused.append(refusal.why)
        if not refusal.of_attention:
            break
    raise NblError(f"{failed}: {'; and before: '.join(reversed(refused))}")


def _ways(
    parsed: ParsedNetwork, profiles: tuple[Profile, ...], *, only_last: bool, narrow: bool
) -> Iterator[tuple[str, tuple[Profile, ...], str]]:
    """Ways to build, the fastest first: attention, profiles, and what a warning says of the way.

    The network is changed for a way when the way is taken.

    Args:
        narrow: whether the engine's GPUs have bfloat16.
    """
    if not only_last:
        yield FUSED, profiles, ""
        if narrow and parsed.precision in ("fp16", "int4"):
            bypass = attend_in_bf16(parsed)
            yield FUSED_BF16, profiles, "attention computes in bfloat16, with casts around it"
            bypass()
        if (wider := in_two_tokens(profiles)) != profiles:
            yield FUSED, wider, _two_tokens(parsed, wider)
    if allow_decomposing(parsed):
        yield DECOMPOSABLE, profiles, "attention may be decomposed into matrix products, which is slower"


def _two_tokens(parsed: ParsedNetwork, profiles: Sequence[Profile]) -> str:
    """What decode of 1 to 2 tokens costs, in words; seen with TensorRT-RTX 1.7.1."""
    rows = max(p.batch[2] for p in profiles if p.decodes)
    queries, held, size = copied_heads(parsed, rows)
    return (
        f"decode is built for 1 to 2 tokens, which copies keys and values of all {_slots(parsed.contract):,} slots for "
        f"each of {queries} query heads, {queries / held:.3g} times the cache of a layer, in {size / 1e6:,.0f} MB"
    )


def _config(parsed: ParsedNetwork, profiles: Sequence[Profile], targets: Sequence[str], library: Library) -> Any:
    """The builder's configuration, inside a block of `Messages.explaining`."""
    trt, builder = parsed.trt, parsed.builder
    config = require(builder.create_builder_config())
    if library.jit:  # its layers are listed in another form with DETAILED, which does not tell whether they wait
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # refuses what cannot be captured
    else:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names kernels to `runner.TrtSession.inspected`
    if targets and library.default_targets:  # TensorRT builds for the GPU at hand and has no such names
        config.num_compute_capabilities = len(targets)
        for index, compute in enumerate(targets):
            member = f"SM{compute.replace('.', '')}"
            require(config.set_compute_capability(trt.ComputeCapability.__members__[member], index))
    for profile in profiles:
        config.add_optimization_profile(_shapes(builder, parsed.network, profile))
    return config


def _attempt(
    parsed: ParsedNetwork, log: Messages, builder_config: Any, library: Library, failed: str, path: Path
) -> tuple[Plan | None, bool | None, _Refusal]:
    """One build: the plan or None, whether its steps can be captured (None: the builder does not say), and the refusal.

    Raises:
        NblError: the engine would not read an input, or its steps cannot be captured.
        OSError: the disk is full.
    """
    network, proven, refusal = parsed.network, None, _Refusal("", False)
    writer = plan_writer(parsed.trt, path)
    with log.explaining(failed) as said:
        done = parsed.builder.build_serialized_network_to_stream(network, builder_config, writer)
        if writer.failure is None:
            if ignored := ignored_inputs(said):
                raise NblError(f"the engine would not read an input of {network.name}: {ignored[0]}")
            proven = capturable(said, done, network.name) if library.jit else None
        if not done:
            refusal = _refusal(said)
            said.clear()  # the caller tells the reason
    plan = finished(writer)
    return (plan if done else None), proven, refusal


def _refusal(said: Sequence[Message]) -> _Refusal:
    """Read the builder's errors: a missing kernel for attention first, then memory, then whatever may be either."""
    failed = errors(said)

    def first(signs: Sequence[str]) -> str:
        return next((text[:500] for text in failed if any(sign in text.lower() for sign in signs)), "")

    if why := first(_NO_KERNEL):
        return _Refusal(why, True)
    if why := first(_NO_MEMORY):
        smaller = "free memory of the GPU, or use a smaller --max-seq-len, key max_batch or key prefill_chunk"
        return _Refusal(f"the GPU has too little memory ({why}); {smaller}", False)
    left = skipped(said)
    if why := first(_PERHAPS_NO_KERNEL):
        return _Refusal(f"{why} ({len(left)} times it said: {left[0][:200]})" if left else why, True)
    return _Refusal([*failed, *left, "it gives no reason"][0][:500], False)


def _shapes(builder: Any, network: Any, profile: Profile) -> Any:
    """Shape ranges of all inputs: the first dimension is the batch; the second of input_ids is tokens."""
    result = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        ranges = [list(tensor.shape) for _ in range(3)]
        for dims, batch, tokens in zip(ranges, profile.batch, profile.tokens, strict=True):
            dims[0] = batch
            if tensor.name == "input_ids":
                dims[1] = tokens
        result.set_shape(tensor.name, *map(tuple, ranges))
    return result


def _record(
    library: Library, parsed: ParsedNetwork, settings: BuildSettings, computes: tuple[str, ...], built: _Built
) -> EngineRecord:
    contract = parsed.contract
    caches = [info for info in contract.inputs if info.name.startswith("past_key_values.")]
    per_token = sum(int(i.shape[1]) * int(i.shape[3]) * ITEMSIZE[i.dtype] for i in caches)
    cache_length = _slots(contract)
    gpu = find_gpu()
    return EngineRecord(
        engine=library.capabilities.name,
        version=parsed.trt.__version__,
        precision=parsed.precision,
        attention=built.attention,
        compute_capabilities=computes,
        gpu=gpu.name if isinstance(gpu, Gpu) and not library.default_targets else "",
        capturable=built.capturable,
        max_batch=settings.max_batch,
        prefill_chunk=settings.prefill_chunk,
        max_seq_len=cache_length,
        profiles=built.profiles,
        inputs=contract.inputs,
        outputs=contract.outputs,
        cache_layers=len(contract.cache_layers),
        cache_bytes_per_token=per_token,
        cache_bytes=per_token * cache_length * settings.max_batch,
        parse_seconds=round(parsed.seconds, 3),
        build_seconds=round(built.seconds, 3),
        plan_bytes=built.plan.size,
        plan_sha256=built.plan.sha256,
        graph_sha256={f.name: file_sha256(f) for f in _files(parsed.graph)},
    )


def _files(graph: Path) -> list[Path]:
    """The graph and its weights."""
    return [graph, *(f for f in [graph.with_name(f"{_GRAPH}.data")] if f.is_file())]


def _has_copies(plan_bytes: int, weight_bytes: int) -> bool:
    """Whether a plan is a fifth larger than its weights, beyond what kernels take."""
    return plan_bytes > 1.2 * weight_bytes + _KERNEL_BYTES


@contextlib.contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A scratch directory beside `out` that replaces `out` at the end; if anything fails, the scratch is deleted."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch_in(out.parent) as scratch:
        made = scratch / out.name
        made.mkdir()
        yield made
        if out.exists():
            shutil.rmtree(out)
        os.replace(made, out)


def _copy_text_files(source: Path, out: Path) -> None:
    """Copy configuration and tokenizer, so that the engine's directory is deployable by itself."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(_GRAPH) and path.name != ALL_LOGITS_FILE:
            shutil.copyfile(check_inside(path, path.parent), out / path.name)


# -- capture -------------------------------------------------------------------------------------------


def capturable(said: Sequence[Message], built: bool, name: str) -> bool | None:
    """Whether the steps of a plan can be captured; None if the builder lists no layers.

    Args:
        said: what the builder said, with the flag `_FLAG`.
        built: whether the builder gave a plan.
        name: of the network, for the error.

    Raises:
        NblError: the steps cannot be captured.
    """
    if not built:
        if why := [text for text in complaints(said) if _FLAG in text]:
            raise NblError(f"a CUDA graph cannot hold the steps of {name}, as decode needs: {why[0]}")
        return None
    notes = "\n".join(m.text for m in said if m.text.startswith(LAYERS_NOTE))
    layers = re.findall(r"^Layer\((\w+)\): (.*?)(?:, Tactic|$)", notes, re.MULTILINE)
    for waiting in _WAITING:
        if found := [layer for kind, layer in layers if kind == waiting]:
            raise NblError(f"a CUDA graph cannot hold the steps of {name}, as decode needs: they wait for {found[0]}")
    return True if layers else None
