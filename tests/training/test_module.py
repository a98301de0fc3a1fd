"""The optimizer: fused or not, the same training. Several tasks: each by its own head, loss and metrics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import pytorch_lightning as lightning
import torch

from fusion.backbones.load import load_backbone
from fusion.config import OptimConfig, TaskConfig
from fusion.data.batches import Batch
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.model import AdaptedModel
from fusion.training.module import TaskModule, adamw

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


# --- several tasks ------------------------------------------------------------------------------------

CLASSES = TaskConfig(name="classes", text="t", labels=["a", "b", "c"], metrics=["accuracy", "macro_f1"])
VALUES = TaskConfig(name="values", kind="regression", text="t", metrics=["pearson"])
CHOICE = TaskConfig(name="choice", kind="choice", text="t", choices="c", metrics=["accuracy"])
TASKS = [CLASSES, VALUES, CHOICE]


def several_tasks(folder: Path) -> TaskModule:
    torch.manual_seed(0)
    fillings = {f"{layer}.feedforward": BottleneckAdapter(32, 4) for layer in range(3)}
    outputs = {"classes": 3, "values": 1, "choice": 1}
    heads = TaskHeads({name: TaskHead(32, count) for name, count in outputs.items()})
    model = AdaptedModel(load_backbone(str(folder)), fillings, "normed", heads)
    splits = {
        "classes/validation": CLASSES,
        "classes/more": CLASSES,
        "values/validation": VALUES,
        "choice/validation": CHOICE,
    }
    module = TaskModule(model, TASKS, OPTIM, {}, splits)
    state = SimpleNamespace(fn="fit")
    trainer = SimpleNamespace(world_size=1, sanity_checking=False, current_epoch=0, state=state)
    module.trainer = cast(lightning.Trainer, trainer)
    return module


def a_batch(task: int, rows: int = 4) -> Batch:
    draw = torch.Generator().manual_seed(task)
    counts = torch.tensor([2, 3, 2, 4])[:rows] if task == 2 else None
    sequences = rows if counts is None else int(counts.sum())
    ids = torch.randint(5, 20, (sequences, 6), generator=draw)
    labels = torch.rand(rows, generator=draw) if task == 1 else torch.randint(0, 2, (rows,), generator=draw)
    ones = torch.ones(rows)
    return Batch(ids, torch.ones_like(ids), None, labels, counts, torch.arange(rows), ones, rows, task=task)


def test_each_task_has_its_own_loss_and_reaches_its_own_head(tiny_backbone: Path) -> None:
    module = several_tasks(tiny_backbone).train()
    for number, task in enumerate(TASKS):
        batch = a_batch(number)
        assert batch.labels is not None
        module.zero_grad()
        losses = module.losses(batch)
        hidden = module.model._run(batch.input_ids, batch.attention_mask, None)
        head = cast(TaskHeads, module.model.head).by_task()[str(task.name)]
        scores = hidden[:, 0] @ head.output.weight.T + head.output.bias
        if task.kind == "regression":
            expected = (scores[:, 0] - batch.labels).square().mean()
        elif task.kind == "choice":
            assert batch.choice_counts is not None
            rows = scores[:, 0].split(batch.choice_counts.tolist())
            picked = [-row.log_softmax(0)[label] for row, label in zip(rows, batch.labels, strict=True)]
            expected = torch.stack(picked).mean()
        else:
            expected = -scores.log_softmax(-1)[torch.arange(4), batch.labels].mean()
        assert set(losses) == {"task"}
        torch.testing.assert_close(losses["task"], expected)
        losses["task"].backward()
        for name, parameter in module.model.trainable().items():
            assert parameter.grad is not None, name  # DDP waits for every one
            others_head = name.startswith("head.") and not name.startswith(f"head.heads.{number}.")
            assert bool(parameter.grad.any()) != others_head, name


def test_metrics_of_several_tasks_carry_their_names_and_the_mean_of_the_main_ones(
    tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = several_tasks(tiny_backbone).eval()
    logged: dict[str, Any] = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    for loader, task in enumerate([0, 0, 1, 2]):
        batch = a_batch(task, rows=3 if loader == 1 else 4)
        module.validation_step(batch, 0, loader)
    module.on_validation_epoch_end()
    assert set(logged) == {
        "classes/validation/accuracy", "classes/validation/macro_f1", "classes/more/accuracy",
        "classes/more/macro_f1", "values/validation/pearson", "choice/validation/accuracy", "mean",
    }  # fmt: skip
    names = ("classes/validation/accuracy", "values/validation/pearson", "choice/validation/accuracy")
    assert logged["mean"] == pytest.approx(sum(logged[name] for name in names) / 3)
    assert module.history == [{"epoch": 1, **logged}]
