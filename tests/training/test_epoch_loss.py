"""The mean loss of an epoch against a plain mean over its examples."""

from __future__ import annotations

import json

import pytest
import torch

from fusion.training.losses import EpochLoss

CPU = torch.device("cpu")
BATCHES = [(4.0, 3.5, 8), (2.0, 1.5, 8), (1.0, 0.5, 3)]  # of the whole loss, of the task, examples


def add(loss: EpochLoss, batches: list[tuple[float, float, int]]) -> None:
    for total, task, rows in batches:
        loss.add(torch.tensor(total), torch.tensor(task), rows)


def test_every_example_has_the_same_weight() -> None:
    loss = EpochLoss()
    assert loss.mean() is None and loss.figures() is None
    add(loss, BATCHES)
    assert loss.mean() == pytest.approx((4 * 8 + 2 * 8 + 1 * 3) / 19)
    assert loss.figures() == (3.5, pytest.approx((3.5 * 8 + 1.5 * 8 + 0.5 * 3) / 19))
    loss.restart()
    add(loss, BATCHES[1:2])
    assert loss.mean() == 2.0
    assert loss.figures() == (3.5, 1.5)  # the first batch is that of the training


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_resumed_epoch_has_the_mean_of_the_whole(done: int) -> None:
    whole, first, rest = EpochLoss(), EpochLoss(), EpochLoss()
    add(whole, BATCHES)
    add(first, BATCHES[:done])
    rest.resume(json.loads(json.dumps(first.state(1))), 1, CPU)
    add(rest, BATCHES[done:])
    assert (rest.mean(), rest.figures()) == (whole.mean(), whole.figures())


@pytest.mark.parametrize("processes", [(2, 2), (1, 2), (2, 1)])
def test_with_several_processes_the_mean_starts_at_the_resume(processes: tuple[int, int]) -> None:
    first, rest = EpochLoss(), EpochLoss()
    add(first, BATCHES[:2])
    rest.resume(first.state(processes[0]), processes[1], CPU)
    add(rest, BATCHES[2:])
    assert rest.mean() == 1.0 and rest.figures() == (3.5, 0.5)
