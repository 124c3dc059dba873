"""The ONNX Runtime GenAI model builder: GroupQueryAttention with rotary inside, packed QKV, skip norms.

Its graph is the fastest on ONNX Runtime. Its int8 and int4 are weight-only (MatMulNBits, block 32, symmetric,
accuracy level 4 on the CPU); `int8_rows` converts its int8.

Patches of the GenAI builder (0.18) for models that it cannot export; verification compares the graphs with torch.

SmolLM3   the builder gives a layer without rotary embedding a separate one, on positions that the graph lacks
Gemma 3   the builder does not read rotary settings by kind of layer, as transformers 5 has them
OLMo      the builder makes norms of layer norms that have no weights
GPT-OSS   the builder rounds experts from the published codes alone, which a checkpoint in floats lacks
codes     the builder cannot join query, key and value of a quantised checkpoint without zero points into one matrix

Rounding to int8 and int4 is patched too: the builder holds all matrices in float32 while it rounds, now it holds one.
ONNX Runtime's k_quant (1.32) holds a matrix some ten times, and fails for rows of an odd number of blocks, whose last
byte of zero points is half full.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.model.architectures import ARCHITECTURES
from nbl_export.targets.base import ExportSettings
from nbl_export.targets.export.finish import captured
from nbl_export.trust.model_settings import read_object

__all__ = ["CUDA_PRECISIONS", "PRECISIONS", "build"]

PRECISIONS = ("fp32", "int8", "int4")  # on the CPU
CUDA_PRECISIONS = ("fp16", "int8", "int4")
_NO_CODE = "hf_remote=false"  # the builder's default, made explicit: code in a checkpoint is not run
_NORMS_APART = "fuse_qk_norm_gqa=false"  # for CUDA: only GPUs compute norms of queries and keys inside of attention


def build(checkpoint: Path, out: Path, settings: ExportSettings, provider: str = "cpu") -> None:
    """Write model.onnx, its data, genai_config.json and the tokenizer to `out`."""
    precision = settings.precision
    if precision not in (PRECISIONS if provider == "cpu" else CUDA_PRECISIONS):
        raise NblError(
            f"the GenAI builder makes no {precision} graph for the CPU; use --precision {', '.join(PRECISIONS)}, "
            "or the key decoder_source = 'mobius' for fp16"
        )
    try:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options
    except ImportError as error:
        raise MissingPackageError("onnxruntime_genai", "cpu", "building the decoder graph") from error
    with tempfile.TemporaryDirectory() as cache, captured("the GenAI builder", checkpoint), repaired():
        where = "", str(_named(settings.codes or checkpoint, Path(cache))), str(out), precision, provider, cache
        chosen = [_NO_CODE, _NORMS_APART, *settings.builder_options]
        create_model(*where, **parse_extra_options(*where, chosen))
    _forget_commit(out / GRAPH_FILE)
    from nbl_export.targets.export.restore_attention import restore_attention

    restore_attention(checkpoint, out)


def _named(checkpoint: Path, scratch: Path) -> Path:
    """The checkpoint; or links to its files, with the name of the architecture whose builder makes it (`genai_as`)."""
    config = read_object(checkpoint / "config.json")
    name = ARCHITECTURES[config["model_type"]].genai_as
    if name is None:
        return checkpoint
    made = scratch / "checkpoint"
    made.mkdir()
    for file in checkpoint.absolute().iterdir():
        if file.name != "config.json":
            (made / file.name).symlink_to(file)
    (made / "config.json").write_text(json.dumps({**config, "architectures": [f"{name}ForCausalLM"]}), encoding="utf-8")
    return made


def _forget_commit(path: Path) -> None:
    """Remove the commit of the current git repository, which the builder appends: equal options give equal bytes."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    model.producer_version = model.producer_version.partition("+")[0]
    path.write_bytes(model.SerializeToString())


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Patch the builder inside the block."""
    from onnxruntime.quantization.neural_compressor import weight_only
    from onnxruntime_genai.models import builder

    made = {"SmolLM3Model": _smollm3, "Gemma3Model": _gemma3, "OLMoModel": _olmo, "GPTOSSModel": _gpt_oss}
    base = next(kind for kind in builder.LlamaModel.__mro__ if _PACKED in vars(kind))
    changes = [
        *((builder, name, make(getattr(builder, name))) for name, make in made.items()),
        (base, _PACKED, _packed(getattr(base, _PACKED))),
        (base, _ROUND, _one_by_one(getattr(base, _ROUND))),
        (weight_only, _PRODUCT, _whole_bytes(getattr(weight_only, _PRODUCT))),
        (weight_only, _SEARCH, _in_parts(getattr(weight_only, _SEARCH))),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield
    finally:
        for change in before:
            setattr(*change)


_PACKED = "make_packed_matmul_int4_class"


def _packed(theirs: Any) -> Any:
    """Join query, key and value; the builder's method also joins zero points, which symmetric codes lack."""

    def joined(self: Any, *parts: Any) -> Any:
        if any(getattr(part, "qzeros", True) is not None for part in parts):
            return theirs(self, *parts)
        for part in parts:
            part.qzeros = part.scales[:0]
        whole = theirs(self, *parts)
        whole.qzeros = None
        return whole

    return joined


