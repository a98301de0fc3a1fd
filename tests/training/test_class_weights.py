"""Class weights and label smoothing against torch's loss and against loops, for one and multiple processes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import pytorch_lightning as lightning
import torch
from torch import Tensor

from fusion.config.stages import Stage1Config, Stage2Config
from fusion.config.task import TaskConfig
from fusion.config.training import LossConfig
from fusion.data.batches import Batch, LengthBatches, TaskBatches, TokenBatches
from fusion.data.encode import EncodedRows
from fusion.data.loaders import PlannedBatches
from fusion.data.rows import Rows
from fusion.errors import UserError
from fusion.runs.identity import identity, identity_config
from fusion.store.lookup import read_manifest
from fusion.tasks.table import KINDS
from fusion.training.module import Objective, TaskModule
from fusion.training.task_rows import set_class_weights
from tests.bench import Bench

THREE = TaskConfig(name="three", text="t", labels=["a", "b", "c"], metrics=["accuracy"])
RATING = TaskConfig(name="rating", kind="regression", text="t", metrics=["pearson"])
QUIZ = TaskConfig(name="quiz", kind="choice", text="t", choices="c", metrics=["accuracy"])


def encoded(labels: list[int]) -> EncodedRows:
    """Rows of 1 to 4 tokens."""
    lengths = np.arange(len(labels)) % 4 + 1
    rows = Rows([("x",)] * len(labels), None, labels, 0, "f")
    return EncodedRows({"input_ids": np.zeros(lengths.sum(), np.int32), "ends": np.cumsum(lengths)}, rows, 0)


def by_loops(scores: Tensor, labels: Tensor, weights: list[float], smoothing: float) -> list[float]:
    """The formula of torch's documentation."""
    found = []
    for row, label in zip(scores.double().tolist(), labels.tolist(), strict=True):
        total = math.log(sum(math.exp(score) for score in row))
        nll = [total - score for score in row]
        smooth = sum(weight * term for weight, term in zip(weights, nll, strict=True)) / len(row)
        found.append((1 - smoothing) * weights[label] * nll[label] + smoothing * smooth)
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 4.0]])
def test_terms(weights: list[float] | None, smoothing: float) -> None:
    draw = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(9, 3, generator=draw), torch.arange(9) % 3
    given = None if weights is None else torch.tensor(weights)
    losses = KINDS["classification"].loss(scores, labels, given, smoothing)
    assert losses.tolist() == pytest.approx(by_loops(scores, labels, weights or [1.0] * 3, smoothing))


def test_label_smoothing_ignores_missing_choices() -> None:
    infinite = float("-inf")
    scores = torch.tensor([[1.0, 2.0, infinite], [0.5, -1.0, 3.0]], requires_grad=True)
    labels = torch.tensor([1, 0])
    losses = KINDS["choice"].loss(scores, labels, smoothing=0.3)
    expected = [
        by_loops(scores[:1, :2], labels[:1], [1.0] * 2, 0.3)[0],
        by_loops(scores[1:], labels[1:], [1.0] * 3, 0.3)[0],
    ]
    assert losses.tolist() == pytest.approx(expected)
    losses.sum().backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())


# --- a batch ------------------------------------------------------------------------------------------


class Scores(TaskModule):
    """The loss alone: a row's scores are a function of its index."""

    def __init__(self, task: TaskConfig, weights: Any, smoothing: float, world_size: int) -> None:
        lightning.LightningModule.__init__(self)
        self.tasks, self.objective = [task], Objective(label_smoothing=smoothing)
        self.register_buffer("class_weights_0", None if weights is None else torch.from_numpy(weights).float())
        self.model = cast(Any, SimpleNamespace(losses=dict))
        self.trainer = cast(lightning.Trainer, SimpleNamespace(world_size=world_size))

    def scores(self, batch: Batch, *_: Any, **__: Any) -> Tensor:
        return scores_of(batch.rows)


def scores_of(rows: Tensor) -> Tensor:
    return torch.stack([torch.sin(rows * 1.7), torch.cos(rows * 2.3), torch.sin(rows * 0.9 + 1)], -1)


