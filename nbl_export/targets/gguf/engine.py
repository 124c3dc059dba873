"""llama.cpp as an engine that runs GGUF files. It makes no decoders of a job; `convert` writes its files."""

from __future__ import annotations

from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.records.capabilities import Capabilities
from nbl_export.targets.base import Availability, DecoderFacts, Target, default_threads
from nbl_export.targets.gguf.facts import read_gguf_facts
from nbl_export.targets.gguf.node import Server
from nbl_export.targets.gguf.runner import LlamaCppRunner
from nbl_export.targets.runners import SequenceLimits

__all__ = ["LLAMA_CPP", "LlamaCppEngine"]


class LlamaCppEngine(Target):
    """llama.cpp's CPU back end in node-llama-cpp."""

    capabilities = Capabilities(
        name="llama.cpp", title="llama.cpp", precisions=("keep",), sources={}, extra="", reads="gguf",
        cache_bytes={"keep": 2},
    )  # fmt: skip

    def probe(self) -> Availability:
        """Whether the library loads."""
        try:
            server = Server(None, 1)
        except NblError as error:
            return Availability(False, str(error))
        server.close()
        return Availability(True, ", ".join(f"{name} {version}" for name, version in server.versions.items()))

    def owns(self, path: Path) -> bool:
        """Whether the path is a GGUF file."""
        return path.suffix == ".gguf" and path.is_file()

    def facts(self, path: Path) -> DecoderFacts:
        """Sizes from the file's keys."""
        found = read_gguf_facts(path)
        return DecoderFacts(
            found.vocab_size, found.context_length, found.head_dim, found.cache_bytes_per_token, found.parameters
        )

    def arithmetic(self, path: Path) -> str:
        """The types that llama.cpp computes in."""
        return "the file's codes times 8-bit activations, with keys and values in float16"

    def open_runner(
        self, path: Path, threads: int | None = None, limits: SequenceLimits | None = None
    ) -> LlamaCppRunner:
        """A text runner on a GGUF file; `room` has no effect."""
        return LlamaCppRunner(path, threads or default_threads())


LLAMA_CPP = LlamaCppEngine()
