"""llama.cpp as an engine that runs GGUF files. It makes no decoders of a job; `convert` writes its files."""

from __future__ import annotations

from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.targets.base import Availability, Capabilities, Room
from nbl_export.targets.gguf.node import Server
from nbl_export.targets.gguf.runner import LlamaCppRunner
from nbl_export.targets.onnx.genai import default_threads

__all__ = ["LLAMA_CPP", "LlamaCppEngine"]


class LlamaCppEngine:
    """llama.cpp's CPU back end in node-llama-cpp."""

    capabilities = Capabilities(
        name="llama.cpp", title="llama.cpp", precisions=("keep",), sources=(), extra="", graphs="gguf",
        cache_bytes={"keep": 2},
    )  # fmt: skip
    compiler = None

    def probe(self) -> Availability:
        """Whether the library loads."""
        try:
            server = Server(None, 1)
        except NblError as error:
            return Availability(False, str(error))
        server.close()
        return Availability(True, ", ".join(f"{name} {version}" for name, version in server.versions.items()))

    def probe_run(self) -> Availability:
        """See `probe`."""
        return self.probe()

    def default_threads(self) -> int:
        """Number of physical cores this process may use, at least 1."""
        return default_threads()

    def arithmetic(self, path: Path) -> str:
        """The types that llama.cpp computes in."""
        return "the file's codes times 8-bit activations, with keys and values in float16"

    def open_runner(self, path: Path, threads: int | None = None, room: Room | None = None) -> LlamaCppRunner:
        """A text runner on a GGUF file; `room` has no effect."""
        return LlamaCppRunner(path, threads or default_threads())


LLAMA_CPP = LlamaCppEngine()
