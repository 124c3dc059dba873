"""The target `toy`: the guide "Add a target" of docs/architecture.md, followed literally.

    original/, model/    config.json, model.safetensors, tokenizer files, and toy.json, which marks the folder

Its engine keeps token ids and no caches: each step runs the whole text again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from nbl_export.errors import CorruptError
from nbl_export.graph.names import constant_name, product_name
from nbl_export.methods.applied import linearize
from nbl_export.methods.base import Maps, Mixer
from nbl_export.methods.checkpoint.hf_classes import save_linearized
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import GraphContract, TensorInfo
from nbl_export.records.results import CheckResult
from nbl_export.targets.base import Availability, DecoderFacts, Engine, ExportSettings
from nbl_export.targets.checks import ExpectedGraph, StoredWeights, checked, judge_maps
from nbl_export.targets.export.finish import add_text_files
from nbl_export.targets.runners import StepDecoder
from nbl_export.targets.tokenizer import TextGenerationMixin

__all__ = ["MARKER", "TOY"]

MARKER = "toy.json"  # {"replaced": [layers]}
_WEIGHTS = "model.safetensors"
_PARTS = ("weight", "bias")


class ToyEngine(Engine):
    """torch on the CPU, in float32."""

    capabilities = Capabilities("toy", "Toy", ("fp32",), {"toy": ("fp32",)}, cache_bytes={"fp32": 0})

    def probe(self, *, run: bool = False) -> Availability:
        """A product with a known result."""
        found = torch.tensor([[1.0, 2.0]]) @ torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        return Availability(found.tolist() == [[7.0, 10.0]], f"torch {torch.__version__}")

    def owns(self, path: Path) -> bool:
        """Whether the folder has the marker."""
        return (path / MARKER).is_file()

    def facts(self, path: Path) -> DecoderFacts:
        """Sizes from config.json and the weights."""
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            sizes = [int(config[name]) for name in ("vocab_size", "max_position_embeddings", "head_dim")]
        except (OSError, ValueError, KeyError) as error:
            raise CorruptError(f"{path} does not state its sizes ({error}); export it again") from error
        return DecoderFacts(sizes[0], sizes[1], sizes[2], 0)

    def export(self, checkpoint: Path, out: Path, settings: ExportSettings) -> None:
        """The torch model as it is."""
        load_model(checkpoint).save_pretrained(out)
        add_text_files(checkpoint, out)
        _mark(out, ())

    def linearize(self, original: Path, out: Path, maps: Mapping[int, Mixer], tap: str = "residual") -> None:
        """Export again: the torch model with its maps. `original` gives the tokenizer."""
        save_linearized(load_model(original), original, maps, tap, out)
        add_text_files(original, out)
        _mark(out, tuple(sorted(maps)))

    def keep_last_token(self, directory: Path) -> None:
        """The engine decides at each step which logits it computes."""

    def pruned_file(self, directory: Path) -> str | None:
        """There is one graph."""
        return None

    def check(
        self, directory: Path, contract: GraphContract, wanted: ExpectedGraph, original: Path | None
    ) -> list[CheckResult]:
        """The marker, the maps, and weights that are not a map's."""
        stated = json.loads((directory / MARKER).read_text(encoding="utf-8"))["replaced"]
        results = [
            checked(wanted.subject, "contract", stated == sorted(wanted.maps), f"layers {stated}"),
            judge_maps(wanted.subject, self.read_maps(directory), wanted.maps),
        ]
        if original is not None:
            ours, theirs = (load_file(d / _WEIGHTS) for d in (directory, original))
            kept = {name: w for name, w in ours.items() if ".self_attn.linear." not in name}
            changed = [name for name, w in kept.items() if name not in theirs or not np.array_equal(w, theirs[name])]
            detail = f"{changed[0]} differs" if changed else f"{len(kept)} weights carried over"
            results.append(checked("nbl", "weights untouched", not changed, detail))
        return results

    def read_maps(self, directory: Path) -> StoredWeights:
        """Matrices and biases by the layers of the marker."""
        stated = json.loads((directory / MARKER).read_text(encoding="utf-8"))["replaced"]
        weights = {i: load_file(directory / _WEIGHTS) for i in stated}
        linear = {i: {n: w[f"model.layers.{i}.self_attn.linear.{n}"] for n in _PARTS} for i, w in weights.items()}
        products = {product_name(i, "weight"): own["weight"] for i, own in linear.items()}
        return StoredWeights(
            products, {constant_name(i, "bias"): own["bias"] for i, own in linear.items()},
            lambda product: (products[product], 0.0),
        )  # fmt: skip

    def open_reference(self, directory: Path, head_dim: int, mixers: Maps, tap: str, *, exact: bool) -> StepDecoder:
        """The original model, with the mixers' own modules."""
        decoder = ToyDecoder(directory)
        linearize(decoder.model, mixers, tap)
        return decoder

    def open_graph(
        self, directory: Path, head_dim: int, file: str | None = None, threads: int | None = None, *,
        exact: bool = False,
    ) -> ToyDecoder:  # fmt: skip
        """The model, with the logits of all positions."""
        return ToyDecoder(directory)

    def open_runner(self, path: Path, threads: int | None = None) -> ToyRunner:
        """The model, one sequence."""
        return ToyRunner(path, self.facts(path).context_length)


