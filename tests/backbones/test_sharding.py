"""Sharded frozen weights in two processes: outputs and gradients of every family are those of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from fusion.backbones.sharding import is_sharded, own_shard, shard
from fusion.backbones.slots import SlotAddress
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from tests.backbones.tiny_models import HIDDEN, IDS, LAYERS, MASK, SETTINGS, tiny_backbone

PROCESSES = 2
# A model of each block layout also recomputes its layers.
CASES = [
    *((name, False) for name in SETTINGS),
    *((name, True) for name in ("bert", "llama", "gemma3_text", "gptj", "t5")),
]


def adapted(name: str, checkpointing: bool) -> AdaptedModel:
    backbone = tiny_backbone(name)
    torch.manual_seed(1)
    slots = {
        str(SlotAddress(stack, layer, "feedforward")): BottleneckAdapter(HIDDEN, 4, "relu")
        for stack in backbone.family.stacks
        for layer in range(LAYERS)
    }
    head = TaskHead(HIDDEN, 2, dropout=0.0, pooling="mean")
    model = AdaptedModel(backbone, slots, "normed", head, gradient_checkpointing=checkpointing).double()
    for parameter in model.trainable().values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def outcome(model: AdaptedModel) -> list[torch.Tensor]:
    """Logits of an evaluation, then logits and gradients of a training step."""
    model.eval()
    with torch.no_grad():
        evaluated = model(IDS, MASK)
    logits = model.train()(IDS, MASK)
    gradients = torch.autograd.grad(logits.sin().sum(), list(model.trainable().values()))
    return [evaluated, logits.detach(), *gradients]


def compare(name: str, checkpointing: bool) -> None:
    """Raise an error if the sharded model differs from the whole one."""
    model = adapted(name, checkpointing)
    whole, hashes, state = outcome(model), model.frozen_hashes(), model.backbone.state_dict()
    weights = dict(model.backbone.named_parameters())
    trained = set(model.trainable().values())
    shard(model.backbone, model.layers(), trained, "cpu", PROCESSES)
    for found, expected in zip([*outcome(model), *outcome(model)], [*whole, *whole], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert model.frozen_hashes() == hashes
    assert model.backbone.state_dict().keys() == state.keys()
    now = dict(model.backbone.named_parameters())
    assert all(is_sharded(parameter) for parameter in now.values())
    assert not any(is_sharded(parameter) for parameter in trained)
    # A dimension of 3 rows is shared as 2 and 1.
    assert all(own_shard(now[n]).shape[0] <= -(-p.shape[0] // PROCESSES) for n, p in weights.items())


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    found = dict.fromkeys(CASES, "")
    for case in CASES:
        try:
            compare(*case)
        except Exception as error:  # the next model is tried as well
            found[case] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("shards")
    multiprocessing.spawn(work, (folder,), PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_sharded_equals_whole(name: str, checkpointing: bool, found: list[Any]) -> None:
    assert [of_rank[name, checkpointing] for of_rank in found] == [""] * PROCESSES
