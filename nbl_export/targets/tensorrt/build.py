"""Builds decoder.onnx into a plan (TensorRT's serialised engine) with engine.json beside it; complete or absent.

DIR/model/decoder.onnx ─ parse ─ build ─► scratch ─ rename ─► DIR/engine/model/

A build that a library refuses for its attention is tried again, with more allowed each time:

    fused attention ─► decode of 1 to 2 tokens ─► attention may be decomposed

Each build of a large model takes minutes. So a build that is refused for another reason, such as memory, ends there.
Errors of the builder decide, never warnings: it skips a tactic that finds too little memory, and takes another.

The plan is written while the library serialises it, so that no buffer of this project holds the whole plan:

    build_serialized_network_to_stream ─► parts (of at most 64 MiB in TensorRT-RTX 1.7.1) ─► decoder.engine, SHA-256

SmolLM2 in fp16 with 8 layers replaced, a plan of 276 MB: the build's peak is 1.33 GB, and 1.41 GB with a whole plan.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nbl_export.errors import NblError
from nbl_export.files import friendly_os_errors, scratch_in, write_json
from nbl_export.graph.names import ALL_LOGITS_FILE, STATIC_GRAPH_FILE
from nbl_export.graph.trust import read_proto
from nbl_export.records.decoder import ITEMSIZE, GraphContract
from nbl_export.targets.base import BuildSettings
from nbl_export.targets.gpu import Gpu, find_gpu
from nbl_export.targets.tensorrt.library import Library, load_library
from nbl_export.targets.tensorrt.messages import Message, Messages, errors, messages_of, require, skipped
from nbl_export.targets.tensorrt.network import (
    DECOMPOSABLE,
    FUSED,
    ParsedNetwork,
    allow_decomposing,
    copied_heads,
    parse,
)
from nbl_export.targets.tensorrt.record import ENGINE_FILE, RECORD_FILE, EngineRecord
from nbl_export.targets.tensorrt.static.schedule import Profile, engine_profiles, in_two_tokens
from nbl_export.trust.contained import check_inside

__all__ = ["build_engine"]

_logger = logging.getLogger(__name__)

_GRAPH = STATIC_GRAPH_FILE
_FP16_ALONE = "7.5"  # compute capability without bf16 and int4

# What a refusal says if attention has no kernel: TensorRT-RTX 1.7.1; TensorRT 11.1 and 11.2 (issue 955 of NVIDIA's
# TensorRT-Model-Connect); and what the builder says of any node without a kernel, since a decoder is one node.
_NO_KERNEL = ("dedicated kernel", "live inputs")
_PERHAPS_NO_KERNEL = ("attention", "could not find any implementation")
_NO_MEMORY = ("outofmemory", "out of memory", "insufficient memory", "insuficient memory", "memory is insufficient")


@dataclass(frozen=True)
class _Built:
    """attention: FUSED or DECOMPOSABLE."""

    plan_bytes: int
    plan_sha256: str
    attention: str
    profiles: tuple[Profile, ...]
    seconds: float


@dataclass(frozen=True)
class _Refusal:
    """Why there is no plan. of_attention: attention has no kernel, so another way may build."""

    why: str
    of_attention: bool


def build_engine(library: Library, source: Path, out: Path, settings: BuildSettings) -> EngineRecord:
    """Build the plan of `source`/decoder.onnx, with two optimisation profiles, into the directory `out`, replacing it.

    Raises:
        NblError: the graph is refused, warns or does not build; or the disk is full. `out` stays.
        CorruptError: the graph keeps weights outside its folder.
    """
    trt = load_library(library)
    log = messages_of(trt)
    graph = source / _GRAPH
    if not graph.is_file():
        raise NblError(f"{source} holds no {_GRAPH}; export it with --engine {library.capabilities.name}")
    read_proto(graph)
    parsed = parse(trt, log, graph)
    contract = parsed.contract
    two_rows = parsed.precision == "int4" or contract.logits == "last"
    profiles = engine_profiles(settings.max_batch, settings.prefill_chunk, _slots(contract), two_rows=two_rows)
    computes = library.computes or _at_hand()
    if _FP16_ALONE in computes and parsed.precision != "fp16":
        raise NblError(f"compute capability {_FP16_ALONE} has no {parsed.precision}: use --precision fp16 for it")
    with friendly_os_errors(out), _replacing(out) as scratch:
        built = _build(parsed, log, profiles, library, scratch / ENGINE_FILE)
        record = _record(library, parsed, settings, computes, built)
        write_json(scratch / RECORD_FILE, record.to_json())
        _copy_text_files(source, scratch)
    return record


def _slots(contract: GraphContract) -> int:
    return next(int(info.shape[2]) for info in contract.inputs if info.name.startswith("past_key_values."))


def _at_hand() -> tuple[str, ...]:
    """The compute capability of this machine's GPU."""
    gpu = find_gpu()
    return (gpu.compute,) if isinstance(gpu, Gpu) else ()