LABELS = [0] * 14 + [1] * 5 + [2] * 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [None, 12])
@pytest.mark.parametrize("given", ["balanced", [0.5, 1.0, 4.0]])
def test_the_mean_over_processes_is_the_weighted_mean(given: Any, tokens: int | None, smoothing: float) -> None:
    """The mean of the processes' losses is torch's mean over the batch of all; some have a filler alone."""
    rows = encoded(LABELS)
    set_class_weights(LossConfig(class_weights=given), [THREE], [rows])
    weights = rows.class_weights

    def sampler(rank: int) -> LengthBatches | TokenBatches:
        if tokens is None:
            return LengthBatches(rows.lengths, 2, 3, rank, 4)
        return TokenBatches(rows.lengths, None, tokens, 3, rank, 4)

    module = Scores(THREE, weights, smoothing, 4)
    steps = zip(*(list(sampler(rank)) for rank in range(4)), strict=True)
    seen: list[int] = []
    for plans in steps:
        batches = [PlannedBatches([rows])[plan] for plan in plans]
        own = [batch.rows[batch.weights > 0] for batch in batches]
        everyone = torch.cat(own)
        seen += everyone.tolist()
        labels = torch.tensor(LABELS)[everyone]
        expected = torch.nn.functional.cross_entropy(
            scores_of(everyone), labels, torch.from_numpy(weights).float(), label_smoothing=smoothing
        )
        losses = [module.losses(batch)["task"].item() for batch in batches]
        assert sum(losses) / 4 == pytest.approx(expected.item(), rel=1e-5)
    assert sorted(seen) == list(range(len(LABELS)))


def test_a_multi_task_batch_is_normalized_by_its_own_weights() -> None:
    one, two = encoded([0, 1, 1, 1]), encoded([0, 0, 1, 2, 2, 2])
    both = [TaskConfig(name="one", text="t", labels=["a", "b"], metrics=["accuracy"]), THREE]
    set_class_weights(LossConfig(class_weights="balanced"), both, [one, two])
    samplers = [LengthBatches(rows.lengths, 3, 1) for rows in (one, two)]
    for plan in TaskBatches(samplers, [4, 6], 1.0, 1):
        batch = PlannedBatches([one, two])[plan]
        weights = (one, two)[plan.task].class_weights
        assert batch.labels is not None and weights is not None
        assert batch.global_weight == pytest.approx(sum(weights[label] for label in batch.labels.tolist()))


def test_without_class_weights_a_batch_has_no_weight() -> None:
    assert encoded([0, 1, 2]).batch([0, 2]).global_weight is None


# --- the weights --------------------------------------------------------------------------------------


def test_balanced_is_as_in_scikit_learn() -> None:
    rows = encoded(LABELS)
    set_class_weights(LossConfig(class_weights="balanced"), [THREE], [rows])
    assert rows.class_weights is not None
    assert rows.class_weights.tolist() == pytest.approx([21 / (3 * 14), 21 / (3 * 5), 21 / (3 * 2)])


def test_balanced_with_a_label_that_no_example_has() -> None:
    with pytest.raises(UserError, match=r"no training example of three has the label b\n.*\[1.0,1.0,1.0\]"):
        set_class_weights(LossConfig(class_weights="balanced"), [THREE], [encoded([0, 0, 2])])


