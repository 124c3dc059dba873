"""Layers above an exit layer in vLLM: few rows of a step continue, and the keys of all other prompt tokens are
predicted.

    step of the scheduler    tokens 0-511 of a prompt of 900 | tokens 512-899 | a generated token | W = 128
    rows that continue       0                           | 772-899        | the token
    rows with predicted KV   1-511                       | 512-771        | -

The prompt's whole length says which rows continue, so chunks and batches change nothing. vLLM hands lengths of
prompts to the builders of attention's metadata if a model has a window beside its prompt (R-SWA, `rswa_window`):
`plugin` states a window of all positions, which hides nothing.

    layers 0 .. c-1    vLLM's own, all rows
    layer c            stream --- norm --- [x_t, x_(t-1)]
    layers c .. L-1    B' + b --- rotary --- cache of the skipped rows;  vLLM's own forward of the rows that continue

Attention of layers from c up has a builder of its own (`_builder`), which leaves the rows that continue: the first
token of a prompt and its last tokens are two sequences of one block table there. The token before a chunk's first
row was in an earlier step, or came from the prefix cache. `ExitLayer` holds the normed stream of the last row that was
written to each block: a block that is not full has one owner, and a full block ends with the row that is asked for.

Skipped rows leave the last layer as NaN, since nobody may read them; logits of a whole prompt do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.v1.attention.backend import subclass_attention_backend

from nbl_export.targets.checkpoint.vllm.prefix import keep_predicted

__all__ = ["ExitLayer", "Rows", "put_exit", "rows_of"]


@dataclass(frozen=True)
class Rows:
    """What the rows of a step do.

    Attributes:
        continuing: rows that continue, ascending; None if all do.
        owner, lengths, seen: of each run of neighbouring rows that continue: its request, its rows, and the tokens
            up to its end.
        skipped: rows with predicted KV.
        fresh: places in `skipped` of rows whose token before is of an earlier step; fresh_blocks: its block.
        last, blocks: the last row that the step writes to each block, and the block.
        ends: the last row of each request.
    """

    continuing: np.ndarray | None
    owner: np.ndarray
    lengths: np.ndarray
    seen: np.ndarray
    skipped: np.ndarray
    fresh: np.ndarray
    fresh_blocks: np.ndarray
    last: np.ndarray
    blocks: np.ndarray
    ends: np.ndarray


def rows_of(
    starts: np.ndarray, counts: np.ndarray, prompts: np.ndarray, table: np.ndarray, block: int, recent_tokens: int
) -> Rows:
    """The rows of a step.

    Args:
        starts: position of each request's first row. counts: its rows. prompts: tokens of its prompt.
        table: blocks of each request. block: tokens of a block.
        recent_tokens: W.
    """
    request = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    at = starts[request] + np.arange(len(request)) - (ends - counts)[request]
    is_skipped = (at > 0) & (at < np.where(prompts > recent_tokens + 1, prompts - recent_tokens, 0)[request])
    is_last = (at % block == block - 1) | np.isin(np.arange(len(at)), ends - 1)
    skipped, last, continuing = (np.flatnonzero(chosen) for chosen in (is_skipped, is_last, ~is_skipped))
    fresh = np.flatnonzero(at[skipped] == starts[request[skipped]])
    first = skipped[fresh]
    begins = np.ones(len(continuing), bool)
    begins[1:] = (np.diff(request[continuing]) != 0) | (np.diff(at[continuing]) != 1)
    begin = np.flatnonzero(begins)
    lengths = np.diff(np.append(begin, len(continuing)))
    return Rows(
        continuing=continuing if len(skipped) else None,
        owner=request[continuing[begin]],
        lengths=lengths,
        seen=at[continuing[begin + lengths - 1]] + 1,
        skipped=skipped,
        fresh=fresh,
        fresh_blocks=table[request[first], (at[first] - 1) // block],
        last=last,
        blocks=table[request[last], at[last] // block],
        ends=(ends - 1)[counts > 0],
    )


class ExitLayer:
    """What the layers above the exit layer of a model share.

    Args:
        facts: `nbl_exit` of config.json.
        layers: the lowest and the highest of them.
        size: D.
    """

    def __init__(self, facts: Any, layers: tuple[int, int], size: int) -> None:
        self.recent_tokens = facts["recent_tokens"]
        self._epsilon = facts["epsilon"]
        self.lowest, self.highest = layers
        self._held = torch.empty(0, size)  # of each block
        self._features = torch.empty(0)

    def enter(self, step: Any, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        """Read the stream at the exit layer; returns the rows that continue."""
        rows = step.nbl_rows
        x_ND = _normed(hidden + residual, self._epsilon)
        if rows.continuing is not None:
            before = x_ND[rows.skipped - 1]
            before[rows.fresh] = self._held[rows.fresh_blocks]
            self._features = torch.cat([x_ND[rows.skipped], before], 1)
        self._hold(rows, x_ND)
        return (hidden, residual) if rows.continuing is None else (hidden[rows.continuing], residual[rows.continuing])

    def _hold(self, rows: Rows, x_ND: torch.Tensor) -> None:
        most = int(rows.blocks.max(initial=-1)) + 1
        if most > len(self._held):
            held = x_ND.new_zeros(2 * most, x_ND.shape[1])
            held[: len(self._held)] = self._held
            self._held = held
        self._held[rows.blocks] = x_ND[rows.last]

    def fill(self, step: Any, attention: Any, positions: torch.Tensor) -> None:
        """Put the predicted KV and values of the skipped rows into a layer's cache."""
        rows = step.nbl_rows
        attn = attention.attn
        heads = attn.num_kv_heads
        size = attn.head_size
        ours = get_tensor_model_parallel_rank() * attention.total_num_kv_heads // get_tensor_model_parallel_world_size()
        made = attention.mixer.linear(self._features).unflatten(-1, (2, -1, size))[:, :, ours : ours + heads]
        keys, values = (part.contiguous() for part in made.unbind(1))
        flat = keys.view(len(keys), -1)
        keys = attention.rotary_emb(positions[rows.skipped], flat, None)[0].view_as(values)
        attn.impl.do_kv_cache_update(attn, keys, values, attn.kv_cache, step.nbl_skipped_slots)
        get_forward_context().slot_mapping[attn.layer_name] = step.slot_mapping

    def leave(self, rows: Rows, continued: torch.Tensor, count: int) -> torch.Tensor:
        """All rows of a step, of which few continued."""
        found = continued.new_full((count, continued.shape[1]), torch.nan)
        found[rows.ends] = 0  # vLLM samples a token behind each chunk, and forgets it
        found[rows.continuing] = continued
        return found


