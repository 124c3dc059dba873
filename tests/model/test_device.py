"""--device: which device is chosen, and that every stage of torch runs on it. The GPU is a stand-in (`fake_cuda`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.distill.training import DistillSettings, distill
from nbl_export.methods.linear import collect
from nbl_export.methods.linear.greedy import Judge, Search
from nbl_export.methods.losses import PartialReplacement
from nbl_export.methods.sums import Accumulator, sums_bytes
from nbl_export.methods.sums_file import open_sums
from nbl_export.model import device, mapped
from nbl_export.model.mapped import float32_bytes, layer_bytes
from nbl_export.publish.convert import open_finished
from nbl_export.report import page
from nbl_export.run import pipeline
from nbl_export.run.progress import Ui
from nbl_export.verify import exporter

from ..command import TINY, assert_refused, keys, nbl
from ..fake_cuda import GPU, OnGpu, fake_cuda
from ..jobs import until
from ..tiny import VOCAB, random_map

pytestmark = pytest.mark.job

Checkpoint = Callable[[str], Path]
IDS = torch.randint(2, VOCAB, (4, 48), generator=torch.Generator().manual_seed(0))
ROW = tuple(IDS[0].tolist())
MAPS: dict[int, Mixer] = {i: random_map(i) for i in (1, 2)}


def quiet(*_: object) -> None: ...


# -- what each stage computes ----------------------------------------------------------------------------------


def collected(model: Any, _directory: Path, scratch: Path) -> Any:
    """Moments, of which the second half of the batches is added to restored sums."""
    parts, taps = IDS.split(2), ("residual", "normed")
    found = []
    with collect.Collection(model, taps) as half:
        half.refer(IDS)
        half.add(parts[0])
        half.save(scratch / "sums", {"identity": {"batches": 2}, "done": 1})
    with collect.Collection(model, taps) as whole:
        whole.restore(open_sums(scratch / "sums", whole=False))
        whole.add(parts[1])
        found = [whole.layer(i)[tap] for i in range(whole.num_layers) for tap in taps]
    return [(sums.xx, sums.yx, sums.yy, sums.x_sum, sums.y_sum) for sums in found]


def by_layer(model: Any, directory: Path, scratch: Path) -> Any:
    with collect.Collection(mapped.mapped_model(directory, model.device), ["residual"]) as found:
        found.by_layer(IDS, scratch / "sums", {"identity": {"batches": 1}, "done": 1}, scratch, quiet)
    file = open_sums(scratch / "sums")
    layers = [collect.read_sums(file, layer, "residual") for layer in range(found.num_layers)]
    return [(sums.xx, sums.yx) for sums in layers]


def losses(model: Any, _directory: Path, _scratch: Path) -> Any:
    switched = PartialReplacement(model, MAPS, "residual")
    return [vars(loss) for loss in switched.quality_losses(IDS, {"both": (1, 2), "one": (2,)}).values()]


def ordered(model: Any, _directory: Path, _scratch: Path) -> Any:
    switched = PartialReplacement(model, {i: random_map(i) for i in range(3)}, "residual")
    steps = Search(Judge(switched, (IDS[:2], IDS[2:])), (), lambda _gone: 1.0, quiet).extend(2)
    return [[point.layers, point.kl, point.rises] for point in steps]


def distilled(model: Any, _directory: Path, _scratch: Path) -> Any:
    settings = DistillSettings(steps=4, batch_tokens=48, check_every=2, window=16)
    found = distill(model, MAPS, "residual", IDS[:3], IDS[3:], settings)
    return found.train_kl, [kl for _, kl in found.held_kl], found.maps[1].tensors()["bias"]


def referred(model: Any, _directory: Path, _scratch: Path) -> Any:
    """Logits that verification compares the original graph with."""
    return exporter.row_logits(model, ROW), exporter.row_logits(model, ROW, np.array([0, 2]))


WORK = (collected, by_layer, losses, ordered, distilled, referred)


def numbers(value: Any) -> list[Any]:
    """The numbers of nested values, in order. A tensor on the GPU raises TypeError."""
    if isinstance(value, dict):
        return numbers(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [number for part in value for number in numbers(part)]
    assert not isinstance(value, OnGpu), "a result stayed on the GPU"
    return np.asarray(value, np.float64).ravel().tolist()


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_a_gpu_computes_what_the_cpu_does(work: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = checkpoint("llama")
    expected = numbers(work(load_model(directory), directory, tmp_path))
    with fake_cuda() as gpu:
        found = numbers(work(load_model(directory).to(GPU), directory, tmp_path))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5)
    assert gpu.products <= {GPU}


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    with fake_cuda():
        x = torch.ones(2, 2).to(GPU)
        assert (x + torch.tensor(1.0)).device == GPU and x[torch.tensor([0])].tolist() == [[1.0, 1.0]]
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(3)[torch.tensor([0]).to(GPU)]
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device=GPU, generator=torch.Generator())
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()


# -- the choice ------------------------------------------------------------------------------------------------


def test_the_gpu_is_taken_if_the_work_fits_into_its_free_memory() -> None:
    cpu = torch.device("cpu")
    with fake_cuda(free=1000):
        assert device.choose_device("auto", 600) == device.choose_device("cuda", 600) == GPU
        assert device.choose_device("auto", 601) == device.choose_device("cuda", 601) == cpu
        assert device.choose_device("cpu", 0) == cpu
        assert device.describe_device(GPU) == "Fake GPU (CUDA)"
    assert device.describe_device(cpu) == "CPU"


def test_without_a_gpu_only_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose_device("auto", 0).type == "cpu"
    for version, why in ((None, "built without CUDA"), ("13.0", "torch sees no GPU")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(NblError, match=rf"--device cuda: .*{why}.*; use --device cpu"):
            device.choose_device("cuda", 0)


def test_cpu_never_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "is_available")
    assert device.choose_device("cpu", 0).type == "cpu"


def test_bytes_are_those_of_what_is_loaded(checkpoint: Checkpoint) -> None:
    directory = checkpoint("llama")
    decoder = load_model(directory).get_decoder()
    sizes = [sum(4 * p.numel() for p in layer.parameters()) for layer in decoder.layers]
    assert layer_bytes(directory) == max(sizes) + 4 * decoder.embed_tokens.weight.numel() < float32_bytes(directory)
    found = Accumulator()
    found.update(torch.randn(20, 6), torch.randn(20, 6))
    kept = vars(found.sums()).values()
    assert sums_bytes(6) == sum(t.nbytes for t in kept if torch.is_tensor(t) and t.dim() == 2)


# -- jobs ------------------------------------------------------------------------------------------------------


def facts(run: Path) -> Any:
    return json.loads((run / "nbl.json").read_text(encoding="utf-8"))


def free_for(checkpoint: Path, whole: float, sums: bool = False) -> int:
    """Free bytes that a share of the weights just needs, sums of both taps included or not."""
    added = 3 * sums_bytes(96) if sums else 0
    return int((whole * float32_bytes(checkpoint) + added) / 0.6) + 1


def test_a_job_runs_on_the_gpu_and_says_so(checkpoint: Checkpoint, text: Path, tmp_path: Path) -> None:
    asked = ("--model", checkpoint("llama"), "--calibration", text, *TINY, "--output", tmp_path / "run")
    with until("verify"):
        with fake_cuda() as gpu:
            done = nbl(*asked, "--device", "cuda")
        assert done.status == 0, done.err
        assert done.err.count("torch computes on Fake GPU (CUDA)") == 1 and gpu.products == {GPU}
        done = nbl(*asked, "--device", "cpu")  # the device is in no stage's key
    assert done.status == 0 and done.err.count(": reused") == 6, done.err
    noted = facts(tmp_path / "run")
    assert noted["torch_device"] == noted["calibration"]["device"] == "Fake GPU (CUDA)"
    page.render(noted, json.loads((tmp_path / "run" / "verify.json").read_text(encoding="utf-8")), None, tmp_path)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "torch ran on" in report and "calibration ran on" in report and "Fake GPU" in report


@pytest.mark.parametrize(
    ("share", "sums", "said", "where"),
    [
        (1.0, True, "torch computes on Fake GPU (CUDA)", "Fake GPU (CUDA)"),
        (1.0, False, "one layer at a time on Fake GPU (CUDA): the GPU has too little memory", "Fake GPU (CUDA)"),
        (0.1, False, "the torch model is on the CPU: its weights are", "CPU"),
    ],
)
def test_layers_go_through_a_gpu_that_is_too_small(
    share: float, sums: bool, said: str, where: str, checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    directory = checkpoint("llama")
    asked = ("calibrate", "--model", directory, "--calibration", text, "--calibration-tokens", 512, *keys(context=64))
    with fake_cuda(free_for(directory, share, sums)) as gpu:
        done = nbl(*asked, "--output", tmp_path / "run")
    assert done.status == 0 and said in done.err, done.err
    assert ("one layer at a time" in done.err) == ("one layer at a time" in said)
    assert facts(tmp_path / "run")["calibration"]["device"] == where
    assert gpu.products == {torch.device("cpu") if where == "CPU" else GPU}


def test_cuda_is_refused_before_any_work(checkpoint: Checkpoint, text: Path, run: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a GPU here")
    asked = ("--model", checkpoint("llama"), "--calibration", text, "--output", tmp_path / "new", "--device")
    assert_refused(nbl(*asked, "cuda"), 1, "--device cuda: ", "use --device cpu")
    assert not (tmp_path / "new").exists()
    assert_refused(nbl(*asked, "gpu"), 2, "--device is auto, cpu, cuda, not 'gpu'")
    (run / "verify.json").unlink()
    assert_refused(nbl("verify", run, "--device", "cuda"), 1, "--device cuda: ", "use --device cpu")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "the GPU has too little memory"),
        (RuntimeError("CUDA error: unspecified launch failure\nCompile with ..."), "CUDA error: unspecified launch"),
    ],
)
def test_a_gpu_that_fails_ends_with_one_sentence_and_finished_stages_stay(
    error: RuntimeError, said: str, checkpoint: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    asked = ("--model", checkpoint("llama"), "--calibration", text, *TINY, "--layers", 1, "--output", tmp_path / "run")
    with until("plan"), fake_cuda():
        with monkeypatch.context() as patch:
            patch.setattr(PartialReplacement, "run", failing)
            done = nbl(*asked)
        assert_refused(done, 1, f"plan: {'the GPU failed (' if 'unspec' in said else ''}{said}", "--device cpu")
        done = nbl(*asked, "--device", "cpu")
    assert done.status == 0 and "calibrate: reused" in done.err, done.err


def test_forms_are_made_on_the_cpu(run: Path) -> None:
    with fake_cuda(), open_finished(run, Ui(quiet=True)) as job:
        assert job.model.value.device.type == "cpu"


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error 700: illegal access"])
def test_an_engine_is_not_sent_to_the_cpu_by_the_option_of_torch(said: str) -> None:
    with (
        pytest.raises(NblError, match=r"^bench: the GPU .*nvidia-smi") as caught,
        device.guarded("bench", by_engine=True),
    ):
        raise RuntimeError(said)
    assert "--device" not in str(caught.value)
    assert {stage.name for stage in pipeline.STAGES if stage.by_engine} == {"build", "bench"}


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="a defect"), device.guarded("plan"):
        raise RuntimeError("a defect")
