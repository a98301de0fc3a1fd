"""Loaders: what comes out of them, with and without workers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusion.data.batches import LengthBatches
from fusion.data.encode import EncodedRows, encode
from fusion.data.loaders import evaluation_loader, sampled_batches, training_loader
from fusion.data.rows import Rows


@pytest.fixture
def encoded(tokenizer, tmp_path):
    texts: list[tuple[str, ...]] = [("a" * (1 + 7 * number % 30),) for number in range(53)]
    return encode(Rows(texts, None, [number % 2 for number in range(53)], 0, "f"), tokenizer, 40, tmp_path / "cache")


@pytest.fixture
def ragged(tokenizer, tmp_path):
    texts: list[tuple[str, ...]] = [("a" * (1 + number),) for number in range(11)]
    choices = [["x" * (1 + place) for place in range(2 + number % 3)] for number in range(11)]
    return encode(Rows(texts, choices, [0] * 11, 0, "f"), tokenizer, 40, tmp_path / "cache")


def test_training(encoded):
    loader = training_loader([encoded], 8, seed=1)
    batches = list(loader)
    assert len(batches) == len(loader) == 7
    assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(53))
    for batch in batches:
        assert (
            batch.input_ids.shape == batch.attention_mask.shape == (len(batch.rows), encoded.lengths[batch.rows].max())
        )
        assert batch.labels is not None and batch.labels.tolist() == [row % 2 for row in batch.rows.tolist()]


def test_the_order_depends_only_on_the_epoch(encoded):
    loader = training_loader([encoded], 8, seed=1)

    def order():
        return [batch.rows.tolist() for batch in loader]

    first = order()
    assert order() == first
    assert isinstance(loader.sampler, LengthBatches)
    loader.sampler.set_epoch(1)
    assert order() != first


def test_workers_give_the_same_batches(encoded):
    plain, worked = (list(training_loader([encoded], 8, seed=1, workers=workers)) for workers in (0, 2))
    assert [batch.rows.tolist() for batch in plain] == [batch.rows.tolist() for batch in worked]
    assert all(torch.equal(one.input_ids, other.input_ids) for one, other in zip(plain, worked, strict=True))
    assert [batch.global_rows for batch in plain] == [batch.global_rows for batch in worked]


def test_a_pass_does_not_change_the_random_state(encoded):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(training_loader([encoded], 8, seed=1))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_over_ranks(encoded):
    shares = [list(evaluation_loader(encoded, 10, rank, 2)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 3
    rows = [batch.rows[batch.weights > 0] for share in shares for batch in share]
    assert sorted(torch.cat(rows).tolist()) == list(range(53))


def test_ragged_choices(ragged):
    seen = []
    for batch in training_loader([ragged], 4, seed=0):
        assert batch.choice_counts is not None
        assert batch.choice_counts.tolist() == [2 + row % 3 for row in batch.rows.tolist()]
        assert len(batch.input_ids) == batch.choice_counts.sum()
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(11))


def test_ragged_choices_by_tokens(ragged):
    loaders = (
        training_loader([ragged], 4, seed=0, tokens_per_batch=96),
        evaluation_loader(ragged, 4, tokens_per_batch=96),
    )
    for loader in loaders:
        batches = list(loader)
        assert len(batches) == len(loader) > 1
        assert all(batch.input_ids.numel() <= 96 for batch in batches)
        assert sorted(torch.cat([batch.rows for batch in batches]).tolist()) == list(range(11))


def test_a_batch_moves_all_its_tensors(ragged):
    batch = next(iter(evaluation_loader(ragged, 4)))
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.weights.device.type == "meta"
    assert moved.choice_counts is not None and moved.choice_counts.device.type == "meta"
    assert moved.global_rows == batch.global_rows
    assert batch.input_ids.device.type == "cpu"


def test_lightning_moves_a_batch(ragged):
    from lightning_fabric.utilities import move_data_to_device

    batch = next(iter(evaluation_loader(ragged, 4)))
    assert move_data_to_device(batch, torch.device("meta")).rows.device.type == "meta"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tokens", [None, 96])
def test_a_multi_task_batch_has_one_task(encoded, ragged, workers, tokens):
    tasks = [encoded, ragged]
    for number, rows in enumerate(tasks):
        rows.task = number
    loader = training_loader(tasks, 4, seed=1, workers=workers, tokens_per_batch=tokens, temperature=2.0)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert {batch.task for batch in batches} == {0, 1}
    for batch in batches:
        expected = tasks[batch.task].batch(batch.rows.tolist())
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert (batch.choice_counts is not None) == (batch.task == 1)
        assert batch.to("meta").task == batch.task
    assert {batch.task for batch in evaluation_loader(ragged, 4)} == {1}


# --- a sample of the rows -----------------------------------------------------------------------------


def numbers(encoded: EncodedRows, at_most: int | None, size: int = 8, tokens: int | None = None) -> list[int]:
    return [n for batch in sampled_batches(encoded, at_most, size, tokens) for n in batch.rows.tolist()]


@pytest.mark.parametrize("at_most", [None, 53, 60])
@pytest.mark.parametrize("tokens", [None, 96])
def test_all_examples_once(encoded: EncodedRows, at_most: int | None, tokens: int | None) -> None:
    assert sorted(numbers(encoded, at_most, tokens=tokens)) == list(range(53))


def test_a_sample_is_uniform_and_does_not_depend_on_the_batches(encoded: EncodedRows) -> None:
    part = numbers(encoded, 20)
    assert len(set(part)) == 20 and min(part) < 10 and max(part) >= 40
    assert part == numbers(encoded, 20)
    assert sorted(part) == sorted(numbers(encoded, 20, size=3)) == sorted(numbers(encoded, 20, tokens=96))


def test_batches_of_a_sample_have_their_row_numbers(encoded: EncodedRows) -> None:
    lengths = []
    for batch in sampled_batches(encoded, 20, 8):
        assert batch.labels is not None and batch.labels.tolist() == [n % 2 for n in batch.rows.tolist()]
        real = batch.attention_mask.sum(1).tolist()
        assert real == encoded.lengths[batch.rows.numpy()].tolist()
        assert batch.weights.tolist() == [1.0] * len(real)
        lengths += real
    assert lengths == sorted(lengths, reverse=True) and np.unique(lengths).size > 1