class _Above:
    """Mixin before a stock decoder layer above the exit layer."""

    exit_layer: ExitLayer
    index: int
    self_attn: Any

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor, **others: Any
    ) -> Any:
        stock: Any = super()
        steps = get_forward_context().attn_metadata
        step = steps.get(self.self_attn.attn.layer_name) if isinstance(steps, dict) else None
        rows = getattr(step, "nbl_rows", None)
        if rows is None:  # a trial run of vLLM
            return stock.forward(positions, hidden_states, residual, **others)
        if self.index == self.exit_layer.lowest:
            hidden_states, residual = self.exit_layer.enter(step, hidden_states, residual)
        if rows.continuing is None:
            return stock.forward(positions, hidden_states, residual, **others)
        self.exit_layer.fill(step, self.self_attn, positions)
        if len(rows.continuing):
            hidden_states, residual = stock.forward(positions[rows.continuing], hidden_states, residual, **others)
        if self.index < self.exit_layer.highest:
            return hidden_states, residual
        return tuple(self.exit_layer.leave(rows, part, len(positions)) for part in (hidden_states, residual))


def put_exit(layers: Any, facts: Any, vllm_config: Any) -> list[str]:
    """Let the layers from the exit layer up predict keys. Returns names of the maps' biases, as the checkpoint has
    them."""
    lowest = facts["layer"]
    count = len(layers)
    size = vllm_config.model_config.hf_config.hidden_size
    exit_layer = ExitLayer(facts, (lowest, count - 1), size)
    backend = layers[lowest].self_attn.attn.attn_backend
    backend = subclass_attention_backend(
        "ExitLayer", backend, _builder(backend.get_builder_cls(), exit_layer.recent_tokens)
    )
    for layer in layers:
        keep_predicted(layer.self_attn.attn, exit_layer.recent_tokens)
    for index in range(lowest, count):
        layer = layers[index]
        attention = layer.self_attn
        attention.attn.attn_backend = backend
        prefix = attention.attn.layer_name.removesuffix(".attn")
        attention.mixer = nn.Module()
        attention.mixer.linear = ReplicatedLinear(
            2 * size,
            2 * attention.total_num_kv_heads * attention.attn.head_size,
            bias=True,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.mixer.linear",
            return_bias=False,
        )
        layer.exit_layer = exit_layer
        layer.index = index
        layer.__class__ = type(f"{type(layer).__name__}AboveCut", (_Above, type(layer)), {})
    return [f"model.layers.{index}.self_attn.mixer.linear.bias" for index in range(lowest, count)]


def _builder(stock: Any, recent_tokens: int) -> Any:
    """A class that builds attention's metadata of the rows that continue."""

    class ExitBuilder(stock):
        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
            common = common_attn_metadata
            prompts = common_attn_metadata.rswa_prefix_lens
            if prompts is None:  # a trial run
                return super().build(common_prefix_len, common, fast_build)
            counts = common.query_start_loc_cpu.diff().cpu().numpy()
            ends = common.seq_lens if common.seq_lens_cpu_upper_bound is None else common.seq_lens_cpu_upper_bound
            starts = ends.cpu().numpy() - counts
            table = common.block_table_tensor.cpu().numpy()
            rows = rows_of(starts, counts, prompts.cpu().numpy(), table, self.kv_cache_spec.block_size, recent_tokens)
            made = super().build(common_prefix_len if rows.continuing is None else 0, _few(common, rows), fast_build)
            made.nbl_rows = rows
            made.nbl_skipped_slots = common.slot_mapping[rows.skipped]
            return made

    return ExitBuilder


def _few(common: Any, rows: Rows) -> Any:
    """Metadata of the rows that continue; each run of neighbouring rows is a sequence."""
    if rows.continuing is None or not len(rows.continuing):
        return common
    starts = torch.from_numpy(np.append(0, np.cumsum(rows.lengths)).astype(np.int32))
    owner = torch.from_numpy(rows.owner)
    device = common.seq_lens.device
    seen = torch.from_numpy(rows.seen.astype(np.int32))
    return replace(
        common,
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=seen.to(device),
        seq_lens_cpu_upper_bound=seen,
        num_reqs=len(owner),
        num_actual_tokens=len(rows.continuing),
        max_query_len=int(rows.lengths.max()),
        max_seq_len=int(rows.seen.max()),
        block_table_tensor=common.block_table_tensor[owner],
        slot_mapping=common.slot_mapping[rows.continuing],
        positions=None if common.positions is None else common.positions[rows.continuing],
        is_prefilling=None if common.is_prefilling is None else common.is_prefilling[owner],
        rswa_prefix_lens=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


def _normed(stream_ND: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = stream_ND.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)).to(stream_ND.dtype)
