"""A checkpoint in the form that a peer reads, made once and kept under CACHE/models."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from environments import binary
from gguf_types import requantize

__all__ = ["converted_gguf", "digest_of", "openvino", "optimum_onnx"]

# As strong as its documentation offers without data; the group divides the widths of SmolLM2 (576, 1536)
_OPENVINO = {
    "fp32": ["--weight-format", "fp32"],
    "fp16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--sym", "--ratio", "1.0", "--group-size", "64"],
}


def digest_of(path: Path) -> str:
    """Short fingerprint of a file, or of all weights and settings of a checkpoint directory."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:12]


def converted_gguf(source: Path, weight_type: str, models: Path) -> Path:
    """The GGUF file with its matrices in another type."""
    return _once(models / f"{weight_type}.gguf", lambda out: requantize(source, out, weight_type))


def openvino(cache: Path, checkpoint: Path, precision: str, models: Path) -> Path:
    """optimum-intel's export, weights compressed by nncf."""

    def make(out: Path) -> None:
        command = [str(binary(cache, "openvino", "optimum-cli")), "export", "openvino", "--model", str(checkpoint)]
        _run([*command, "--task", "text-generation-with-past", *_OPENVINO[precision], str(out)])

    return _once(models / f"openvino-{precision}", make)


def optimum_onnx(cache: Path, checkpoint: Path, models: Path) -> Path:
    """optimum-onnx's export in float32."""

    def make(out: Path) -> None:
        plain = out.with_name(f"{out.name}-checkpoint")
        _for_transformers_4(checkpoint, plain)
        command = [str(binary(cache, "optimum-onnx", "optimum-cli")), "export", "onnx", "--model", str(plain)]
        _run([*command, "--task", "text-generation-with-past", str(out)])
        shutil.rmtree(plain)

    return _once(models / "optimum-onnx-fp32", make)


def _for_transformers_4(checkpoint: Path, out: Path) -> None:
    """A checkpoint that transformers 5 wrote, in the words of 4: without this it would take a rotary base of 10,000."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (out / file.name).symlink_to(file.resolve())
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"  # 4 does not know the class that 5 writes
    for name, value in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        (out / name).unlink()
        (out / name).write_text(json.dumps(value, indent=1), encoding="utf-8")


def _once(out: Path, make: Callable[[Path], None]) -> Path:
    """`out`, made under another name first, so that what is there is complete."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = out.with_name(f".part-{out.name}")
        shutil.rmtree(scratch, ignore_errors=True)
        make(scratch)
        scratch.rename(out)
    return out


def _run(command: Sequence[str]) -> None:
    """Run a converter.

    Raises:
        RuntimeError: it failed; the message is the end of what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[1]} {command[2]} failed: {' '.join(done.stderr.split())[-400:]}")
