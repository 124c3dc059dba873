"""bench/peers: who takes part and who is absent, rounds that interleave, files of other weight types, verdicts."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PEERS = Path(__file__).parents[2] / "bench" / "peers"

FAKE = """
import sys
sys.path.insert(0, {peers!r})
from protocol import Decoder, serve

class Fake(Decoder):
    def __init__(self, config):
        if config["fails"] == "load":
            raise RuntimeError("no such instruction")
        self.config, self.held, self.tests = config, [], 0
        self.facts = {{"weight_bits": 32, "bits_per_weight": 32.0}}

    def start(self, ids, room):
        self.held = list(ids)

    def append(self, ids):
        print("chatter of a library")
        self.held += ids

    def best(self):
        return len(self.held)

    def time(self, kind, depth_ids, ids):
        super().time(kind, depth_ids, ids)
        self.tests += 1
        if self.config["fails"] == "die" and self.tests == 3:
            sys.exit(7)
        with open(self.config["log"], "a") as log:
            log.write(f"{{self.config['model']}} {{kind}}{{len(ids)}}@{{len(depth_ids)}}\\n")
        assert self.held == [*depth_ids, *ids]
        return 1000

serve(Fake)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver module; its neighbours are found beside it, as when it is run as a script."""
    monkeypatch.syspath_prepend(str(PEERS))
    import run as driver

    yield driver
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(PEERS))]:
        del sys.modules[name]


def drive(peers: Any, run: Path, scratch: Path, fails: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two rounds among fakes of these names; returns the results and the order in which tests ran."""
    from contenders import Contender

    script, log = scratch / "fake.py", scratch / "log"
    script.write_text(FAKE.format(peers=str(PEERS)), encoding="utf-8")
    config = {"log": str(log)}
    fakes = [
        Contender(name, "nbl-export", "fp32", (sys.executable, str(script)), {**config, "model": name, "fails": how})
        for name, how in fails.items()
    ]
    monkeypatch.setattr(peers, "contenders", lambda request: fakes)
    options = argparse.Namespace(
        directories=[run], gguf=[], gguf_types=[], peers=[], cache=scratch, threads=1, rounds=2, prompt=[6],
        generate=3, depth=4, pause=0.0, timeout=60.0, seed=0,
    )  # fmt: skip
    return peers.measure(options, None), log.read_text(encoding="utf-8").split("\n")[:-1]


