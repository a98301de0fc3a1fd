"""A new head initially outputs the distribution of the training labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusion.config.model import HeadConfig
from fusion.config.task import TaskConfig
from fusion.config.training import LossConfig, OptimConfig
from fusion.layers.heads import TaskHead
from fusion.model.build import initialize_heads
from fusion.store.lookup import read_manifest
from fusion.tasks.table import kind_of
from tests.bench import Bench
from tests.training.test_divergence import CHOICE, RATING, THREE, rows
from tests.training.test_not_learned import MANY, TAGS

STILL = OptimConfig(lr=1e-30, weight_decay=0.0, patience=None)


def initial_loss(task: TaskConfig, labels: list[Any], weights: Any = None, init: str = "data") -> float:
    """The loss of a head that ignores its input."""
    head = kind_of(task).make_head(hidden_size=4, outputs=kind_of(task).head_outputs(task))
    encoded = rows(labels)
    encoded.class_weights = weights
    initialize_heads(HeadConfig(init=init), [head], [encoded], [task])
    logits = (head.output.bias * head.scale + head.shift).expand(len(labels), *np.shape(labels)[1:], -1).detach()
    if task.kind == "multi_label":
        logits = head.output.bias.expand(len(labels), -1).detach()
    return float(kind_of(task).mean_loss(logits, torch.tensor(labels)))


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (THREE, [0] * 700 + [1] * 200 + [2] * 100),
        (MANY, [[1, 0]] * 900 + [[0, 1]] * 100),
        (RATING, [70.0] * 300 + [90.0] * 100),
        (TAGS, [[0, 0, 0, 1], [0, 0, 0, -100]] * 300),
    ],
)
def test_the_initial_loss_is_that_of_the_best_constant(task: TaskConfig, labels: list[Any]) -> None:
    best = kind_of(task).constant_loss(task, np.array(labels), None)
    assert best <= initial_loss(task, labels) < 1.001 * best
    assert initial_loss(task, labels, init="zero") > 1.1 * best


def test_balanced_classes_start_equal() -> None:
    labels = [0] * 700 + [1] * 200 + [2] * 100
    weights = np.array([1000 / (3 * count) for count in (700, 200, 100)])
    head = TaskHead(4, 3)
    encoded = rows(labels)
    encoded.class_weights = weights
    initialize_heads(HeadConfig(), [head], [encoded], [THREE])
    torch.testing.assert_close(head.output.bias, torch.zeros(3), rtol=0, atol=0.01)
    assert head.output.weight.any()


def test_choices_and_missing_classes_have_a_finite_start() -> None:
    head = TaskHead(4, 1)
    initialize_heads(HeadConfig(), [head], [rows([0, 1], np.array([2, 2]))], [CHOICE])
    assert not head.output.bias.any()
    head = TaskHead(4, 3)
    encoded = rows([0, 0, 1])
    encoded.class_weights = None
    initialize_heads(HeadConfig(), [head], [encoded], [THREE])
    expected = torch.tensor([3.0, 2.0, 1.0]).log()
    torch.testing.assert_close(head.output.bias.detach(), expected - expected.mean())


def test_a_regression_is_standardized_in_training_only(bench: Bench) -> None:
    bench.add_rating()
    result = bench.stage1("rating")
    head = load_file(bench.folder / "store" / "rating" / "head.safetensors")
    assert set(head) == {"output.weight", "output.bias"} and head["output.bias"].abs() > 0.5
    assert read_manifest("rating", bench.folder / "store").head.shape.keys() == {
        "pooling",
        "layers",
        "outputs",
        "dropout",
    }
    found = bench.evaluate("rating", split="validation")["metrics"]["validation"]
    assert found == pytest.approx(result["metrics"]["validation"], abs=1e-6)
    again = bench.stage1("rating", name="again", init_from="rating", optim=STILL)
    assert again["metrics"]["validation"] == pytest.approx(result["metrics"]["validation"], abs=1e-6)
    fused = bench.stage2("rating", ["rating"])
    assert bench.evaluate(fused["name"], split="validation")["metrics"]["validation"] == pytest.approx(
        fused["metrics"]["validation"], abs=1e-6
    )


def test_a_stored_head_is_equivalent_without_the_scale() -> None:
    torch.manual_seed(0)
    hidden, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    plain, scaled = TaskHead(4, 1, layers=2).eval(), TaskHead(4, 1, layers=2).eval()
    scaled.load_state_dict(plain.state_dict())
    scaled.scale, scaled.shift = 3.0, -2.0
    logits = scaled(hidden, mask)
    torch.testing.assert_close(logits, 3.0 * plain(hidden, mask) - 2.0)
    plain.load_state_dict(scaled.stored_state())
    torch.testing.assert_close(plain(hidden, mask), logits)
    assert scaled.stored_state().keys() == scaled.state().keys() and scaled.shape == plain.shape
    assert all(
        torch.equal(one, two) for one, two in zip(plain.stored_state().values(), plain.parameters(), strict=True)
    )


def test_weighted_and_smoothed_losses_still_train(bench: Bench) -> None:
    loss = LossConfig(class_weights="balanced", label_smoothing=0.1)
    result = bench.stage1("films", loss=loss, head=HeadConfig(layers=2))
    assert result["metrics"]["validation"]["accuracy"] > 0
