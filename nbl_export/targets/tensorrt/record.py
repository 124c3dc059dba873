"""engine.json: what a plan is, where it came from and where it runs. The plan itself says this only on a GPU.

engine/model/   decoder.engine  engine.json  config and tokenizer files        deployable by itself
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, NblError
from nbl_export.files import read_json
from nbl_export.records import from_json
from nbl_export.records.decoder import GraphContract, TensorInfo
from nbl_export.targets.tensorrt.static.schedule import Profile
from nbl_export.trust.contained import check_folder, check_inside

__all__ = ["ENGINE_FILE", "RECORD_FILE", "EngineRecord", "read_plan", "read_record"]

ENGINE_FILE = "decoder.engine"
RECORD_FILE = "engine.json"
_SCHEMA = 4


@dataclass(frozen=True)
class EngineRecord:
    """The value of engine.json.

    Attributes:
        engine: trt or trt-rtx.
        version: version of the library.
        attention: what was allowed: "fused" or "decomposable", see `network`.
        compute_capabilities: the GPUs that the plan runs on.
        gpu: name of the GPU whose kernels were timed; "" if the plan was built for no GPU of its own.
        cache_bytes_per_token: of one row.
        cache_bytes: of max_batch rows with all slots.
    """

    engine: str
    version: str
    precision: str
    attention: str
    compute_capabilities: tuple[str, ...]
    gpu: str
    max_batch: int
    prefill_chunk: int
    max_seq_len: int
    profiles: tuple[Profile, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    cache_layers: int
    cache_bytes_per_token: int
    cache_bytes: int
    build_seconds: float
    plan_bytes: int
    plan_sha256: str

    @property
    def contract(self) -> GraphContract:
        """Inputs, outputs and dense cache ids."""
        return GraphContract(self.inputs, self.outputs, tuple(range(self.cache_layers)))

    def to_json(self) -> dict[str, Any]:
        return {"schema": _SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EngineRecord:
        if values.pop("schema", None) != _SCHEMA:
            raise ValueError("another schema")
        return from_json.read_record(cls, values)


def read_record(directory: Path) -> EngineRecord:
    """Read and check the record of an engine directory. The plan's hash is left to `read_plan`, whose bytes run.

    Raises:
        NblError: the directory holds no engine.
        CorruptError: engine.json cannot be read, the plan has another size, or an entry is a link out of the directory.
    """
    path = directory / RECORD_FILE
    plan = directory / ENGINE_FILE
    if not path.is_file():
        raise NblError(f"{directory} holds no engine: {RECORD_FILE} is missing; nbl-export build makes one")
    check_folder(directory)
    try:
        record = EngineRecord.from_json(read_json(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); {_again(None)}") from error
    if not plan.is_file():
        raise CorruptError(f"{plan} is missing; {_again(record)}")
    size = plan.stat().st_size
    if size != record.plan_bytes:
        raise CorruptError(
            f"{plan} is cut short or replaced: {size} bytes, {record.plan_bytes} recorded; {_again(record)}"
        )
    return record


def read_plan(directory: Path, record: EngineRecord) -> bytes:
    """The bytes of a plan, for TensorRT to run. A plan is code, so the returned bytes are the hashed bytes.

    Raises:
        CorruptError: the plan is not the recorded plan, or is a link out of the directory.
    """
    plan = check_inside(directory / ENGINE_FILE, directory)
    data = plan.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.plan_sha256:
        raise CorruptError(f"{plan} is damaged: its hash is not the one recorded; {_again(record)}")
    return data


def _again(record: EngineRecord | None) -> str:
    engine = f" --engine {record.engine}" if record else ""
    return f"build it again: nbl-export build DIR{engine}"