def test_tasks_without_classes_have_no_class_weights() -> None:
    rows = [encoded([0, 1, 2]), encoded([0, 1])]
    set_class_weights(LossConfig(class_weights="balanced"), [THREE, QUIZ], rows)
    assert rows[0].class_weights is not None and rows[1].class_weights is None


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        (THREE, {"class_weights": [1.0, 2.0]}, r"2 weights for the 3 labels of three \(a, b, c\)"),
        (THREE, {"class_weights": "auto"}, "expected balanced, or a list"),
        (THREE, {"class_weights": []}, "expected balanced, or a list"),
        (THREE, {"class_weights": [1.0, 0.0, 1.0]}, "a number > 0"),
        (THREE, {"class_weights": [1.0, float("nan"), 1.0]}, "a number > 0"),
        (THREE, {"class_weights": [1.0, float("inf"), 1.0]}, "a number > 0"),
        (THREE, {"class_weights": [1.0, True, 1.0]}, "a number > 0"),
        (THREE, {"class_weights": 2.0}, "expected balanced, or a list"),
        (THREE, {"label_smoothing": 1.0}, ">= 0 and < 1"),
        (THREE, {"label_smoothing": -0.1}, ">= 0 and < 1"),
        (THREE, {"label_smoothing": float("nan")}, "finite number >= 0 and < 1"),
        (RATING, {"class_weights": "balanced"}, r"rating has no classes \(regression\)"),
        (RATING, {"label_smoothing": 0.1}, "rating is a task of kind regression"),
        (QUIZ, {"class_weights": "balanced"}, r"quiz has no classes \(choice\)"),
        (QUIZ, {"class_weights": [1.0, 2.0]}, "quiz has no classes"),
    ],
)
def test_refused(task: TaskConfig, values: dict[str, Any], message: str) -> None:
    for config in (Stage1Config, Stage2Config):
        sources = {"sources": ["x"]} if config is Stage2Config else {}
        with pytest.raises(UserError, match=message):
            config(task=task, loss=LossConfig(**values), **cast(Any, sources))


def test_a_list_is_refused_for_multiple_tasks() -> None:
    from fusion.config.methods import MethodConfig

    method = MethodConfig("multitask_adapter")
    with pytest.raises(UserError, match=r"expected loss\.class_weights=balanced"):
        Stage1Config(tasks=[THREE, QUIZ], method=method, loss=LossConfig(class_weights=[1.0, 2.0, 3.0]))
    Stage1Config(tasks=[THREE, RATING], method=method, loss=LossConfig("balanced", 0.1))
    with pytest.raises(UserError, match="has no classes"):
        Stage1Config(tasks=[QUIZ, RATING], method=method, loss=LossConfig("balanced"))


# --- a run --------------------------------------------------------------------------------------------


def test_identity(bench: Bench) -> None:
    def run(**loss: Any) -> dict[str, Any]:
        config = Stage1Config(**bench.settings("films", loss=LossConfig(**loss)))
        return bench.run("stage1", config).config

    before = {key: value for key, value in run().items() if key != "loss"}  # as a run of 0.1
    assert identity(run()) == identity(before)
    assert identity_config(run(class_weights=[1, 2.5]))["loss.class_weights"] == [1, 2.5]
    assert len({identity(run(**loss)) for loss in ({}, {"class_weights": "balanced"}, {"label_smoothing": 0.1})}) == 3


def test_trained_and_stored(bench: Bench) -> None:
    plain = bench.stage1("films", name="plain")
    bench.stage1("films", name="same", loss=LossConfig())
    bench.stage1("films", name="weighted", loss=LossConfig([0.2, 3.0], 0.1))
    assert torch.equal(*(bench.weights(name)["0.feedforward.down.weight"] for name in ("plain", "same")))
    assert not torch.equal(*(bench.weights(name)["0.feedforward.down.weight"] for name in ("plain", "weighted")))
    stored = read_manifest("weighted", bench.folder / "store").run.config
    assert stored["loss.class_weights"] == [0.2, 3.0] and stored["loss.label_smoothing"] == 0.1
    assert plain["metrics"].keys() == {"validation"}


def test_multiple_kinds_of_tasks(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.add_rating()
    bench.add_quiz()
    with caplog.at_level("INFO"):
        bench.multitask("films", "rating", "quiz", loss=LossConfig("balanced", 0.1))
    assert "films: class weights bad" in caplog.text
    assert "rating: no class weights" in caplog.text and "rating: no label smoothing" in caplog.text
    assert "quiz: no class weights" in caplog.text and "quiz: no label smoothing" not in caplog.text


def test_a_label_without_examples_is_refused_before_anything_is_trained(bench: Bench) -> None:
    folder = bench.folder / "data" / "films"
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join(line for line in lines if '"label": 1' in line) + "\n")
    with pytest.raises(UserError, match="no training example of films has the label bad"):
        bench.stage1("films", loss=LossConfig("balanced"))
    assert not (bench.folder / "store" / "films").exists()