def _build(parsed: ParsedNetwork, log: Messages, profiles: tuple[Profile, ...], library: Library, path: Path) -> _Built:
    """Build a plan to `path`, in the first way that the library has kernels for.

    Raises:
        NblError: the library refuses every way, or refuses one for another reason than attention.
    """
    started = time.perf_counter()
    name = parsed.network.name
    failed = f"{library.capabilities.title} does not build {name}"
    refused: list[str] = []
    if any(p.decodes and p.tokens[2] > 1 for p in profiles):
        _logger.warning("%s: %s; a smaller --max-seq-len needs none of it", name, _two_tokens(parsed, profiles))
    for attention, chosen, said in _ways(parsed, profiles):
        if refused:
            _logger.warning("%s: %s: %s", name, said, refused[-1])
        built = _attempt(parsed, log, chosen, library, failed, path)
        if not isinstance(built, _Refusal):
            return _Built(*built, attention, chosen, time.perf_counter() - started)
        refused.append(built.why)
        if not built.of_attention:
            break
    raise NblError(f"{failed}: {'; and before: '.join(reversed(refused))}")


def _ways(parsed: ParsedNetwork, profiles: tuple[Profile, ...]) -> Iterator[tuple[str, tuple[Profile, ...], str]]:
    """Ways to build, the fastest first: attention, profiles, and what a warning says of the way.

    The network is changed for a way when the way is taken.
    """
    yield FUSED, profiles, ""
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


def _attempt(
    parsed: ParsedNetwork, log: Messages, profiles: Sequence[Profile], library: Library, failed: str, path: Path
) -> tuple[int, str] | _Refusal:
    """One build: bytes and SHA-256 of the plan, or why there is none.

    Raises:
        NblError: the library makes no configuration. OSError: the disk is full.
    """
    build = parsed.builder.build_serialized_network_to_stream
    refusal = None
    with path.open("wb") as file:
        with log.explaining(failed) as said:
            writer = _plan_writer(parsed.trt, file)
            if not build(parsed.network, _config(parsed, profiles, library), writer):
                refusal = _refusal(said)
                said.clear()  # the caller tells the reason
        if writer.failure is not None:
            raise writer.failure
    return refusal or (writer.size, writer.digest.hexdigest())


def _config(parsed: ParsedNetwork, profiles: Sequence[Profile], library: Library) -> Any:
    """The builder's configuration, inside a block of `Messages.explaining`."""
    trt = parsed.trt
    builder = parsed.builder
    config = require(builder.create_builder_config())
    if library.jit:  # refuses kernels that allocate or wait for the host, which a CUDA graph cannot hold
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for profile in profiles:
        config.add_optimization_profile(_shapes(builder, parsed.network, profile))
    return config


def _plan_writer(trt: Any, file: BinaryIO) -> Any:
    """An `IStreamWriter` to a file."""

    class Writer(trt.IStreamWriter):
        """The library swallows an exception of the callback; `failure` keeps it, and the library is told no bytes."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failure: OSError | None = None
            self.digest = hashlib.sha256()
            self.size = 0

        def write(self, data: bytes, *_size: int) -> int:
            try:
                file.write(data)
            except OSError as error:
                self.failure = error
                return 0
            self.digest.update(data)
            self.size += len(data)
            return len(data)

    return Writer()


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
        gpu=gpu.name if isinstance(gpu, Gpu) and not library.jit else "",
        max_batch=settings.max_batch,
        prefill_chunk=settings.prefill_chunk,
        max_seq_len=cache_length,
        profiles=built.profiles,
        inputs=contract.inputs,
        outputs=contract.outputs,
        cache_layers=len(contract.cache_layers),
        cache_bytes_per_token=per_token,
        cache_bytes=per_token * cache_length * settings.max_batch,
        build_seconds=round(built.seconds, 3),
        plan_bytes=built.plan_bytes,
        plan_sha256=built.plan_sha256,
    )


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
