"""The model, calibration windows, moments and texts of judgement that `quality.py` and `tasks.py` share."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CONTEXT", "HELD", "TOKENS", "Bed", "log"]

TOKENS, CONTEXT, HELD = 65_536, 512, 8192  # the defaults of nbl-export


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Bed:
    """Model, calibration windows, moments and the texts of the figures."""

    def __init__(
        self,
        model_name: str,
        data: Path,
        text: str,
        windows: int,
        train_tokens: int = TOKENS,
        taps: Sequence[str] = ("residual",),
        bf16_judge: bool = False,
    ) -> None:
        from nbl_export.methods.checkpoint import load
        from nbl_export.methods.checkpoint import source as checkpoint_source
        from nbl_export.methods.linear import collect
        from nbl_export.model import memory
        from nbl_export.text import corpus
        from nbl_export.text import windows as text_windows

        memory.keep_freed_memory()
        with tempfile.TemporaryDirectory() as scratch:
            found = checkpoint_source.resolve(model_name)
            self.spec = load.read_spec(found)
            directory = load.materialise(found, Path(scratch) / "checkpoint")
            self.model, self.tokenizer = load.load_model(directory), load.load_tokenizer(directory)
        c4 = corpus.read_text(str(data / "c4" / "c4_demo.json"))
        source = corpus.installed_text() if text == "default" else c4
        ids = text_windows.token_ids(source, self.tokenizer, max(TOKENS, train_tokens) + HELD)
        self.windows, self.held = text_windows.pack_ids(source, ids, TOKENS, CONTEXT, HELD)
        self.training = text_windows.extend(self.windows, ids, train_tokens, HELD)
        self.text = {"name": source.name, "sha256": source.sha256}
        self.texts = {
            "c4 rest": self._spread(self._ids(c4.documents)[TOKENS + HELD :], windows),
            "wikitext-2 valid": self._spread(
                self._ids([(data / "wikitext-2-raw" / "wiki.valid.raw").read_text(encoding="utf-8")]), windows
            ),
            "realnews": self._spread(self._ids(news(data)), windows),
        }
        documentation = corpus.stdlib_text()
        rows, _ = text_windows.pack(documentation, self.tokenizer, 32_768, CONTEXT)
        # The second half judges layers, as in nbl-export; figures use the first.
        self.documentation = rows[len(rows) // 2 :]
        self.texts[documentation.name] = self._spread(rows[: len(rows) // 2].flatten(), windows)
        self.texts["code"] = self._spread(self._ids(standard_library()), windows)
        self.bf16_judge = bf16_judge
        started = time.monotonic()
        quiet: Any = lambda _d, _t: None  # noqa: E731
        self.moments = collect.collect(self.model, self.windows, quiet, taps, bf16=bf16_judge) if taps else {}
        log(f"moments: {time.monotonic() - started:.0f} s")

    def _ids(self, documents: Any) -> Any:
        import torch

        return torch.tensor([i for d in documents for i in self.tokenizer(d, verbose=False)["input_ids"]])

    @staticmethod
    def _spread(ids: Any, count: int) -> Any:
        import torch

        rows = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]

    @property
    def early_stopping(self) -> list[Any]:
        """The windows by which nbl-export judges layers, of each text."""
        from nbl_export.text.windows import selection_texts

        selection = self.held[len(self.held) // 2 :]
        texts = [("calibration", selection), ("documentation", self.documentation)]
        return [windows for _, windows in selection_texts(texts, self.spec.max_positions)]

    def maps(self, tap: str, layers: Any) -> dict[int, Any]:
        from nbl_export.methods.linear.maps import Linear
        from nbl_export.methods.lmmse import fit

        return {i: Linear(*fit(self.moments[tap][i], i)) for i in layers}

    def quality_losses(
        self, maps: Mapping[int, Any], tap: str, replaced_sets: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Name of a mix -> text -> KL, the mix's perplexity and the original's perplexity."""
        from nbl_export.methods.losses import PartialReplacement

        switched = PartialReplacement(self.model, maps, tap, bf16_matmul=self.bf16_judge)
        found: dict[str, dict[str, Any]] = {name: {} for name in replaced_sets}
        for text, rows in self.texts.items():
            losses = switched.quality_losses(rows, replaced_sets)
            for name, loss in losses.items():
                original, nbl = loss.perplexities
                found[name][text] = {"kl": loss.kl, "original": original, "nbl": nbl, "increase": nbl - original}
        for name, row in found.items():
            log(f"{name}: " + ", ".join(f"{t} {v['original']:.1f} -> {v['nbl']:.1f}" for t, v in row.items()))
        return found


def news(data: Path) -> list[str]:
    lines = (data / "c4" / "graphmark_c4_realnewslike_500.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["prompt"] + row["natural_text"] for row in map(json.loads, lines)]


def standard_library() -> list[str]:
    """Source code of Python's standard library, which no default text contains."""
    import sysconfig

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in files]
