"""The probe's linear heads against closed forms and optimality, and its states against single adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.analysis.probe import States, linear_scores, probe
from fusion.backbones.load import load_backbone
from fusion.config.compositions import CompositionConfig
from fusion.config.model import AdapterConfig
from fusion.config.task import TaskConfig
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.model.build import load_sources, stored_adapters
from tests.bench import Bench
from tests.model.test_source_attention import batch

WIDTH = 6
LABELS = ["a", "b", "c"]
CLASSES = TaskConfig("t", text="text", labels=LABELS, metrics=["accuracy"])
VALUES = TaskConfig("t", kind="regression", text="text", metrics=["pearson"])
CHOICES = TaskConfig("t", kind="choice", text="text", choices="choices", metrics=["accuracy"])


def states(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


def standardised(training: Tensor, other: Tensor) -> Tensor:
    return (other - training.mean(0)) / training.std(0, correction=0)


def test_a_regression_is_the_ridge_of_the_closed_form() -> None:
    one, other = states(40, 0), states(9, 1)
    values = (one @ torch.linspace(-1, 1, WIDTH).double() + 0.5 * torch.sin(torch.arange(40.0)).double()).float()
    found = linear_scores(States(one, values, None), States(other, values[:9], None), VALUES)
    x, y = (standardised(one, one), (values.double() - values.double().mean()) / values.double().std(correction=0))
    # (1/n)·|Xw − y|² + |w|²/2n: (XᵀX + I/2) w = Xᵀ y, and no offset, since both are centred
    weight = torch.linalg.solve(x.T @ x + torch.eye(WIDTH).double() / 2, x.T @ y)
    torch.testing.assert_close(found.squeeze(-1), standardised(one, other) @ weight, rtol=0, atol=1e-5)


def test_a_classification_is_fitted_to_convergence() -> None:
    one = states(60, 0)
    labels = (one[:, 0] + one[:, 1] * 0.5).argsort().argsort() * 3 // 60
    scores = linear_scores(States(one, labels, None), States(one, labels, None), CLASSES)
    assert scores.shape == (60, 3) and (scores.argmax(1) == labels).double().mean() > 0.9
    # Read W and b back from the scores, and check that the gradient of the objective is zero there.
    x = torch.cat([standardised(one, one), torch.ones(60, 1).double()], dim=1)
    solution = torch.linalg.lstsq(x, scores).solution.requires_grad_()
    loss = torch.nn.functional.cross_entropy(x @ solution, labels) + solution[:-1].pow(2).sum() / 120
    (gradient,) = torch.autograd.grad(loss, [solution])
    assert gradient.abs().max() < 1e-5


def test_choices_are_scored_by_one_output_each() -> None:
    counts = torch.tensor([2, 4, 3, 1, 2] * 8)
    one = states(int(counts.sum()), 0)
    first = counts.cumsum(0) - counts
    labels = torch.stack([one[a : a + n, 2].argmax() for a, n in zip(first, counts, strict=True)])
    found = linear_scores(States(one, labels, counts), States(one, labels, counts), CHOICES)
    assert found.shape == (40, 4)
    assert torch.equal(found.isfinite(), torch.arange(4) < counts.unsqueeze(1))
    assert (found.argmax(1) == labels).double().mean() > 0.9


def test_an_absent_label_and_a_constant_state_are_handled() -> None:
    one = states(10, 0)
    one[:, 3] = 2.0
    labels = torch.tensor([0, 1] * 5)
    assert linear_scores(States(one, labels, None), States(one, labels, None), CLASSES).isfinite().all()
    same = torch.ones(10)
    assert linear_scores(States(one, same, None), States(one, same, None), VALUES).isfinite().all()


@pytest.mark.parametrize("layers", [None, [1]])
def test_each_source_is_scored_independently(
    tmp_path: Path, tiny_backbone: Path, layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusion.analysis import probe as module

    bench = Bench(tmp_path, tiny_backbone)
    bench.stage1("films")
    bench.stage1("books", adapter=AdapterConfig(bottleneck_size=5, nonlinearity="gelu", layers=[0, 1]))
    backbone = load_backbone(str(tiny_backbone))
    sources = load_sources(["films", "books"], tmp_path / "store", backbone)
    ids = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0], [2, 11, 12, 3, 0]])
    rows = batch(ids)
    object.__setattr__(rows, "labels", torch.tensor([0, 1, 2]))
    seen: list[Tensor] = []

    def scores(training: States, other: States, task: TaskConfig) -> Tensor:
        assert torch.equal(training.pooled, other.pooled) and training.labels.tolist() == [0, 1, 2]
        seen.append(training.pooled)
        return torch.eye(3)[[0, 1, 0]] if len(seen) == 1 else torch.eye(3)

    monkeypatch.setattr(module, "linear_scores", scores)
    device = torch.device("cpu")
    found = probe(
        sources, backbone, CompositionConfig(layers=layers), "mean", CLASSES, lambda: [rows], lambda: [rows], device
    )
    assert found == pytest.approx([2 / 3, 1.0])
    for source, pooled in zip(sources, seen, strict=True):
        own = stored_adapters(source)
        slot_modules = {slot: a for slot, a in own.items() if layers is None or slot == "1.feedforward"}
        model = AdaptedModel(load_backbone(str(tiny_backbone)), slot_modules, "normed", TaskHead(32, 2)).eval()
        hidden: list[Tensor] = []
        model.backbone.register_forward_hook(lambda *given, into=hidden: into.append(given[2].last_hidden_state))
        with torch.no_grad():
            model(ids, rows.attention_mask)
        expected = torch.stack(
            [hidden[0][row, :length].mean(0) for row, length in enumerate(rows.attention_mask.sum(1))]
        ).double()
        torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)
