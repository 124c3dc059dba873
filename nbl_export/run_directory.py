"""The run directory: one manifest, hashed files, and stages that are finished or absent.

    DIR/nbl.json               the manifest (this module's `RunDirectory` reads and writes it)
    DIR/text.safetensors       text: token ids of the calibration text and of the second text, by use
    DIR/sums.safetensors       calibrate; calibrate.partial.safetensors while it works
    DIR/maps.safetensors       plan; distill, if requested (then plan writes start.safetensors)
    DIR/distill.json           distill; distill.partial.safetensors while it works
    DIR/original/              decoder: the exported graph; all_logits.onnx is the graph as exported, if model.onnx
                               gives the logits of the last token, as in model/
    DIR/model/                 rewrite: the NBL graph, deployable by itself
    DIR/model/README.md        card, if requested
    DIR/verify.json            verify
    DIR/acceptance-values.json verify, for engines of a GPU: what `accept` compares with on the target machine
    DIR/eval.json              eval, if requested
    DIR/engine/{original,model}/ build: compiled, deployable by itself
    DIR/bench.json             bench
    DIR/report.{html,md,json}  report
    DIR/acceptance.json        accept, on the target machine
    DIR/checkpoint/            the stock safetensors checkpoint of a GGUF or NBL model, until the report is written

A stage writes into a scratch directory, and its results are renamed into place. Before the renaming, the manifest drops
the records of this stage and of all stages that read its results. So a kill at any moment leaves the old state, or a
stage that is absent. Changed options reach the manifest with the first stage that finishes under them, so a refused
command changes nothing. The stage text is not such a stage: it drops no records, since the rows that a stage has read
are in the stage's key. So an interrupted change of text leaves the results as they were.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, NblError
from nbl_export.files import (
    file_sha256,
    friendly_os_errors,
    is_scratch,
    make_folder,
    read_json,
    remove,
    scratch_in,
    write_json,
)
from nbl_export.graph.names import CONVERTED, GENAI_CONFIG, IR_FILE, MANIFEST
from nbl_export.methods import METHODS
from nbl_export.options.command import describe_command
from nbl_export.options.options import JobOptions
from nbl_export.records import shapes
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.from_json import check_shape, require
from nbl_export.records.plan import Plan
from nbl_export.trust.contained import check_folder
from nbl_export.trust.lock import locked
from nbl_export.trust.model_settings import drop_code

__all__ = [
    "ACCEPTANCE_FILE",
    "ACCEPTANCE_JSON",
    "BENCH_FILE",
    "CHECKPOINT",
    "DECODERS",
    "DISTILL_FILE",
    "EVAL_FILE",
    "MADE_BY",
    "MAPS_FILE",
    "PACKAGES",
    "REPORT_HTML",
    "REPORT_JSON",
    "REPORT_MD",
    "SCHEMA",
    "START_FILE",
    "SUMS_FILE",
    "TEXT_FILE",
    "VERIFY_FILE",
    "RunDirectory",
    "refuse_foreign",
]

SCHEMA = 1


DECODERS = {"original": "original", "nbl": "model"}  # variant -> directory
MADE_BY = {"original": "decoder", "model": "rewrite"}  # directory of a decoder -> its stage
VERIFY_FILE = "verify.json"
BENCH_FILE = "bench.json"
EVAL_FILE = "eval.json"
DISTILL_FILE = "distill.json"
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
REPORT_MD = "report.md"
TEXT_FILE = "text.safetensors"
CHECKPOINT = "checkpoint"
SUMS_FILE = "sums.safetensors"
START_FILE = "start.safetensors"  # maps before distillation
MAPS_FILE = "maps.safetensors"
ACCEPTANCE_FILE = "acceptance-values.json"  # values to compare with
ACCEPTANCE_JSON = "acceptance.json"  # verdicts


def _no_run(path: Path) -> NblError:
    found = "is not a run directory: it has no nbl.json" if path.exists() else "does not exist"
    found = "is a file, and no run directory" if path.is_file() else found
    return NblError(f"{path} {found}; nbl-export --output makes a run directory")


class RunDirectory:
    """A run directory of which `opened` holds the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {}

    # -- opening ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, *, create: bool, force: bool = False) -> Iterator[RunDirectory]:
        """Lock the directory and read its manifest; `force` with `create` removes the run's files first.

        Raises:
            BusyError: another process holds the lock.
            NblError: the directory is not a run directory (or, with create, holds other files).
            CorruptError: the manifest cannot be read.
        """
        if create:
            refuse_foreign(self.path)
            make_folder(self.path)
        elif not (self.path / MANIFEST).is_file():
            raise _no_run(self.path)
        with locked(self.path):
            try:
                with friendly_os_errors(self.path):
                    self._sweep()
                    if create and force:
                        self._start_over()
                    self._read()
                    yield self
            finally:
                with contextlib.suppress(OSError):
                    self._sweep()  # an interrupt may come between making a scratch directory and using it
                    if "report" in self.manifest.get("stages", {}):  # whoever needs the weights converts them again
                        self._forget_checkpoint()

    @property
    def is_writable(self) -> bool:
        """Whether this user may write into the directory."""
        return os.access(self.path, os.W_OK)

    @contextlib.contextmanager
    def read(self) -> Iterator[RunDirectory]:
        """A run whose files are read: as `opened`, or without the lock in a directory that is only readable.

        Raises:
            BusyError, NblError, CorruptError: as `opened`.
        """
        if self.is_writable or not (self.path / MANIFEST).is_file():
            with self.opened(create=False):
                yield self
            return
        with friendly_os_errors(self.path):
            self._read()
            yield self

    @classmethod
    def peek(cls, path: Path) -> RunDirectory:
        """Read the manifest without the lock, also during a run. The manifest is empty if there is none.

        Raises:
            CorruptError: the manifest cannot be read.
        """
        run = cls(path)
        run._read()
        return run

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """As `peek`, for a directory that must hold a run.

        Raises:
            NblError: the directory holds no run. CorruptError: its manifest cannot be read.
        """
        run = cls.peek(path)
        if not run.manifest:
            raise _no_run(path)
        return run

    def _sweep(self) -> None:
        """Remove what a killed process left unfinished."""
        for leftover in filter(is_scratch, self.path.iterdir()):
            remove(leftover)

    def _start_over(self) -> None:
        """Remove what this tool writes, the manifest last.

        Raises:
            NblError: the manifest is not of this tool.
        """
        path = self.path / MANIFEST
        if path.name in os.listdir(self.path) and not self._is_ours():
            raise NblError(f"{path} is not of nbl-export, so --force removes nothing; choose another --output")
        self._forget_checkpoint()
        for name in _OURS:
            remove(self.path / name)

    def _is_ours(self) -> bool:
        """Whether the manifest is of this tool. A damaged one stands beside the text of its run."""
        try:
            found = read_json(self.path / MANIFEST)
            ours = "schema" in found and "stages" in found and "fingerprint" in found["model"]
        except (OSError, ValueError, TypeError, LookupError):
            ours = False
        return ours or (self.path / TEXT_FILE).is_file()

    def _forget_checkpoint(self) -> None:
        """Remove a converted checkpoint, and nothing else of that name."""
        if (self.path / CHECKPOINT / CONVERTED).is_file():
            remove(self.path / CHECKPOINT)

    def _read(self) -> None:
        path = self.path / MANIFEST
        if any((self.path / name).exists() for name in (GENAI_CONFIG, IR_FILE)):
            raise NblError(f"{self.path} is a model directory, not a run directory; name the directory it is in")
        if not path.exists():
            return
        check_folder(self.path)
        advice = "restore it, or start over with --force"
        try:
            manifest = read_json(path)
        except (ValueError, OSError) as error:
            raise CorruptError(f"{path} cannot be read ({error}); {advice}") from error
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if isinstance(schema, int) and schema != SCHEMA:
            raise CorruptError(
                f"{path} has schema {schema}, this version reads {SCHEMA}; "
                "use the version that wrote it, or start over with --force"
            )
        try:
            _check_manifest(manifest)
            # from checked options, since the command in a file may be a stranger's advice
            manifest["command"] = describe_command(JobOptions.from_json(manifest["options"]), self.path)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptError(f"{path} is not a manifest of nbl-export ({error}); {advice}") from error
        self.manifest = manifest

    # -- the manifest ----------------------------------------------------------------------------------

    @property
    def stages(self) -> dict[str, Any]:
        """Records of finished stages by name: key, seconds, files."""
        stages: dict[str, Any] = self.manifest.setdefault("stages", {})
        return stages

    @property
    def options(self) -> JobOptions:
        """The options that the manifest records."""
        return JobOptions.from_json(self.manifest["options"])

    @property
    def decoder(self) -> DecoderSpec:
        """Sizes of the decoder that the manifest records."""
        return DecoderSpec(**self.manifest["decoder"])

    @property
    def plan(self) -> Plan:
        """The plan that the manifest records."""
        return Plan.from_facts(self.manifest)

    def require(self, *stages: str) -> None:
        """Raise NblError unless these stages are finished."""
        if not self.stages.keys() >= {*stages}:
            raise NblError(f"{self.path} is not finished: run its command again ({self.manifest['command']})")

    def refuse_failed(self, *, force: bool) -> None:
        """Raise NblError if verification failed, unless `force`."""
        if self.manifest["status"] == "failed" and not force:
            raise NblError(f"{self.path} failed verification; see its verify.json, or use --force to go on anyway")

    def note(self, **facts: Any) -> None:
        """Merge facts into the manifest, to be written with the next `save`."""
        self.manifest = {"schema": SCHEMA, "status": "incomplete", "stages": {}, **self.manifest, **facts}

    def save(self, **facts: Any) -> None:
        """Merge facts into the manifest and write it."""
        self.note(**facts)
        write_json(self.path / MANIFEST, self.manifest)

    # -- stages ----------------------------------------------------------------------------------------

    def is_done(self, stage: str, key: str) -> bool:
        """Whether the stage finished from the same inputs, and all its files are present and unchanged.

        Raises:
            CorruptError: a file differs from what the stage wrote.
        """
        record = self.stages.get(stage)
        if not isinstance(record, dict) or record.get("key") != key:
            return False
        if any(not (self.path / name).is_file() for name in record["files"]):
            return False
        self.check(stage)
        return True

    def check(self, stage: str) -> None:
        """Compare the files of a finished stage with their recorded hashes.

        Raises:
            CorruptError: a file is missing or has another hash.
        """
        for name, expected in self.stages[stage]["files"].items():
            path = self.path / name
            if not path.is_file():
                raise CorruptError(f"{path} is missing; run the {stage} stage again (the same command does)")
            if file_sha256(path) != expected:
                raise CorruptError(
                    f"{path} is corrupted: its hash is not the one recorded by the {stage} stage; "
                    "delete it to have it made again, or start over with --force"
                )

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A directory on the same file system, removed afterwards in any case."""
        return scratch_in(self.path)

    def finish(self, stage: str, key: str, scratch: Path, seconds: float, readers: Sequence[str], **facts: Any) -> None:
        """Move everything in `scratch` into place and record the stage. Records of its readers are dropped.

        Settings lose the keys that name code, whichever exporter or copy wrote them.

        A failed verification stays on record until verification, or a stage that it reads, runs again.
        """
        drop_code(scratch)
        hashes = {
            str(path.relative_to(scratch)): file_sha256(path) for path in sorted(scratch.rglob("*")) if path.is_file()
        }
        for name in (stage, *readers):
            self.stages.pop(name, None)
        failed = self.manifest["status"] == "failed" and "verify" in self.stages
        if readers:
            self.note(status="failed" if failed else "incomplete")
        self.save()
        for entry in sorted(scratch.iterdir()):
            target = self.path / entry.name
            if target.is_dir():
                remove(target)
            os.replace(entry, target)
        self.stages[stage] = {"key": key, "seconds": round(seconds, 3), "files": hashes}
        self.save(**facts)

    def partial(self, stage: str) -> Path:
        """File with the state of a long stage, to resume after a kill; removed when the stage is finished."""
        return self.path / f"{stage}.partial.safetensors"

    def read_json(self, name: str) -> Any:
        """A JSON result of a finished stage, whose values have the kinds that the stage writes.

        Raises:
            CorruptError: the file is damaged, or somebody edited it.
        """
        path = self.path / name
        try:
            found = read_json(path)
            check_shape(found, _RESULTS[name])
        except (OSError, ValueError, TypeError) as error:
            raise CorruptError(
                f"{path} cannot be used ({error}); delete it to have it made again, or start over with --force"
            ) from error
        return found


_RESULTS = {VERIFY_FILE: shapes.VERIFICATION, BENCH_FILE: shapes.BENCHMARK, EVAL_FILE: shapes.EVALUATION}
_OURS = (
    TEXT_FILE, SUMS_FILE, "calibrate.partial.safetensors", START_FILE, MAPS_FILE,
    DISTILL_FILE, "distill.partial.safetensors", *DECODERS.values(), VERIFY_FILE,
    ACCEPTANCE_FILE, EVAL_FILE, "engine", BENCH_FILE, REPORT_HTML,
    REPORT_MD, REPORT_JSON, ACCEPTANCE_JSON, MANIFEST,
)  # fmt: skip


def refuse_foreign(path: Path) -> None:
    """Require that an existing directory is empty or a run directory, so that no user file is changed.

    Raises:
        NblError: the directory is neither.
    """
    try:
        entries = [p.name for p in path.iterdir() if not is_scratch(p)] if path.is_dir() else []
        is_file = path.is_file()
    except OSError as error:
        raise NblError(f"{path} cannot be looked into: {error.strerror}; choose another --output") from error
    if is_file:
        raise NblError(f"{path} is a file; choose another --output")
    if GENAI_CONFIG in entries or IR_FILE in entries:
        raise NblError(f"{path} is a model directory, not a run directory; choose another --output")
    strangers = [name for name in entries if name != ".lock"]
    if strangers and MANIFEST not in entries:
        raise NblError(
            f"{path} is not empty and not a run directory (it holds {sorted(strangers)[0]}); choose another --output"
        )


PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai",
             "mobius-onnx", "optimum", "safetensors", "numpy", "openvino", "openvino-tokenizers", "nncf", "tensorrt",
             "tensorrt-rtx")  # fmt: skip


def _check_manifest(manifest: Any) -> None:
    """Check all values that stages rely on.

    Raises:
        KeyError, TypeError, ValueError, AttributeError or OverflowError: a value is missing or of the wrong kind.
    """
    check_shape(manifest, shapes.MANIFEST)
    stages = manifest["stages"]
    layers = manifest["decoder"]["num_layers"]
    if any(Path(name).is_absolute() or ".." in Path(name).parts for s in stages.values() for name in s["files"]):
        raise ValueError("a stage names a file outside the run")
    options = JobOptions.from_json(manifest["options"])
    needed = [*["text"] * ("text" in stages), *["calibration"] * bool(stages.keys() - {"text"})]
    needed += ["quantized"] * (options.quantized_model is not None)
    needed += ["scores", "replaced_layers", "kinds", "tap", "select"] * ("plan" in stages)
    if missing := [name for name in needed if manifest.get(name) is None]:
        raise KeyError(missing[0])
    require(manifest.get("num_layers", layers) == layers, "'num_layers' is not the decoder's")
    if "plan" in stages:
        used = Plan.from_facts(manifest).mixers
        require(set(used) <= set(METHODS), f"'kinds' are of {', '.join(METHODS)}")
    curve = manifest.get("curve") or {"points": []}
    fits = all(len(point["increases"]) == len(curve["texts"]) for point in curve["points"])
    require(fits, "'curve' has not one increase for each text")
