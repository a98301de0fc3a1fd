"""Expected memory: the allocations of a few tokens, scaled to a batch, against those of the batch itself."""

from __future__ import annotations

import logging
import mmap
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fusion.data.batches import EpochBatches, LengthBatches, TaskBatches, TokenBatches
from fusion.data.encode import EncodedRows
from fusion.data.loaders import PlannedBatches, largest_batch
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.training import fit
from fusion.training.memory import (
    Allocations,
    allocations,
    available,
    expected_memory,
    in_bytes,
    peak_memory,
    reset_peak,
    resident,
)
from tests.backbones.tiny_models import HIDDEN, tiny_backbone
from tests.bench import Bench, trainer_config
from tests.tiny_backbone import save_backbone

CPU = torch.device("cpu")


def test_allocations_and_releases_by_hand() -> None:
    linear = nn.Linear(4, 6)
    with Allocations(tokens=5) as recorded:
        x = torch.zeros(1, 5, 4)  # 80 bytes, grows with the tokens
        y = linear(x)  # 120
        scores = y @ y.transpose(1, 2)  # 100, grows with their square
        del y, x
        total = scores.sum()  # 4
        del scores, total
    assert recorded.events[:4] == [(80, 1), (120, 1), (100, 2), (4, 0)]
    assert sum(size for size, _ in recorded.events) == 0
    assert recorded.peak(1, 5) == 80 + 120 + 100 + 4
    assert recorded.peak(3, 10) == 3 * (160 + 240 + 400) + 4


def model_of(name: str, fused: bool = False, checkpointing: bool = False) -> AdaptedModel:
    backbone = tiny_backbone(name)
    backbone.model.float()
    stack = list(backbone.family.stacks)[-1]
    modules = {}
    for layer in (0, 2):
        adapters = [BottleneckAdapter(HIDDEN, 4, "gelu") for _ in range(3)]
        address = f"{stack}.{layer}.feedforward" if stack else f"{layer}.feedforward"
        modules[address] = AdapterFusion(AdapterBank(adapters, range(3), 3)) if fused else adapters[0]
    return AdaptedModel(backbone, modules, "output", TaskHead(HIDDEN, 3, "mean"), gradient_checkpointing=checkpointing)