_ROUND = "to_nbits"


def _one_by_one(theirs: Any) -> Any:
    """Round each matrix in a graph of one node. Nodes and weights are the same, byte for byte."""

    def rounded(self: Any) -> Any:
        if getattr(self, "exact_quant_override_names", None) or self.matmul_attrs["weights_prepacked"]:
            return theirs(self)  # these options look at all nodes at once
        whole = self.model
        for node in [node for node in whole.graph if node.op_type in self.quant_attrs["op_types_to_quantize"]]:
            weight = next((value for value in node.inputs if value.is_initializer()), None)
            if weight is not None:
                self.model = _alone(whole, node)
                _take_place(node, theirs(self).graph, weight)
        self.model = whole
        return whole

    return rounded


_SEARCH = "quant_tensor_k_quant_cuda"  # for processors too
_VALUES = 1 << 18  # of a matrix that are rounded at once


def _in_parts(theirs: Any) -> Any:
    """Round some rows of a matrix at a time, on all cores: the same codes, in less memory and time."""

    def rounded(matrix_NK: np.ndarray, bits: int, size: int) -> tuple[np.ndarray, ...]:
        rows = max(1, _VALUES // matrix_NK.shape[1])

        def part(begin: int) -> tuple[np.ndarray, ...]:
            codes, scales, zeros = theirs(matrix_NK[begin : begin + rows], bits, size)
            return codes.astype(np.uint8), scales, zeros

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(part, range(0, len(matrix_NK), rows)))
        return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))

    return rounded


_PRODUCT = "make_matmul_weight_only_node"


def _whole_bytes(theirs: Any) -> Any:
    """Give each row of 4-bit zero points whole bytes, as MatMulNBits reads them."""

    def made(*, zero_point: Any, num_bits: int, k_blocks: int, **given: Any) -> Any:
        if zero_point is None or num_bits != 4 or k_blocks % 2 == 0:
            return theirs(zero_point=zero_point, num_bits=num_bits, k_blocks=k_blocks, **given)
        from onnx import numpy_helper

        node, constants = theirs(zero_point=None, num_bits=num_bits, k_blocks=k_blocks, **given)
        zeros = np.pad(zero_point.reshape(-1, k_blocks).astype(np.uint8), ((0, 0), (0, 1)))
        packed = numpy_helper.from_array(zeros[:, ::2] | zeros[:, 1::2] << 4, f"{given['node'].input[1]}_zp")
        node.input.append(packed.name)
        return node, [*constants, packed]

    return made


def _alone(whole: Any, node: Any) -> Any:
    """A model of a copy of the node and its weight."""
    import onnx_ir as ir

    given = [value for value in node.inputs if value.const_value is None]
    return ir.Model(ir.convenience.extract(whole.graph, given, node.outputs), ir_version=whole.ir_version)


def _take_place(node: Any, made: Any, weight: Any) -> None:
    """Put the nodes and weights of a graph in the place of a node, and remove its weight if nobody else reads it."""
    import onnx_ir as ir

    from nbl_export.graph.emitter import register

    whole = node.graph
    nodes = list(made)
    for name, value in made.initializers.items():
        if name not in whole.initializers:
            tensor = value.const_value
            register(
                whole, ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
            )  # a copy frees the protobuf
    outputs = list(made.outputs)
    made.outputs.clear()
    made.remove(nodes)
    known = {value.name: value for value in node.inputs} | dict(whole.initializers)
    for value in (*made.inputs, *made.initializers.values()):
        value.replace_all_uses_with(known[value.name])
    ir.convenience.replace_nodes_and_values(whole, node, [node], nodes, node.outputs, outputs)
    if not weight.uses():
        del whole.initializers[weight.name]


def _smollm3(base: Any) -> Any:
    class SmolLM3Model(base):
        def make_attention_qk_rope(self, layer_id: int, **kwargs: Any) -> Any:
            if not self.no_rope_layers[layer_id]:
                return "", ""
            return super().make_attention_qk_rope(layer_id, **kwargs)

    return SmolLM3Model


def _gemma3(base: Any) -> Any:
    class Gemma3Model(base):
        def make_rope_init(self, config: Any) -> None:
            config.rope_local_base_freq = config.rope_parameters["sliding_attention"]["rope_theta"]
            self.rope_attrs["theta"] = config.rope_parameters["full_attention"]["rope_theta"]

    return Gemma3Model


def _olmo(base: Any) -> Any:
    class OLMoModel(base):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.layernorm_attrs["simple"] = False
            self.layernorm_attrs["epsilon"] = 1e-5  # of transformers' OlmoLayerNorm

    return OLMoModel


def _gpt_oss(base: Any) -> Any:
    class GPTOSSModel(base):
        def make_moe_preprocessing(self, layer_id: int, moe: Any, root_input: str) -> None:
            self.experts = moe.experts
            super().make_moe_preprocessing(layer_id, moe, root_input)

        def load_mxfp4_experts(self, layer_id: int, decode: bool = False) -> Any:
            return tuple(weight.transpose(-1, -2) for weight in (self.experts.gate_up_proj, self.experts.down_proj))

    return GPTOSSModel