def test_rounds_interleave(peers: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, order = drive(peers, run, tmp_path, {"a/model": "", "b": ""}, monkeypatch)
    assert order == ["a/model pp6@0", "b pp6@0", "a/model tg3@4", "b tg3@4"] * 3  # a warm-up and two rounds
    assert [len(t["tokens_per_second"]) for t in result["timings"]] == [2] * 4
    assert {t["tokens_per_second_median"] for t in result["timings"]} == {6e6, 3e6}
    assert [a["verdict"] for a in result["against"]] == ["too few rounds"] * 2
    assert result["absent"] == [] and result["contenders"][0]["resident_bytes"] > 1 << 20


def test_who_fails_is_listed_and_the_others_go_on(
    peers: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, _ = drive(peers, run, tmp_path, {"a": "load", "b": "die", "c": ""}, monkeypatch)
    reasons = {a["name"]: a["reason"] for a in result["absent"]}
    assert reasons["a"] == "does not load: RuntimeError: no such instruction"
    assert "pp6 failed: its process ended with status 7" in reasons["b"]
    assert {t["name"] for t in result["timings"]} == {"c"} == {row["name"] for row in result["contenders"]}


def test_a_finished_run_without_peers(finished: Path, tmp_path: Path) -> None:
    """The command itself: our two graphs are measured, every peer is named with the reason why it is not."""
    done = subprocess.run(
        [sys.executable, str(PEERS / "run.py"), str(finished), "--cache", str(tmp_path), "--rounds", "3",
         "--threads", "1", "--prompt", "16", "48", "--generate", "5", "--depth", "16",
         "--peers", "torch", "optimum-onnx", "openvino", "llama-cpp"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads(done.stdout)
    rows = {row["name"]: row for row in result["contenders"]}
    assert set(rows) == {"run/original", "run/model"}
    assert {row["weight_bits"] for row in rows.values()} == {32} and rows["run/model"]["logits"] == "last"
    assert [(t["test"], t["depth"]) for t in result["timings"][:3]] == [("pp16", 0), ("pp48", 0), ("tg5", 16)]
    assert all(len(t["tokens_per_second"]) == 3 for t in result["timings"])
    reasons = {a["peer"]: a["reason"] for a in result["absent"]}
    assert set(reasons) == {"torch", "torch-compile", "optimum-onnx", "openvino", "llama-cpp"}
    assert reasons["torch-compile"] == "left out by --peers" and "setup.py openvino" in reasons["openvino"]
    assert "run/model : run/original" in done.stderr


def test_driver_refuses_what_is_no_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PEERS / "run.py"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "give a finished run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.1, 1.2, 1.3], "ahead"),
        ([0.8, 0.7, 0.9], "behind"),
        ([0.9, 1.2, 1.3], "no difference"),
        ([1.1, 1.2], "too few rounds"),
    ],
)
def test_verdicts_at_equal_bits(peers: Any, ratios: list[float], verdict: str) -> None:
    from table import against

    rows = [{"name": n, "peer": p, "weight_bits": b} for n, p, b in
            (("d/model", "nbl-export", 4), ("llama", "llama-cpp", 4), ("torch", "torch", 32))]  # fmt: skip
    timings = [{"name": n, "test": "pp8", "tokens_per_second": s} for n, s in
               (("d/model", ratios), ("llama", [1.0] * len(ratios)), ("torch", [1.0] * len(ratios)))]  # fmt: skip
    (found,) = against(rows, timings)
    assert (found["other"], found["verdict"], found["ratio_range"]) == ("llama", verdict, [min(ratios), max(ratios)])


def test_gguf_of_another_type(peers: Any, tmp_path: Path) -> None:
    import gguf
    from gguf_types import bits_of_gguf, requantize

    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "source.gguf", "llama")
    writer.add_block_count(3)
    writer.add_token_list(["<s>", "a"])
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(weight, q8_0), raw_dtype=q8_0)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for step in ("header_to_file", "kv_data_to_file", "tensors_to_file"):
        getattr(writer, f"write_{step}")()
    writer.close()
    found = {}
    for kind in ("f32", "f16", "q8_0", "q4_0"):
        requantize(tmp_path / "source.gguf", tmp_path / f"{kind}.gguf", kind)
        reader = gguf.GGUFReader(tmp_path / f"{kind}.gguf")
        matrix, norm = reader.tensors
        found[kind] = (bits_of_gguf(tmp_path / f"{kind}.gguf"), gguf.quants.dequantize(matrix.data, matrix.tensor_type))
        assert (norm.tensor_type.name, matrix.name) == ("F32", "token_embd.weight")
        assert reader.fields["llama.block_count"].contents() == 3
        assert reader.fields["tokenizer.ggml.tokens"].contents() == ["<s>", "a"]
    assert [found[k][0] for k in found] == [(32, 32.0), (16, 16.0), (8, 8.5), (4, 4.5)]
    assert (found["f32"][1] == found["q8_0"][1]).all()  # the source was Q8_0: no second rounding
    assert 0.01 < np.abs(found["q4_0"][1] - weight).max() < 0.5


def test_checkpoint_in_the_words_of_transformers_4(peers: Any, checkpoint: Any, tmp_path: Path) -> None:
    import conversions

    conversions._for_transformers_4(checkpoint("llama"), tmp_path / "plain")
    before = json.loads((checkpoint("llama") / "config.json").read_text(encoding="utf-8"))
    after = json.loads((tmp_path / "plain" / "config.json").read_text(encoding="utf-8"))
    assert after["rope_theta"] == before["rope_parameters"]["rope_theta"] and "rope_parameters" not in after
    tokenizer = json.loads((tmp_path / "plain" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "plain" / "model.safetensors").stat().st_size > 1000
