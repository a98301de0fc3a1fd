"""The optimizer: fused or not, the same training."""

from __future__ import annotations

from pathlib import Path

import torch

from fusion.backbones.load import load_backbone
from fusion.config import OptimConfig
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model import AdaptedModel
from fusion.training.module import adamw

OPTIM = OptimConfig(lr=1e-3, head_lr=5e-3, weight_decay=0.1)


def small_model(folder: Path) -> AdaptedModel:
    torch.manual_seed(0)
    fillings = {f"{layer}.feedforward": BottleneckAdapter(32, 4) for layer in range(3)}
    return AdaptedModel(load_backbone(str(folder)), fillings, "normed", TaskHead(32, 2, dropout=0.0))


def train(folder: Path, fused: bool, steps: int = 50) -> tuple[AdaptedModel, list[float]]:
    model = small_model(folder).train()
    optimizer = adamw(model, OPTIM, fused)
    assert all(group["fused"] == fused for group in optimizer.param_groups)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        ids = torch.randint(5, 20, (8, 12), generator=draw)
        labels = (ids > 12).sum(1) % 2
        loss = torch.nn.functional.cross_entropy(model(ids, torch.ones_like(ids)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def test_the_fused_optimizer_trains_as_the_plain_one(tiny_backbone: Path) -> None:
    (plain, plain_losses), (fused, fused_losses) = (train(tiny_backbone, how) for how in (False, True))
    torch.testing.assert_close(torch.tensor(fused_losses), torch.tensor(plain_losses), rtol=1e-5, atol=0)
    for name, weights in plain.trainable().items():
        difference = (fused.trainable()[name] - weights).norm() / weights.norm()
        assert difference < 1e-5, name


def test_rates_and_decay_by_group(tiny_backbone: Path) -> None:
    model = small_model(tiny_backbone)
    names = {id(parameter): name for name, parameter in model.trainable().items()}
    seen: dict[str, tuple[float, float]] = {}
    for group in adamw(model, OPTIM).param_groups:
        seen |= {names[id(p)]: (group["lr"], group["weight_decay"]) for p in group["params"]}
    assert seen["head.output.weight"] == (5e-3, 0.1)
    assert seen["head.output.bias"] == (5e-3, 0.0)
    assert seen["fillings.0.feedforward.down.weight"] == (1e-3, 0.1)
    assert seen["fillings.0.feedforward.up.bias"] == (1e-3, 0.0)
    assert set(seen) == set(model.trainable())