def peak_of_a_step(model: AdaptedModel, sequences: int, tokens: int) -> int:
    ids = torch.randint(5, 40, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    with Allocations(tokens=10**9 + 7) as recorded:
        torch.autograd.grad(model.train()(ids, mask).sum(), list(model.trainable().values()))
    return recorded.peak(1, 1)


@pytest.mark.parametrize("name", ["bert", "distilbert", "mpnet", "gpt2", "llama", "modernbert"])
def test_the_estimate_is_the_peak_of_a_real_batch(name: str) -> None:
    model = model_of(name)
    recorded = allocations(model)
    for shape in ((1, 50), (16, 24), (40, 8), (4, 60)):
        assert recorded.peak(*shape) == pytest.approx(peak_of_a_step(model, *shape), rel=0.08), shape


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fusion_and_recomputed_layers(checkpointing: bool) -> None:
    model = model_of("bert", fused=True, checkpointing=checkpointing)
    # Few tokens are multiplied in another order.
    assert allocations(model).peak(32, 50) == pytest.approx(peak_of_a_step(model, 32, 50), rel=0.15)
    if checkpointing:
        assert allocations(model).peak(32, 50) < 0.7 * allocations(model_of("bert", fused=True)).peak(32, 50)


def test_the_estimate_has_no_side_effects() -> None:
    model = model_of("bert").eval()
    before, state = model.frozen_hashes(), torch.get_rng_state()
    allocations(model)
    assert torch.equal(torch.get_rng_state(), state) and model.frozen_hashes() == before
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_parts_of_the_expected_memory() -> None:
    model = model_of("bert")
    own = sum(parameter.nbytes for parameter in model.trainable().values())
    everything = sum(tensor.nbytes for tensor in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    expected = expected_memory(model, (8, 20), CPU, overhead=1.5)
    assert (expected.trainable, expected.optimizer) == (own, 2 * own)
    assert expected.backbone == pytest.approx(everything - own, abs=10_000)  # position ids are not in the state
    assert expected.activations == pytest.approx(1.5 * allocations(model).peak(8, 20), abs=1)
    assert expected.total == expected.process + expected.optimizer + expected.activations
    on_gpu = expected_memory(model, (8, 20), torch.device("cuda"), overhead=1.5)
    assert on_gpu.process == 0 and on_gpu.activations == allocations(model).peak(8, 20)
    assert on_gpu.total == on_gpu.backbone + own + on_gpu.optimizer + on_gpu.activations
    text = r"[\d.]+ [MG]B: process [\d.]+ [MG]B \(backbone 0.2 MB, trainable 0.0 MB\), optimizer 0.0 MB, activations "
    assert re.fullmatch(text + r"[\d.]+ MB \(8 x 20 tokens\)", str(expected))
    assert (in_bytes(99_000_000), in_bytes(1_234_000_000)) == ("99.0 MB", "1.23 GB")


def test_the_peak_is_measured_from_its_reset_on() -> None:
    with mmap.mmap(-1, 400_000_000) as block:  # the allocator would keep it
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        high = peak_memory(CPU)
    reset_peak(CPU)
    assert high - peak_memory(CPU) > 300e6
    assert resident() < peak_memory(CPU) + 10e6 < (available(CPU) or 0)


class Rows:
    """Lengths and numbers of sequences of examples, as `EncodedRows` has them."""

    shape: Any = EncodedRows.shape

    def __init__(self, lengths: list[int], counts: list[int] | None = None) -> None:
        self.lengths, self.choice_counts = np.array(lengths), None if counts is None else np.array(counts)


def test_the_largest_batch() -> None:
    short, choices = Rows([9, 3, 8, 4, 5, 7, 6]), Rows([10, 20, 30], [2, 3, 4])

    def largest(tasks: Sequence[Rows], sampler: EpochBatches, batches: int | None = None) -> tuple[int, int]:
        return largest_batch(DataLoader(PlannedBatches(cast(Any, tasks)), sampler=sampler, batch_size=None), batches)

    assert largest([short], LengthBatches(short.lengths, 3, seed=0)) == (3, 8)  # of 3 to 5, 6 to 8, and 9 tokens
    assert largest([choices], LengthBatches(choices.lengths, 2, seed=0)) == (4, 30)
    assert largest([choices], TokenBatches(choices.lengths, choices.choice_counts, 70, seed=0)) == (4, 30)
    own = [LengthBatches(rows.lengths, 1, seed=0) for rows in (short, choices)]
    both = TaskBatches(own, [7, 3], 100.0, seed=0)
    assert largest([short, choices], both) == (4, 30)
    first = next(iter(both))
    expected = (short, choices)[first.task].shape(first.rows)
    assert largest([short, choices], both, batches=1) == expected


def test_it_is_said_before_and_after_the_training(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="fusion")
    monkeypatch.setattr(fit, "available", lambda device: 1000)
    speed = bench.stage1("films")["speed"]
    lines = [line for line in caplog.messages if "memory" in line or "available" in line]
    assert [line.split()[:2] for line in lines] == [["expected", "memory"], ["only", "0.0"], ["peak", "memory"]]
    assert "lower data.batch_size" in lines[1]
    assert speed["expected_memory_bytes"] == pytest.approx(speed["peak_memory_bytes"], rel=0.15)
    blocks = [torch.ones(1_000_000) for _ in range(100)]  # 400 MB, which an earlier job of a sweep has freed
    del blocks
    again = bench.stage1("films", name="second")["speed"]
    assert again["expected_memory_bytes"] < speed["expected_memory_bytes"] + 100e6
    assert again["peak_memory_bytes"] < speed["peak_memory_bytes"] + 100e6
    caplog.clear()
    monkeypatch.setattr(fit, "expected_memory", None)
    bench.stage1("films", name="again", trainer=trainer_config(max_epochs=1))
    assert "expected memory unknown ('NoneType' object is not callable)" in caplog.messages


MEASURE = """
import sys
import torch
from fusion.backbones.load import load_backbone
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.runs.memory import GLIBC_OVERHEAD, keep_freed_memory
from fusion.training.memory import expected_memory, peak_memory, reset_peak

overhead = GLIBC_OVERHEAD if keep_freed_memory() else 1.0
backbone, cpu = load_backbone(sys.argv[1]), torch.device("cpu")
adapters = {f"{layer}.feedforward": BottleneckAdapter(384, 24) for layer in range(6)}
model = AdaptedModel(backbone, adapters, "normed", TaskHead(384, 2, "mean")).train()
optimizer = torch.optim.AdamW(model.trainable().values(), fused=True)
expected = expected_memory(model, (32, 128), cpu, overhead=overhead)
reset_peak(cpu)
ids = torch.randint(5, 25, (32, 128))
mask = torch.ones_like(ids)
mask[0, -5:] = 0
for step in range(4):
    optimizer.zero_grad()
    model(ids, mask).sum().backward()
    optimizer.step()
print(expected.total / peak_memory(cpu), expected.activations / expected.total)
"""


@pytest.mark.slow
def test_the_expected_memory_is_that_of_the_process(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "intermediate_size": 1536,
        "num_attention_heads": 12,
    }
    folder = save_backbone(tmp_path / "large", max_position_embeddings=160, **sizes)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, check=True, text=True)
    ratio, share = map(float, done.stdout.split())
    assert abs(ratio - 1) < 0.15 and share > 0.4
