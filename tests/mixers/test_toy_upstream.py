"""A kind that gives keys and values of the whole stream of an earlier layer, added by this one file.

stream s --- norm --- keys', values' + b ---+
layer's own input --- norm --- queries -----+--- the layer's own attention, cache and output

moments of (stream s, keys and values) ─ fit ─ maps file ─┬─ torch model
                                                          ├─ NumPy
                                                          └─ ONNX: prefill, cached steps, a padded batch, last token
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nbl_export import mixers
from nbl_export.calibrate import collect
from nbl_export.errors import NblError, RefusalError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.measure.cost import map_sizes
from nbl_export.mixers import lmmse
from nbl_export.mixers.base import CACHE, OWN, Builder, Kind, Mixer, Port, Streams, TokenWork, Value, apply
from nbl_export.mixers.lmmse import Moments
from nbl_export.mixers.modules import MixerModule
from nbl_export.mixers.rows import Need, Read, Reads, Rows, rows_needed
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.plan.maps_file import load_maps, save_maps
from nbl_export.rewrite import rewrite
from nbl_export.targets import exporter_of
from tests.tiny import EPSILON, HEAD_DIM, HIDDEN, LAYERS, VOCAB

from .test_toy_kind import CLOSE, padded, torch_logits, worst_of_batch

KEYS = 2 * HEAD_DIM  # two key heads


@dataclass(frozen=True)
class Upstream:
    """Products [2 K, D] and bias [2 K] of keys, then values, of the normed stream."""

    products: np.ndarray
    bias: np.ndarray
    stream: int
    kind = "upstream"
    gives = (Port.KEYS, Port.VALUES)
    holds = CACHE

    @property
    def reads(self) -> Reads:
        return (Read(), Read(self.stream, Rows.ALL))

    @property
    def size(self) -> int:
        return self.products.shape[1]

    def tensors(self) -> dict[str, np.ndarray]:
        return {"products": self.products, "bias": self.bias, "stream": np.array([self.stream], np.float32)}

    def product(self) -> None:
        return None

    def as_product(self, moments: Moments, layer: int) -> None:
        return None

    def emit(self, build: Builder, streams: Streams) -> dict[Port, Value]:
        x = build.norm(streams[self.stream], np.ones(self.size, np.float32), EPSILON, "norm")
        biases = np.split(self.bias, 2)
        made = (
            build.add(build.matmul(x, matrix, name), bias, f"{name}_bias")
            for name, matrix, bias in zip(("keys", "values"), np.split(self.products, 2), biases, strict=True)
        )
        return dict(zip(self.gives, made, strict=True))

    def module(self, multiplier: float = 1.0) -> UpstreamModule:
        made = UpstreamModule(self.stream, *self.products.shape)
        made.linear.load_state_dict({"weight": torch.from_numpy(self.products), "bias": torch.from_numpy(self.bias)})
        return made

    def work(self) -> tuple[TokenWork, ...]:
        return TokenWork(0, 0), TokenWork(self.products.size, self.products.size)


def normed(x_BTD: torch.Tensor) -> torch.Tensor:
    return x_BTD * (x_BTD.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


class UpstreamModule(MixerModule):
    gives = (Port.KEYS, Port.VALUES)

    def __init__(self, stream: int, outputs: int, inputs: int) -> None:
        super().__init__()
        self.reads = (stream,)
        self.linear = nn.Linear(inputs, outputs)

    def port(self, port: Port) -> torch.Tensor:
        keys, values = self.linear(normed(self.streams[self.reads[0]])).chunk(2, -1)
        found: torch.Tensor = keys if port is Port.KEYS else values
        return found


class _Upstream(Kind):
    """Fitted on the stream below a layer's own."""

    name = "upstream"
    target = (Port.KEYS, Port.VALUES)

    def source(self, layer: int) -> int:
        return max(0, layer - 1)

    def features(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return normed(x_BTD)

    def fit(self, moments: Moments, layer: int, bias: bool = True) -> Upstream:
        return Upstream(*lmmse.fit(moments, layer, bias=bias), self.source(layer))

    def blank(self, size: int, multiplier: float = 1.0, like: Mixer | None = None) -> UpstreamModule:
        return UpstreamModule(0, 2 * KEYS, size)

    def from_tensors(self, tensors: Mapping[str, np.ndarray]) -> Upstream:
        return Upstream(tensors["products"], tensors["bias"], int(tensors["stream"][0]))


UPSTREAM = _Upstream()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind is registered for one test."""
    monkeypatch.setattr(mixers, "_KINDS", dict(mixers._KINDS))
    mixers.register(UPSTREAM)


def upstream(layer: int, stream: int) -> Upstream:
    """Random numbers, so that a key of another token or layer shows."""
    rng = np.random.default_rng(layer)
    return Upstream(
        rng.normal(0, 0.2, (2 * KEYS, HIDDEN)).astype(np.float32),
        rng.normal(0, 0.1, 2 * KEYS).astype(np.float32),
        stream,
    )


CHOSEN: dict[str, dict[int, Mixer]] = {
    "top": {2: upstream(2, 1)},
    "two of one stream": {1: upstream(1, 1), 2: upstream(2, 1)},
    "of the first stream": {1: upstream(1, 0), 2: upstream(2, 0)},
}


def moments_of(directory: Path) -> dict[int, Moments]:
    text = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (32, 64)))
    return collect.collect(load_model(directory), text, lambda *_: None, kind=UPSTREAM)["residual"]


def test_keys_of_a_layers_own_stream_are_recovered(checkpoint: Any) -> None:
    """Layer 0's stream is its own, so keys and values follow from it exactly: the fit gives the original's logits."""
    found = UPSTREAM.fit(moments_of(checkpoint("llama"))[0], 0)
    right, got = torch_logits(checkpoint("llama"), {}), torch_logits(checkpoint("llama"), {0: found})
    assert max(np.abs(a - b).max() for a, b in zip(right, got, strict=True)) < 2e-3


def test_a_fit_is_nearer_than_the_mean(checkpoint: Any) -> None:
    moments = moments_of(checkpoint("llama"))[2]
    fitted = UPSTREAM.fit(moments, 2)
    mean_x, mean_y, cxx, cyx, cyy = moments.centred()
    weight = torch.from_numpy(fitted.products).double()
    left = cyy.trace() - 2 * (weight * cyx).sum() + ((weight @ cxx) * weight).sum()
    assert fitted.stream == 1 and left < 0.9 * cyy.trace()
    assert torch.allclose(torch.from_numpy(fitted.bias).double(), mean_y - weight @ mean_x, atol=1e-4)


@pytest.mark.parametrize("source", ["genai", "mobius"])
@pytest.mark.parametrize("case", CHOSEN)
def test_the_graph_computes_what_torch_computes(
    checkpoint: Any, exported: Any, tmp_path: Path, case: str, source: str
) -> None:
    """A padded batch, cached steps, and the graph that computes one token at its end; every layer keeps its cache."""
    chosen = CHOSEN[case]
    exporter_of(source).linearize(exported("llama", source), tmp_path / "nbl", chosen)
    right = torch_logits(checkpoint("llama"), chosen)
    decoder = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    assert decoder.contract.cache_layers == tuple(range(LAYERS))
    assert worst_of_batch(decoder, right) < CLOSE
    exporter_of(source).keep_last_token(tmp_path / "nbl")
    last = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    last.begin(2)
    found = last.step(*padded())
    assert found.shape[1] == 1
    valid = padded()[1].sum(1)
    assert max(np.abs(found[k, 0] - right[k][n - 1]).max() for k, n in enumerate(valid)) < CLOSE


def test_another_stream_is_seen(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    """Planted: the graph reads the layer's own stream."""
    rewrite(exported("llama"), tmp_path / "nbl", {2: upstream(2, 2)})
    right = torch_logits(checkpoint("llama"), CHOSEN["top"])
    assert worst_of_batch(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), right) > 100 * CLOSE