TOY = ToyEngine()


def _mark(out: Path, replaced: Sequence[int]) -> None:
    (out / MARKER).write_text(json.dumps({"replaced": sorted(replaced)}), encoding="utf-8")


class ToyDecoder:
    """A batch of rows of token ids; see `GraphDecoder`."""

    cache_bytes = 0

    def __init__(self, directory: Path) -> None:
        self.model = load_model(directory)
        vocab = int(self.model.config.vocab_size)
        self.contract = GraphContract((), (TensorInfo("logits", "float32", ("batch", "tokens", vocab)),), ())
        self.begin(1)

    def begin(self, batch: int) -> None:
        """Start a batch of empty rows."""
        self.rows: list[list[int]] = [[] for _ in range(batch)]

    @property
    def cache_length(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.rows))

    @torch.no_grad()
    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns logits [B, T, V], with zeros at padding."""
        valid = np.ones_like(ids_BT) if valid_BT is None else valid_BT
        found = np.zeros((*ids_BT.shape, self.contract.outputs[0].shape[2]), np.float32)
        for b, row in enumerate(self.rows):
            count = int(valid[b].sum())
            row += ids_BT[b, :count].tolist()
            logits = self.model(torch.tensor([row]), use_cache=False).logits[0]
            found[b, :count] = logits[len(row) - count :].numpy()
        return found

    def mark(self) -> list[list[int]]:
        """The rows."""
        return [list(row) for row in self.rows]

    def rewind(self, mark: list[list[int]]) -> None:
        """Go back to the rows."""
        self.rows = [list(row) for row in mark]


class ToyRunner(TextGenerationMixin):
    """One text; see `TextRunner`."""

    def __init__(self, directory: Path, context_length: int) -> None:
        self.directory, self.context_length = directory, context_length
        self.decoder = ToyDecoder(directory)

    def __enter__(self) -> ToyRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def begin(self, max_tokens: int) -> None:
        """Forget the text; nothing is reserved."""
        self.decoder.begin(1)

    def append(self, ids: Sequence[int]) -> None:
        """Append one chunk."""
        self._logits = self.decoder.step(np.asarray(ids, np.int64)[None])

    def rewind(self, length: int) -> None:
        """Drop the tokens behind the first `length`."""
        self.decoder.rewind([row[:length] for row in self.decoder.rows])

    def pick(self) -> int:
        """The most likely next token."""
        return int(self._logits[0, -1].argmax())
