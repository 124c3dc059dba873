"""How options are settled, on values: defaults, effects, and what is refused. No model is read, and no stage runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError, UsageError
from nbl_export.options.option import ModelFacts
from nbl_export.options.options import OPTIONS, JobOptions, flag_of
from nbl_export.options.settle import hub_id, numbers, read_asked, settle
from nbl_export.publish.convert import FORMS
from nbl_export.records.capabilities import LINEAR_KINDS, Capabilities
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.destinations import DESTINATIONS
from nbl_export.run.settled import capabilities_of, model_facts
from nbl_export.targets.checkpoint.vllm.plugin import ARCHITECTURES

DECODER = DecoderSpec("llama", 3, 64, 4, 2, 16, 384, 512)
PLAIN = model_facts(DECODER)
MOE = model_facts(dataclasses.replace(DECODER, architecture="qwen3_moe"))
WINDOW = model_facts(dataclasses.replace(DECODER, architecture="mistral", sliding_window=16))
QWEN3 = model_facts(dataclasses.replace(DECODER, architecture="qwen3"))
GEMMA = model_facts(dataclasses.replace(DECODER, architecture="gemma3_text", sliding_window=16))
HUNYUAN = model_facts(dataclasses.replace(DECODER, architecture="hunyuan_v1_dense"))
LARGE = dataclasses.replace(PLAIN, fits=False)
OLMO = model_facts(dataclasses.replace(DECODER, architecture="olmo2"))
NBL = dataclasses.replace(PLAIN, maps_tap="residual")
KEYS = dataclasses.replace(NBL, kinds=frozenset({"predicted_kv"}))

Asked = dict[str, Any]
LINEAR_TRT: Asked = {"engine": "trt", "exit_layer": "none"}


def settled(asked: Mapping[str, Any], model: ModelFacts | None = None, **more: Any) -> JobOptions:
    return settle({"model": "m", **asked}, capabilities_of, model, **more)


def assert_settled(options: JobOptions, expected: Mapping[str, Any]) -> None:
    assert {name: getattr(options, name) for name in expected} == expected


# -- defaults that depend on the engine, the model and other options ----------------------------------------------

SETTLED: list[tuple[Asked, Asked]] = [
    (
        {},
        {"tap": "residual", "precision": "int8", "decoder_source": "genai", "fit": "independent", "exit_layer": "auto"},
    ),
    ({"max_perplexity_increase": "5%"}, {"exit_layer": "auto", "recent_tokens": None}),
    ({"exit_layer": "none"}, {"fit": "independent"}),
    ({"fit": "distilled"}, {"tap": "normed", "exit_layer": "none"}),
    ({"distill_minutes": 5.0}, {"fit": "distilled", "tap": "normed", "exit_layer": "none"}),  # for any model
    ({"distill_steps": 40, "layers": "2"}, {"fit": "distilled"}),
    ({"select": "efficient"}, {"exit_layer": "none"}),
    ({"maps": "linear"}, {"tap": "normed", "exit_layer": "none"}),
    ({"logits": "all"}, {"exit_layer": "none"}),
    ({"decoder_source": "mobius"}, {"exit_layer": "auto"}),
    ({"precision": "fp16"}, {"decoder_source": "mobius", "exit_layer": "none"}),
    (
        {"provider": "cuda"},
        {"exit_layer": "auto", "fit": "independent", "precision": "fp16", "decoder_source": "genai"},
    ),
    (
        {"engine": "openvino"},
        {
            "tap": "residual",
            "fit": "independent",
            "exit_layer": "auto",
            "precision": "int8",
            "decoder_source": "openvino",
        },
    ),
    ({"layers": "2"}, {"tap": "residual", "fit": "independent", "exit_layer": "none"}),
    ({"engine": "trt-rtx", "layers": "2"}, {"tap": "residual", "fit": "independent"}),  # as without a number
    ({"precision": "fp16"}, {"decoder_source": "mobius", "exit_layer": "none"}),
    ({"select": "cca"}, {"fit": "independent"}),
    ({"fit": "distilled", "tap": "residual"}, {"tap": "residual"}),
    ({"engine": "openvino", "precision": "int8"}, {"precision": "int8", "decoder_source": "openvino"}),
    ({"engine": "trt-rtx"}, {"precision": "bf16", "decoder_source": "static", "depths": (0,), "exit_layer": "auto"}),
    ({**LINEAR_TRT, "max_seq_len": 24_064}, {"depths": (0, 2048)}),
    ({**LINEAR_TRT, "prompt_tokens": (128,), "generate_tokens": 256}, {"depths": (0, 1792)}),
    ({**LINEAR_TRT, "max_seq_len": 64}, {"depths": (0,)}),
    ({**LINEAR_TRT, "max_seq_len": 256}, {"depths": (0, 128)}),  # a prompt of 512 fits at no depth
    ({"engine": "openvino"}, {"depths": (0,)}),
    (
        {"engine": "trt-rtx", "exit_layer": "auto"},
        {"decoder_source": "static", "fit": "independent", "exit_layer": "auto"},
    ),
    ({"for": "openvino"}, {"engine": "openvino", "precision": "int8", "exit_layer": "auto"}),
    ({"for": "cuda"}, {"engine": "ort", "provider": "cuda", "precision": "fp16"}),
    ({"for": "tensorrt"}, {"destination": "trt", "engine": "trt", "decoder_source": "static"}),
    ({"for": "genai"}, {"engine": "ort", "exit_layer": "auto"}),
    ({"for": "transformers"}, {"exit_layer": "auto", "maps": "affine"}),
    ({"for": "vLLM"}, {"engine": "ort", "exit_layer": "auto", "fit": "independent", "maps": "affine"}),
    ({"for": "gguf"}, {"destination": "llama.cpp", "exit_layer": "none", "maps": "linear", "tap": "normed"}),
    ({"for": "vllm", "engine": "openvino"}, {"engine": "openvino"}),
    ({"layers": "2"}, {"exit_layer": "none"}),
    ({"seed": None, "distill_steps": None}, {"seed": 0, "distill_steps": None}),
]
OF_MODEL: list[tuple[ModelFacts, Asked, Asked]] = [
    (dataclasses.replace(PLAIN, taps=("residual",)), {"fit": "distilled"}, {"tap": "residual"}),
    (PLAIN, {}, {"fit": "independent", "exit_layer": "auto"}),
    (PLAIN, {**LINEAR_TRT, "prompt_tokens": (64,)}, {"depths": (0, 384)}),  # 512 positions
    (QWEN3, {"engine": "trt", "seed": None}, {"fit": "distilled", "exit_layer": "none"}),
    (QWEN3, {"for": "vllm", "seed": None}, {"fit": "distilled", "exit_layer": "none"}),
    (QWEN3, {"provider": "cuda"}, {"fit": "independent", "exit_layer": "auto"}),
    (GEMMA, {"seed": None}, {"fit": "independent", "exit_layer": "auto"}),
    (GEMMA, {"engine": "openvino", "seed": None}, {"fit": "independent", "exit_layer": "auto"}),
    (OLMO, {"engine": "openvino", "seed": None}, {"fit": "distilled", "exit_layer": "none"}),
    (
        LARGE,
        {"seed": None},
        {"fit": "independent", "exit_layer": "none", "precision": "int4", "decoder_source": "genai"},
    ),
    (LARGE, {"engine": "openvino"}, {"precision": "int4"}),
    (LARGE, {"engine": "trt"}, {"precision": "bf16"}),
    (LARGE, {"decoder_source": "mobius"}, {"precision": "int8"}),
    (LARGE, {"exit_layer": "1"}, {"exit_layer": "1"}),
    *(
        (
            model_facts(dataclasses.replace(DECODER, architecture=name), fits=fits),
            {"seed": None},
            {"decoder_source": source, "precision": precision},
        )
        for name, source, fits, precision in (
            ("qwen3_moe", "mobius", True, "int8"),
            ("qwen3_moe", "mobius", False, "int8"),
            ("olmo3", "mobius", True, "int8"),
            ("ministral3", "mobius", True, "int8"),
            ("gpt_oss", "genai", True, "int8"),
            ("gemma3_text", "genai", True, "int8"),
            ("cwm", "genai", False, "int4"),
        )
    ),
    (MOE, {"engine": "openvino"}, {"decoder_source": "openvino"}),
    (NBL, {}, {"fit": "given", "tap": "residual"}),
    (NBL, {"fit": "given", "tap": "residual"}, {"fit": "given"}),
    (dataclasses.replace(NBL, maps_tap="normed"), {}, {"fit": "given", "tap": "normed"}),
]


def test_the_table_of_destinations_says_what_the_code_does() -> None:
    assert list(ARCHITECTURES) == list(DESTINATIONS["vllm"].architectures)  # vLLM's plugin
    assert set(FORMS) == {place.form for place in DESTINATIONS.values() if place.form}
    for name, place in DESTINATIONS.items():
        options = settled({"for": name}, PLAIN)
        engine = capabilities_of(options.engine, options.provider)
        assert engine.holds(options.method) if place.kinds is None else options.method in place.kinds, name


@pytest.mark.parametrize(("asked", "expected"), SETTLED, ids=str)
def test_defaults_follow_the_other_options(asked: Asked, expected: Asked) -> None:
    assert_settled(settled(asked), expected)


@pytest.mark.parametrize(("model", "asked", "expected"), OF_MODEL, ids=str)
def test_defaults_follow_the_model(model: ModelFacts, asked: Asked, expected: Asked) -> None:
    options = settled(asked, model)
    assert_settled(options, expected)
    assert settled({}, model, recorded=options) == options


# A recorded run, the options that change it -> what becomes of them.
CHANGED: list[tuple[Asked, Asked, Asked]] = [
    ({}, {"fit": "distilled"}, {"tap": "normed"}),
    ({}, {"maps": "linear"}, {"tap": "normed"}),
    ({}, {"fit": "distilled", "tap": "residual"}, {"tap": "residual"}),
    ({"fit": "distilled"}, {"fit": "independent"}, {"tap": "residual"}),
    ({"fit": "distilled", "tap": "residual"}, {"layers": "2"}, {"tap": "residual"}),
    ({"tap": "normed", "layers": "3"}, {"layers": "2"}, {"tap": "normed", "fit": "independent"}),
    ({}, {"layers": "2"}, {"tap": "residual", "fit": "independent", "exit_layer": "none"}),
    ({"exit_layer": "20"}, {"layers": "2"}, {"layers": "2", "exit_layer": "none"}),
    ({"layers": "2"}, {"exit_layer": "20"}, {"layers": None, "exit_layer": "20"}),
    ({"max_perplexity_increase": "5%"}, {"exit_layer": "20"}, {"max_perplexity_increase": None, "exit_layer": "20"}),
    (
        {"max_perplexity_increase": "5%"},
        {"exit_layer": "none"},
        {"max_perplexity_increase": "5%", "exit_layer": "none"},
    ),
    ({"engine": "trt-rtx"}, {"layers": "2"}, {"tap": "residual", "fit": "independent"}),
    ({"layers": "2"}, {"max_perplexity_increase": "5%"}, {"tap": "residual", "fit": "independent"}),
    ({"engine": "openvino", "precision": "int8"}, {"layers": "2"}, {"precision": "int8"}),
    ({}, {"engine": "openvino"}, {"precision": "int8", "decoder_source": "openvino"}),
    ({"for": "mlx-lm"}, {"for": "vllm"}, {"maps": "affine", "engine": "ort"}),
    ({"for": "trt-rtx"}, {"engine": "trt"}, {"destination": None, "engine": "trt", "precision": "bf16"}),
    # What no longer applies returns to its default.
    ({"fit": "distilled", "distill_steps": 40, "seed": 3}, {"fit": "independent"}, {"distill_steps": None, "seed": 0}),
    ({"layers": "2", "select": "cca"}, {"layers": "0,2"}, {"select": None}),
    ({"layers": "2", "select": "cca"}, {"seed": None}, {"select": "cca"}),
]


@pytest.mark.parametrize(("recorded", "asked", "expected"), CHANGED, ids=str)
def test_a_change_of_recorded_options(recorded: Asked, asked: Asked, expected: Asked) -> None:
    assert_settled(settle(asked, capabilities_of, recorded=settled(recorded)), expected)


@pytest.mark.parametrize(
    ("model", "expected"), [(m, expected) for m, asked, expected in OF_MODEL if not asked], ids=str
)
def test_recorded_defaults_follow_another_model(model: ModelFacts, expected: Asked) -> None:
    recorded = settled({"calibration_tokens": 9})
    assert_settled(settle({}, capabilities_of, model, recorded), {**expected, "calibration_tokens": 9})


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, ("algo_config=k_quant_mixed",)),
        ({"builder_option": "block_size=64"}, ("block_size=64", "algo_config=k_quant_mixed")),
        ({"builder_option": "algo_config=default"}, ("algo_config=default",)),
        ({"quantized_model": "q"}, ()),
        ({"precision": "int8"}, ()),
        ({"provider": "cuda"}, ()),
        ({"engine": "openvino"}, ()),
    ],
    ids=str,
)
def test_the_builder_rounds_to_int4_on_a_cpu_by_k_quant_mixed(asked: Asked, told: tuple[str, ...]) -> None:
    assert settled({"precision": "int4", **asked}).builder_options == told


def test_no_change_keeps_recorded_options_without_effect() -> None:
    """Else their stages would run again."""
    recorded = dataclasses.replace(settled({"layers": "0,2"}), select="cca", seed=3)
    assert settle({}, capabilities_of, recorded=recorded) == recorded
    changed = settle({"context": 64}, capabilities_of, recorded=recorded)
    assert (changed.select, changed.seed) == (None, 0)


# -- options without effect ---------------------------------------------------------------------------------------

# The option, all that is asked for, the model, and what the message says the option is for.
IDLE: list[tuple[str, Asked, ModelFacts | None, str]] = [
    ("select", {"select": "cca", "layers": "0,2"}, None, "a number of layers or a goal"),
    ("maps", {"maps": "linear", "fit": "drop"}, None, "fitted maps"),
    ("distill_minutes", {"distill_minutes": 1.0, "exit_layer": "2"}, None, "--fit distilled"),
    ("distill_minutes", {"distill_minutes": 1.0}, LARGE, "--fit distilled"),
    ("distill_steps", {"distill_steps": 40, "fit": "independent"}, None, "--fit distilled"),
    ("distill_tokens", {"distill_tokens": 2048, "fit": "independent"}, None, "--fit distilled"),
    ("lora_rank", {"lora_rank": 16, "fit": "drop"}, None, "--fit distilled"),  # the default, but asked for
    ("label_weight", {"label_weight": 0.5, "layers": "2"}, None, "--fit distilled"),
    ("seed", {"seed": 3, "layers": "2"}, None, "--fit distilled"),
    ("provider", {"provider": "cpu", "engine": "openvino"}, None, "--engine ort"),
    ("max_seq_len", {"max_seq_len": 64}, None, "engines that compile graphs"),
    ("max_batch", {"max_batch": 2, "engine": "openvino"}, None, "trt"),
    ("prefill_chunk", {"prefill_chunk": 16}, None, "trt"),
    ("builder_option", {"builder_option": ("block_size=32",), "decoder_source": "mobius"}, None, "genai"),
    ("builder_option", {"precision": "fp32", "builder_option": ("fuse_mlp_gate_up=true", "block_size=32")}, None,
     "int8 or int4"),
    ("builder_option", {"precision": "fp32", "builder_option": "algo_config=rtn"}, None, "--precision int8 or int4"),
    ("builder_option", {"precision": "fp32", "builder_option": "accuracy_level=1"}, None, "--precision int8 or int4"),
    ("quantized_model", {"quantized_model": "x", "precision": "int8"}, None, "--precision int4"),
    ("threads", {"threads": 2, "engine": "trt-rtx"}, None, "compile nothing"),
    ("exit_layer", {"exit_layer": "1"}, NBL, "the original model"),
    ("recent_tokens", {"recent_tokens": 8, "layers": "1,"}, None, "--exit-layer"),
    *(
        (name, {name: value}, NBL, "no longer contains the removed attention")
        for name, value in {
            "layers": "1", "max_perplexity_increase": "5%",
            "select": "cca", "maps": "linear", "compute_dtype": "float32",
        }.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "asked", "model", "part"), IDLE, ids=str)
def test_an_option_without_effect_is_refused(name: str, asked: Asked, model: ModelFacts | None, part: str) -> None:
    with pytest.raises(UsageError) as refusal:
        settled(_with_tap(asked, model), model)
    said = str(refusal.value)
    assert said.startswith(f"{flag_of(name)} is for ") and said.endswith(f"; leave {flag_of(name)} out")
    assert part in said


def test_every_row_is_tried() -> None:
    tried = {name for name, *_ in IDLE}
    assert {name for name, record in OPTIONS.items() if record.applies} == tried
    for option, record in OPTIONS.items():
        for row in record.applies:
            said = [str(_refusal(asked, model)) for name, asked, model, _ in IDLE if name == option]
            assert any(row.belongs in sentence for sentence in said), (option, row.belongs)


def _with_tap(asked: Asked, model: ModelFacts | None) -> Asked:
    """The tap that linear maps need, which an NBL checkpoint does not settle."""
    return {**asked, **({"tap": "normed"} if asked.get("maps") == "linear" and model is NBL else {})}


def _refusal(asked: Asked, model: ModelFacts | None) -> Exception | None:
    try:
        settled(_with_tap(asked, model), model)
    except (NblError, ValueError) as error:
        return error
    return None


@pytest.mark.parametrize(
    "asked",
    [
        {"fit": "distilled", "distill_steps": 4, "lora_rank": 2, "seed": 1},
        {"layers": 2, "select": "cca", "provider": "cpu"},
        {"precision": "INT4", "builder_option": "block_size=32"},
        {"precision": "fp32", "builder_option": "fuse_mlp_gate_up=true"},
        {"precision": "int8", "builder_option": ("accuracy_level=1", "algo_config=rtn")},
        {**LINEAR_TRT, "max_seq_len": 64, "max_batch": 2, "prefill_chunk": 8},
    ],
    ids=str,
)
def test_an_option_with_effect_is_accepted(asked: Asked) -> None:
    options = settled(asked)
    assert_settled(options, read_asked(asked))
    assert settled(asked, PLAIN) == options


# -- values that do not fit ---------------------------------------------------------------------------------------

# All that is asked for, the model, and parts of the message: refused as usage.
WRONG: list[tuple[Asked, ModelFacts | None, tuple[str, ...]]] = [
    ({"engine": "steam"}, None, ("unknown engine 'steam'; engines are ort, openvino, trt, trt-rtx",)),
    ({"engine": "gguf"}, None, ("unknown engine 'gguf'", "--for gguf makes a model for it")),
    ({"engine": "openvino", "provider": "cuda"}, None, ("--provider is for engine ort, not for openvino",)),
    ({"precision": "fp7"}, None, ("--precision fp7 is not for engine ort", "fp32", "int4")),
    ({"engine": "openvino", "precision": "bf16"}, None, ("engine openvino; it takes int8, fp16, fp32, int4",)),
    ({"engine": "trt-rtx", "precision": "int8"}, None, ("--precision int8", "bf16, fp16, int4")),
    ({"provider": "cuda", "precision": "fp32"}, None, ("engine ort with --provider cuda; it takes fp16",)),
    ({"provider": "cuda", "decoder_source": "mobius"}, None, ("mobius is not for engine ort with --provider cuda",)),
    ({"provider": "cuda", "engine": "trt"}, None, ("--provider is for engine ort, not for trt",)),
    ({"for": "trt", "engine": "ort"}, None, ("--for trt needs --engine trt, not ort; leave --engine out",)),
    ({"for": "genai", "provider": "cuda"}, None, ("--for genai needs --provider cpu, not cuda",)),
    ({"for": "mars"}, None, ("--for mars: destinations are genai, cuda, openvino",)),
    ({"for": "sglang"}, None, ("--for sglang: SGLang has no linear layers",)),
    ({"for": "edge-llm"}, KEYS, ("--for edge-llm is not possible: it does not hold predicted KV",)),
    ({"provider": "rocm"}, None, ("unknown provider 'rocm'",)),
    ({"decoder_source": "thin-air"}, None, ("key decoder_source thin-air", "genai, mobius")),
    ({"engine": "openvino", "decoder_source": "genai"}, None, ("key decoder_source genai is not for engine openvino",)),
    ({"layers": 0}, None, ("--layers 0 replaces nothing; ask for at least 1",)),
    ({"max_perplexity_increase": "0%"}, None, ("--max-perplexity-increase 0% allows no replaced layer",)),
    ({"layers": "1", "max_perplexity_increase": "5%"}, None, ("--max-perplexity-increase both set the number",)),
    ({"maps": "linear", "tap": "residual"}, None, ("acts on the normed input; add the key tap = 'normed'",)),
    ({"precision": "int4", "builder_option": "block_size"}, None, ("block_size: the values of block_size are 16",)),
    ({"builder_option": "speed=9"}, None, ("key builder_option speed=9: expected KEY=VALUE", "fuse_mlp_gate_up")),
    ({"precision": "int4", "builder_option": ("block_size=16", "block_size=32")}, None, ("block_size is given twice",)),
    ({"precision": "gguf"}, None, ("--precision gguf is not for engine ort", "int8, fp32, fp16, int4")),
    ({"precision": "fp16", "decoder_source": "genai"}, None,
     ("genai makes no fp16 graph", "decoder_source = 'mobius'", "fp32, int8, int4")),
    ({"precision": "int4"}, MOE, ("mobius makes no int4 graph; use --precision fp32, fp16",)),
    ({"precision": "int4", "decoder_source": "mobius"}, None, ("mobius makes no int4", "--precision fp32, fp16")),
    ({"layers": "0,0"}, None, ("--layers", "layer 0 is named twice")),
    ({"layers": "0-1,1"}, None, ("--layers", "layer 1 is named twice")),
    ({"fit": "given"}, PLAIN, ("--fit given is for a checkpoint with maps (nbl-export convert)",)),
    ({"fit": "distilled"}, NBL, ("--fit distilled needs the original model: the checkpoint no longer contains",)),
    ({"fit": "drop"}, NBL, ("--fit drop needs the original model: the checkpoint no longer contains",)),
    ({"tap": "normed"}, NBL, ("key tap normed: the maps of m have the tap residual; leave key tap out",)),
    *(
        ({"layers": text}, None, ("--layers", part))
        for text, part in (("abc", "'abc' is not a layer"), ("7-3", "7-3 runs backwards; write 3-7"),
                           ("-1", "'-1' is not a layer"), ("25%", "is not a layer"), ("", "is not a layer"),
                           ("1-", "'1-' is not a layer"), ("²", "'²' is not a layer"), ("some", "0,7,24-29"))
    ),
]  # fmt: skip
assert PLAIN.decoder is not None
ONE_LAYER = dataclasses.replace(PLAIN, decoder=dataclasses.replace(PLAIN.decoder, num_layers=1))
LEAVE_OUT = "; leave --exit-layer out, and layers become linear"
# The same for what does not fit a model: an error that is not of usage.
UNFIT: list[tuple[Asked, ModelFacts | None, tuple[str, ...]]] = [
    ({"decoder_source": "genai"}, MOE, ("genai is not possible for qwen3_moe", "decoder_source = 'mobius'")),
    ({"exit_layer": "1"}, HUNYUAN, ("not possible for hunyuan_v1_dense: it norms keys behind", LEAVE_OUT)),
    ({"exit_layer": "1", "engine": "openvino"}, OLMO, ("not possible for olmo2: it norms the keys of all heads",)),
    ({"exit_layer": "1", "engine": "openvino"}, MOE, ("not possible for qwen3_moe: its experts in", LEAVE_OUT)),
    ({"exit_layer": "1", "engine": "trt"}, QWEN3, ("not possible for qwen3: its attention is not that of",)),
    ({"exit_layer": "1", "engine": "trt"}, WINDOW, ("not possible for mistral: its attention has a sliding window",)),
    ({"exit_layer": "1", "precision": "fp16"}, PLAIN, ("not possible for llama: graphs of mobius in fp16 write",)),
    ({"exit_layer": "1", "for": "vllm"}, OLMO, ("--for vllm",)),
    ({"exit_layer": "1", "for": "vllm"}, WINDOW, ("--exit-layer does not go with --for vllm and mistral", LEAVE_OUT)),
    ({"layers": "3"}, PLAIN, ("--layers 3", "at least one stays", "at most 2")),
    ({"exit_layer": "auto"}, ONE_LAYER, ("--exit-layer auto: this model has one layer", "--exit-layer none")),
    ({"layers": "0-2"}, PLAIN, ("at least one stays", "at most 2")),
    ({"layers": "99"}, PLAIN, ("--layers 99", "at most 2")),
    ({"layers": "0,3"}, PLAIN, ("layer 3 does not exist", "0 to 2")),
    ({"layers": "0-99999999999"}, PLAIN, ("layer 99999999999 does not exist",)),
    ({"tap": "normed"}, OLMO, ("key tap normed is not possible for olmo2: no norm stands in front", "use residual")),
    ({"context": 513}, PLAIN, ("key context 513 is beyond the model's 512 positions",)),
    ({"depths": (512,), "prompt_tokens": (8,)}, PLAIN, ("the shortest test ends at 520 tokens, the model has 512",)),
    ({"depths": (500,), "generate_tokens": 13, "prompt_tokens": 16}, PLAIN, ("ends at 513 tokens",)),
    ({"engine": "trt", "depths": (0, 385)}, PLAIN, ("--depth 385 leaves no room", "512 slots", "at most --depth 384")),
    ({"engine": "trt", "max_seq_len": 513}, PLAIN, ("--max-seq-len 513 is beyond the model's 512 positions",)),
    ({"engine": "trt", "max_seq_len": 31}, PLAIN, ("--max-seq-len 31 is too short", "at least 32")),
    ({"engine": "trt", "max_seq_len": 64, "prefill_chunk": 65}, PLAIN, ("prefill_chunk 65 is beyond --max-seq-len",)),
    ({"engine": "trt", "exit_layer": "1", "prefill_chunk": 511}, PLAIN, ("prefill_chunk 511 is too short",
     "at least 512, or --exit-layer none")),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "model", "parts"), WRONG, ids=str)
def test_wrong_usage_is_refused(asked: Asked, model: ModelFacts | None, parts: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as refusal:
        settled(asked, model)
    assert all(part in str(refusal.value) for part in parts), refusal.value


def test_an_engine_that_has_linear_layers_alone() -> None:
    """As an engine of another package has, unless it says more."""

    def linear(engine: str, provider: str) -> Capabilities:
        return dataclasses.replace(capabilities_of(engine, provider), kinds=LINEAR_KINDS)

    assert_settled(settle({"model": "m"}, linear), {"exit_layer": "none", "fit": "distilled"})
    with pytest.raises(UsageError, match="--exit-layer is for engines whose decoders hold predicted KV"):
        settle({"model": "m", "exit_layer": "1"}, linear)
    with pytest.raises(UsageError, match="m has layers of kind predicted_kv, which engine ort does not run"):
        settle({"model": "m"}, linear, KEYS)


@pytest.mark.parametrize(("asked", "model", "parts"), UNFIT, ids=str)
def test_a_value_that_does_not_fit_is_refused(asked: Asked, model: ModelFacts | None, parts: tuple[str, ...]) -> None:
    with pytest.raises(NblError) as refusal:
        settled(asked, model)
    assert not isinstance(refusal.value, UsageError)
    assert all(part in str(refusal.value) for part in parts), refusal.value


def test_a_value_that_fits_is_accepted() -> None:
    """The largest and smallest that do."""
    for asked in (
        {"context": 512}, {"layers": "0-1"}, {"tap": "normed"},
        {"depths": (500,), "generate_tokens": 12, "prompt_tokens": 16},
        {"engine": "trt", "max_seq_len": 512, "depths": (0, 384)},
        {"engine": "trt", "max_seq_len": 32, "prefill_chunk": 32},
        {"engine": "trt", "exit_layer": "1", "prefill_chunk": 512}, {"engine": "trt-rtx", "exit_layer": "2",
         "max_seq_len": 64},
    ):  # fmt: skip
        settled({"depths": (0,), **asked}, PLAIN)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"tap": "side"}, "key tap is residual or normed, not 'side'"),
        ({"fit": "lora"}, "--fit is independent, distilled, drop, not 'lora'"),
        ({"maps": "quadratic"}, "key maps is affine or linear, not 'quadratic'"),
        ({"compute_dtype": "half"}, "key compute_dtype is auto, float32, bfloat16, not 'half'"),
        ({"logits": "some"}, "key logits is last or all, not 'some'"),
        ({"select": "best"}, "key select is cca or efficient, not 'best'"),
        ({"repetitions": 0}, "repetitions must be at least 1"),
        ({"threads": 1025}, "--threads is 1024 at most"),
        ({"label_weight": 1.5, "fit": "distilled"}, "key label_weight is 1 at most"),
        ({"distill_minutes": 0.0, "fit": "distilled"}, "--distill-minutes is more than 0"),
    ],
)
def test_an_impossible_value_is_refused(asked: Asked, said: str) -> None:
    with pytest.raises(UsageError, match=f"^{said}"):
        settled(asked)


# -- names and values ---------------------------------------------------------------------------------------------


def test_names_and_values_are_read_alike() -> None:
    asked = {"layers": 8, "depth": "0,16", "prompt-tokens": 32, "calibration": "a.txt", "precision": "FP16"}
    found = {
        "layers": "8", "depths": (0, 16), "prompt_tokens": (32,), "calibration": ("a.txt",), "precision": "fp16",
    }  # fmt: skip
    assert read_asked(asked) == read_asked(found) == found
    assert read_asked({"max_perplexity_increase": 0.05}) == {"max_perplexity_increase": "5%"}
    with pytest.raises(UsageError, match=r"5: write a share below 1 \(0.05\) or a percentage"):
        read_asked({"max_perplexity_increase": 5})
    for page in ("https://huggingface.co/org/m-1.5B", "https://hf.co/org/m-1.5B/tree/main?x=1"):
        assert read_asked({"model": page}) == {"model": "org/m-1.5B"}
    paths = {"model": Path("m"), "calibration": [Path("a.txt"), "b.txt"], "quantized_model": Path("q")}
    assert read_asked(paths) == {"model": "m", "calibration": ("a.txt", "b.txt"), "quantized_model": "q"}
    assert read_asked({"calibration": Path("a.txt")}) == {"calibration": ("a.txt",)}
    for page in ("datasets/org/m", "../../etc", "./models", "-x/y"):
        assert read_asked({"model": f"https://huggingface.co/{page}"})["model"] == f"https://huggingface.co/{page}"


def test_a_page_of_the_hub_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is a page of the hub, and org/m is a path here"):
        hub_id("https://huggingface.co/org/m")
    with pytest.raises(UsageError, match="precison is no option; did you mean precision"):
        settled({"precison": "fp16"})
    with pytest.raises(UsageError, match="'label_weight' is of the wrong kind"):
        settled({"label_weight": "much"})
    with pytest.raises(UsageError, match=r"^--prompt-tokens '0,x': write numbers of at least 1, comma separated"):
        numbers("0,x", "prompt_tokens")
