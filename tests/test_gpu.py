"""On a GPU: the results of the CPU, in float32 and in half precision, compiled and not, and its memory.

All of these are skipped without one, which the summary of the tests says.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fusion.backbones.layer_calls import compile_layers
from fusion.backbones.load import load_backbone
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.training.memory import expected_memory, peak_memory, reset_peak
from pipelines.benchmark import suites
from pipelines.benchmark.config import BenchmarkConfig
from tests.bench import Bench, trainer_config
from tests.tiny_backbone import save_backbone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED: no CUDA device")
GPU = "cuda"


def model_on(device: str, folder: Path, dtype: str, fused: bool) -> AdaptedModel:
    backbone = load_backbone(str(folder), dtype=dtype)
    width = backbone.hidden_size
    torch.manual_seed(0)
    modules = {}
    for layer in range(backbone.layers):
        adapters = [BottleneckAdapter(width, width // 16) for _ in range(4)]
        for parameter in nn.ModuleList(adapters).parameters():
            nn.init.normal_(parameter, std=0.05)
        modules[f"{layer}.feedforward"] = AdapterFusion(AdapterBank(adapters, range(4), 4)) if fused else adapters[0]
    return AdaptedModel(backbone, modules, "normed", TaskHead(width, 3, "mean")).to(device)


def logits_and_gradients(model: AdaptedModel, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 25, (8, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:3, 10:] = 0
    logits = model.train()(ids.to(device), mask.to(device))
    found = torch.autograd.grad(logits.float().logsumexp(-1).sum(), list(model.trainable().values()), allow_unused=True)
    return logits.float().cpu(), torch.cat([g.flatten().cpu() for g in found if g is not None])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("fused", [False, True], ids=["adapter", "fusion"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.05), ("float16", 0.02)])
def test_the_results_are_those_of_the_cpu(
    tiny_backbone: Path, dtype: str, tolerance: float, fused: bool, compiled: bool
) -> None:
    expected = logits_and_gradients(model_on("cpu", tiny_backbone, "float32", fused), "cpu")
    model = model_on(GPU, tiny_backbone, dtype, fused)
    if compiled:
        compile_layers(model._layers_of(""))
    for found, exact in zip(logits_and_gradients(model, GPU), expected, strict=True):
        assert (found - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_expected_memory_is_the_peak(tmp_path: Path, dtype: str) -> None:
    sizes = {"num_hidden_layers": 4, "intermediate_size": 1024, "num_attention_heads": 4}
    folder = save_backbone(tmp_path / "large", "bert", hidden_size=256, max_position_embeddings=160, **sizes)
    model = model_on(GPU, folder, dtype, fused=False).train()
    optimizer = torch.optim.AdamW(model.trainable().values(), fused=True)
    device = torch.device(GPU, torch.cuda.current_device())
    expected = expected_memory(model, (64, 128), device)
    reset_peak(device)
    ids = torch.randint(5, 25, (64, 128), device=GPU)
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, mask).float().sum().backward()
        optimizer.step()
    assert expected.total == pytest.approx(peak_memory(device), rel=0.15)
    frozen = sum(parameter.nbytes for parameter in model.backbone.parameters())
    assert frozen * (1 if dtype == "float32" else 2) == pytest.approx(
        sum(4 * parameter.numel() for parameter in model.backbone.parameters())
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_both_stages_train_in_bfloat16(bench: Bench, compiled: bool) -> None:
    from fusion.config.model import BackboneConfig

    settings = {
        "trainer": trainer_config(accelerator="gpu", devices=1),
        "backbone": BackboneConfig(name_or_path=str(bench.backbone), pooling="mean", dtype="bfloat16"),
        "compile": compiled,
    }
    for task in ("films", "books"):
        speed = bench.stage1(task, **settings)["speed"]
        assert speed["expected_memory_bytes"] > 0 and speed["peak_memory_bytes"] > 0
    bench.stage2("films", ["films", "books"], **settings)
    manifest = json.loads((bench.folder / "store" / "films-adapterfusion" / "manifest.json").read_text())
    assert manifest["backbone"]["dtype"] == "bfloat16"
    stored = manifest["metrics"]["validation"]["accuracy"]
    assert bench.evaluate("films-adapterfusion")["metrics"]["validation"]["accuracy"] == pytest.approx(stored, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["train", "infer", "memory"])
def test_the_benchmark_runs_on_it(tmp_path: Path, suite: str) -> None:
    from fusion.config.model import BackboneConfig

    backbone = BackboneConfig("sentence-transformers/all-MiniLM-L6-v2")
    config = BenchmarkConfig(suite=suite, device=GPU, rounds=2, steps=2, output=str(tmp_path), backbone=backbone)
    content = json.loads(suites.measure(config).read_text())
    assert content["figures"]
