"""The optimizer; losses and metrics of multiple tasks and processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as lightning
import torch

from fusion.backbones.load import load_backbone
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig
from fusion.data.batches import Batch, SortedBatches
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.model.adapted import AdaptedModel
from fusion.tasks.table import kind_of
from fusion.training.module import Objective, TaskModule, adamw
from fusion.training.predictions import score

OPTIM = OptimConfig(lr=1e-3, head_lr=5e-3, weight_decay=0.1)


def small_model(folder: Path) -> AdaptedModel:
    torch.manual_seed(0)
    slot_modules = {f"{layer}.feedforward": BottleneckAdapter(32, 4) for layer in range(3)}
    return AdaptedModel(load_backbone(str(folder)), slot_modules, "normed", TaskHead(32, 2, dropout=0.0))


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


def test_the_fused_optimizer_matches_the_default_one(tiny_backbone: Path) -> None:
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
    assert seen["slots.0.feedforward.down.weight"] == (1e-3, 0.1)
    assert seen["slots.0.feedforward.up.bias"] == (1e-3, 0.0)
    assert set(seen) == set(model.trainable())


# --- multiple tasks -----------------------------------------------------------------------------------

CLASSES = TaskConfig(name="classes", text="t", labels=["a", "b", "c"], metrics=["accuracy", "macro_f1"])
VALUES = TaskConfig(name="values", kind="regression", text="t", metrics=["pearson"])
CHOICE = TaskConfig(name="choice", kind="choice", text="t", choices="c", metrics=["accuracy"])
TASKS = [CLASSES, VALUES, CHOICE]


def several_tasks(folder: Path) -> TaskModule:
    torch.manual_seed(0)
    slot_modules = {f"{layer}.feedforward": BottleneckAdapter(32, 4) for layer in range(3)}
    outputs = {"classes": 3, "values": 1, "choice": 1}
    heads = TaskHeads({name: TaskHead(32, count) for name, count in outputs.items()})
    model = AdaptedModel(load_backbone(str(folder)), slot_modules, "normed", heads)
    splits = {
        "classes/validation": CLASSES,
        "classes/more": CLASSES,
        "values/validation": VALUES,
        "choice/validation": CHOICE,
    }
    module = TaskModule(model, TASKS, OPTIM, Objective(), splits)
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


def test_each_task_has_its_own_loss_and_trains_its_own_head(tiny_backbone: Path) -> None:
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


def test_metrics_of_multiple_tasks_and_their_mean(tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# --- multiple processes -------------------------------------------------------------------------------

TWO = TaskConfig(name="two", text="t", labels=["a", "b"], metrics=["f1", "accuracy", "matthews"])
RATING = TaskConfig(name="rating", kind="regression", text="t", metrics=["pearson", "spearman"])
MOODS = TaskConfig(name="moods", kind="multi_label", text="t", labels=["a", "b", "c"], metrics=["macro_f1", "micro_f1"])
KINDS = {
    "two/validation": TWO,
    "classes/validation": CLASSES,
    "rating/validation": RATING,
    "choice/validation": CHOICE,
    "moods/validation": MOODS,
}


class Ranks:
    """The validation of `world_size` processes in this one, on given scores."""

    def __init__(self, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model = torch.nn.Linear(1, 1)
        tasks = list(KINDS.values())
        trainer = SimpleNamespace(
            world_size=world_size, sanity_checking=False, current_epoch=0, state=SimpleNamespace(fn="fit")
        )
        self.modules = [TaskModule(cast(Any, model), tasks, OPTIM, Objective(), KINDS) for _ in range(world_size)]
        for module in self.modules:
            module.trainer = cast(lightning.Trainer, trainer)
            monkeypatch.setattr(module, "log_dict", lambda values, **_: None)
            monkeypatch.setattr(module, "scores", lambda batch, **_: batch.input_ids)

    def validate(
        self, rows: int, batch_size: int, tokens: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> list[TaskModule]:
        draw = np.random.RandomState(rows)
        self.expected: dict[str, float] = {}
        self.predicted: dict[str, list[Any]] = {}
        for loader, (split, task) in enumerate(KINDS.items()):
            counts = draw.randint(2, 5, rows) if task.kind == "choice" else None
            lengths = draw.randint(1, 9, rows)
            outputs = {"regression": 1, "choice": 4}.get(task.kind, len(task.labels or []))
            scores = torch.from_numpy(draw.randn(rows, outputs)).float()
            labels = torch.from_numpy(draw.randint(0, 2, rows))
            if task.kind == "regression":
                labels = torch.from_numpy(draw.randn(rows)).float()
            if task.kind == "multi_label":
                labels = torch.from_numpy(draw.randint(0, 2, (rows, outputs)))
            if counts is not None:
                scores[torch.arange(4) >= torch.from_numpy(counts).unsqueeze(-1)] = float("-inf")
            for name, value in score(task, scores, labels.numpy()).items():
                self.expected[f"{split}/{name}"] = value
            best = scores.squeeze(-1) if task.kind == "regression" else scores.argmax(-1)
            self.predicted[split] = best.tolist()
            if task.kind == "multi_label":
                kind, found = kind_of(task), kind_of(task).outputs(scores)
                decision = kind.decision(task, found, kind.plain_labels(labels.numpy()))
                self.predicted[split] = kind.predict(found, decision)
            for rank, module in enumerate(self.modules):
                plans = SortedBatches(lengths, batch_size, rank, len(self.modules), tokens, counts)
                for number, plan in enumerate(plans):
                    own = torch.tensor(plan.rows)
                    given = scores[own]
                    if counts is not None:  # as wide as the batch's most choices
                        given = given[:, : counts[plan.rows].max()]
                    batch = Batch(
                        given, given, None, labels[own], None, own, torch.tensor(plan.weights), len(plan.global_indices)
                    )
                    module.validation_step(batch, number, loader)

        def parts(module: TaskModule, split: str) -> list[Any]:
            return [(part.rows, part.predictions, part.labels) for part in module._outputs[split]]

        everywhere = [[parts(module, split) for module in self.modules] for split in KINDS]
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: len(self.modules))
        for module in self.modules:
            turn = iter(everywhere)
            monkeypatch.setattr(
                torch.distributed,
                "all_gather_object",
                lambda found, own, turn=turn: found.__setitem__(slice(None), next(turn)),
            )
            module.on_validation_epoch_end()
        return self.modules


@pytest.mark.parametrize("tokens", [None, 1, 20], ids=["by rows", "a row a device", "by tokens"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_number_of_examples_gives_the_scores_of_one_process(
    world_size: int, tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All remainders of rows by batch size and processes, also fewer rows than processes."""
    ranks = Ranks(world_size, monkeypatch)
    for batch_size in (1, 2, 3) if tokens is None else (1,):
        for rows in range(1, 2 * batch_size * world_size + 2):
            for module in ranks.validate(rows, batch_size, tokens, monkeypatch):
                values = {name: value for name, value in module.history[-1].items() if name not in ("epoch", "mean")}
                assert values == pytest.approx(ranks.expected, rel=1e-12, nan_ok=True), (batch_size, rows)
                for split, expected in ranks.predicted.items():
                    assert module.predicted[split].predictions == expected, (batch_size, rows, split)