def test_beside_a_layer_that_is_replaced(checkpoint: Any, exported: Any, random_maps: Any, tmp_path: Path) -> None:
    """The stream that enters a linear layer, and one that a linear layer made."""
    chosen: dict[int, Mixer] = {**random_maps(1), 2: upstream(2, 1)}
    rewrite(exported("llama"), tmp_path / "nbl", chosen)
    decoder = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    assert decoder.contract.cache_layers == (0, 2)
    assert worst_of_batch(decoder, torch_logits(checkpoint("llama"), chosen)) < CLOSE


def test_numpy_and_torch_agree_and_a_file_keeps_the_kind(tmp_path: Path) -> None:
    mixer = upstream(2, 1)
    save_maps({2: mixer}, tmp_path / "maps.safetensors")
    again = load_maps(tmp_path / "maps.safetensors", (2,))[2]
    x_BTD = np.random.default_rng(1).normal(size=(2, 5, HIDDEN)).astype(np.float32)
    module = again.module()
    module.streams[1] = torch.from_numpy(x_BTD)
    given, state = apply(mixer, {OWN: 0 * x_BTD, 1: x_BTD})
    assert state is None and set(given) == {Port.KEYS, Port.VALUES}
    for port, value in given.items():
        np.testing.assert_allclose(module.port(port).detach().numpy(), value, atol=1e-5)


def test_a_prompt_climbs_to_its_stream_alone() -> None:
    reads = {i: mixer.reads for i, mixer in CHOSEN["of the first stream"].items()}
    assert rows_needed(reads, LAYERS) == (Need(None), Need(1), Need(1), Need(1))
    assert all(size.attends for size in map_sizes(CHOSEN["top"]).values())


def test_attention_that_takes_no_keys_is_refused(checkpoint: Any, exported: Any, tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="no packed input"):
        rewrite(exported("qwen3", "mobius"), tmp_path / "nbl", CHOSEN["top"])
    with pytest.raises(NblError, match="in another way than two products"):
        linearize(load_model(checkpoint("qwen3")), CHOSEN["top"])
    wanted = collect.Wanted(("residual",), UPSTREAM)
    some = collect.collect_layers(checkpoint("llama"), torch.zeros(1, 8), (), wanted, tmp_path, lambda *_: None)
    with pytest.raises(NblError, match="whole model has to fit"):
        next(iter(some))
