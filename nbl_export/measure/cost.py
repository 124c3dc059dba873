"""Cost model of a decoder: arithmetic and bytes of prefill and decode, for any machine.

    prefill of T tokens   multiply-adds of every matrix and of causal attention   (mostly bound by arithmetic)
    one decode step       bytes of all weights and of the caches of T tokens      (mostly bound by memory)

The model counts what every implementation must do. Each weight and each cached key and value is read once a chunk; new
keys and values are written once. A token computes the experts that it takes, and a chunk reads those that its tokens
take together (`records.mlp`). Graphs of some sources compute every expert (`every_expert`). Norms, rotary embedding,
softmax, the embedded row and intermediate activations are left out; they are some percent of the whole. Planning uses
ratios of costs.

Tail pruning: above the last kept attention no token reads another token. If only the last token's logits are wanted,
everything after that attention runs on one token. In the original this is o_proj and MLP of the last layer. Graphs that
give only the last token's logits are pruned in this way, from every source (`graph.passes.tail`).

Speedup of SmolLM2 on two CPU cores (fp32, 8 layers replaced) over an original with only the head pruned:

    prefill 512, without tail pruning   measured 1.06            modelled 1.06
    prefill 512, with tail pruning      measured 1.30            modelled 1.31
    decode                              measured 1.12 to 1.15    modelled 1.04

The model underestimates the decode speedup of small models: an attention operator takes longer than its bytes suggest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nbl_export.methods.base import Mixer, TokenWork
from nbl_export.methods.rows import Need, Reads, Rows, rows_needed
from nbl_export.options.options import JobOptions
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.mlp import MlpSpec

__all__ = ["WEIGHT_BYTES", "CostModel", "LayerSizes", "Speedup", "Work", "cost_model", "map_sizes"]

# Bytes of a matrix element; quantised elements include a float32 scale for each block of 32.
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.125, "int4": 0.625}


@dataclass(frozen=True)
class LayerSizes:
    """What a layer with a mixer costs.

    Attributes:
        work: of one row of each of `reads`.
        attends: whether the layer's own attention stays, with its cache.
    """

    reads: Reads
    work: tuple[TokenWork, ...]
    attends: bool = False

    def is_full_prefill(self, tokens: int) -> bool:
        """Whether a step of so many tokens is the original's: all its rows continue above an exit layer
        (`methods.predicted_kv.maps`)."""
        return self.attends and self.reads[0].rows is Rows.LAST and tokens <= self.reads[0].tokens + 1


def map_sizes(maps: Mapping[int, Mixer]) -> dict[int, LayerSizes]:
    """What each layer with a mixer costs."""
    return {i: LayerSizes(mixer.reads, mixer.work(), mixer.holds_cache) for i, mixer in maps.items()}


@dataclass(frozen=True)
class Speedup:
    """The original's cost over that of the NBL decoder."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Work:
    """Number of additions and multiplications, and bytes of weights and caches read or written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class CostModel:
    """Costs of one decoder at one setting.

    Attributes:
        weight_bytes, head_bytes: bytes of an element of a layer's matrix, and of the lm_head's.
        tokens: length of the prefill, and the depth at which a token is decoded.
        all_logits: the graphs compute the logits of every prompt token.
        tail_pruned: both graphs have pruned tails, and give the logits of the last token only.
        every_expert: the graphs compute every expert for every token.
    """

    spec: DecoderSpec
    mlp: MlpSpec
    weight_bytes: float
    head_bytes: float
    cache_itemsize: int
    tokens: int = 512
    all_logits: bool = False
    tail_pruned: bool = True
    every_expert: bool = False

    def speedup(self, maps: Mapping[int, Mixer]) -> Speedup:
        """Modelled speedup of replacing the attention of some layers; 1 means none."""
        return self.speedup_of_sizes(map_sizes(maps))

    def speedup_of_sizes(self, sizes: Mapping[int, LayerSizes]) -> Speedup:
        """As `speedup`, from `map_sizes`."""
        return Speedup(
            self.prefill_flops({}) / self.prefill_flops(sizes),
            self.decode({}, self.tokens - 1).bytes / self.decode(sizes, self.tokens - 1).bytes,
        )

    def prefill_flops(self, sizes: Mapping[int, LayerSizes]) -> float:
        """Additions and multiplications of a prefill of `self.tokens` tokens."""
        return self.prefill(sizes, self.tokens).flops

    def prefill_saved(self, sizes: Mapping[int, LayerSizes]) -> float:
        """Share of `prefill_flops` that these replaced layers save."""
        return 1 - self.prefill_flops(sizes) / self.prefill_flops({})

    def prefill(self, sizes: Mapping[int, LayerSizes], tokens: int, depth: int = 0) -> Work:
        """Work of a chunk of tokens after `depth` cached tokens; no sizes: the original."""
        sizes = {layer: own for layer, own in sizes.items() if not own.is_full_prefill(tokens)}
        return Work(self._flops(sizes, tokens, depth), self._bytes(sizes, tokens, depth))

    def decode(self, sizes: Mapping[int, LayerSizes], depth: int) -> Work:
        """Work of one token after `depth` cached tokens: a chunk of one token."""
        return self.prefill(sizes, 1, depth)

    def _flops(self, sizes: Mapping[int, LayerSizes], tokens: int, depth: int) -> float:
        needs = self._needs(sizes)
        total = 2.0 * (tokens if self.all_logits and not self.tail_pruned else 1) * self._head
        for layer in range(self.spec.num_layers):
            leaving = needs[layer + 1]
            own = sizes.get(layer)
            rows = leaving.count(tokens)
            total += 2.0 * rows * self.mlp.multiply_adds(self.spec.hidden_size, every=self.every_expert)
            if own is not None:
                read = [leaving.read_by(read).count(tokens) for read in own.reads]
                total += sum(2.0 * count * work.multiply_adds for count, work in zip(read, own.work, strict=True))
            if own is None or own.attends:
                queries = tokens if own is None else read[0]
                total += self._attention_flops(layer, tokens, depth, queries) + 2.0 * rows * self._o_proj
        return total

    def _bytes(self, sizes: Mapping[int, LayerSizes], tokens: int, depth: int) -> float:
        rows = [need.count(tokens) for need in self._needs(sizes)]
        layers = range(self.spec.num_layers)
        elements = sum(
            self._elements(sizes.get(i)) + self.mlp.read(self.spec.hidden_size, rows[i + 1], every=self.every_expert)
            for i in layers
        )
        caches = (i for i in layers if i not in sizes or sizes[i].attends)
        positions = sum(min(depth + tokens, (self.spec.window_of(i) or depth + tokens) + tokens - 1) for i in caches)
        cache = self.spec.cache_bytes_per_token(1, self.cache_itemsize) * positions
        return elements * self.weight_bytes + self._head * self.head_bytes + cache

    def _needs(self, sizes: Mapping[int, LayerSizes]) -> tuple[Need, ...]:
        """Rows of each stream that the graph computes."""
        if not self.tail_pruned:
            return (Need(None),) * (self.spec.num_layers + 1)
        return rows_needed({layer: size.reads for layer, size in sizes.items()}, self.spec.num_layers)

    def _elements(self, own: LayerSizes | None) -> int:
        mixer = 0 if own is None else sum(work.elements for work in own.work)
        return mixer + (self.spec.projections if own is None or own.attends else 0)

    def _attention_flops(self, layer: int, tokens: int, depth: int, queries: int) -> float:
        """Flops of q, k and v of the last tokens, and of their attention, without o_proj."""
        pairs = sum(self._visible(layer, depth + position) for position in range(tokens - queries + 1, tokens + 1))
        projected = 2.0 * queries * (self.spec.projections - self._o_proj)
        return projected + 4.0 * self.spec.num_heads * self.spec.head_dim * pairs

    def _visible(self, layer: int, position: int) -> int:
        """Tokens that the token at a position (from 1) attends to in a layer."""
        return min(position, self.spec.window_of(layer) or position)

    @property
    def _o_proj(self) -> int:
        return self.spec.hidden_size * self.spec.num_heads * self.spec.head_dim

    @property
    def _head(self) -> int:
        return self.spec.hidden_size * self.spec.vocab_size


def cost_model(options: JobOptions, engine: Capabilities, decoder: DecoderSpec, mlp: MlpSpec) -> CostModel:
    """The cost model of a job's shipped graphs."""
    size = WEIGHT_BYTES[options.precision]
    return CostModel(
        decoder,
        mlp,
        size,
        2.0 if engine.static and options.precision == "int4" else size,  # the static form keeps its head in fp16
        engine.cache_itemsize(options.precision),
        options.prompt_length,
        all_logits=options.kept_logits == "all",
        tail_pruned=options.kept_logits == "last",
        every_expert=options.decoder_source in engine.every_expert,
    )
