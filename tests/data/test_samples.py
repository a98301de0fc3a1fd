"""A part of a split: which rows, and that it is always the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusion.data.encode import EncodedRows, encode
from fusion.data.rows import Rows
from fusion.data.samples import sampled_batches
from fusion.hub.tokenizer import load_tokenizer
from tests.tiny_backbone import WORDS


@pytest.fixture
def rows(tiny_backbone: Path, tmp_path: Path) -> EncodedRows:
    texts: list[tuple[str, ...]] = [(" ".join(WORDS[: 1 + n % 7]),) for n in range(50)]
    given = Rows(texts=texts, choices=None, labels=[n % 2 for n in range(50)], fingerprint="x", ignored=0)
    return encode(given, load_tokenizer(str(tiny_backbone)), 16, tmp_path)


def numbers(rows: EncodedRows, at_most: int | None, size: int = 8, tokens: int | None = None) -> list[int]:
    return [n for batch in sampled_batches(rows, at_most, size, tokens) for n in batch.rows.tolist()]


@pytest.mark.parametrize("at_most", [None, 50, 60])
@pytest.mark.parametrize("tokens", [None, 64])
def test_all_rows_once(rows: EncodedRows, at_most: int | None, tokens: int | None) -> None:
    assert sorted(numbers(rows, at_most, tokens=tokens)) == list(range(50))


def test_a_part_is_drawn_from_everywhere_and_does_not_depend_on_the_batches(rows: EncodedRows) -> None:
    part = numbers(rows, 20)
    assert len(set(part)) == 20 and min(part) < 10 and max(part) >= 40
    assert part == numbers(rows, 20)
    assert sorted(part) == sorted(numbers(rows, 20, size=3)) == sorted(numbers(rows, 20, tokens=64))


def test_the_rows_are_those_that_the_batch_says(rows: EncodedRows) -> None:
    lengths = []
    for batch in sampled_batches(rows, 20, 8):
        assert batch.labels is not None and batch.labels.tolist() == [n % 2 for n in batch.rows.tolist()]
        real = batch.attention_mask.sum(1).tolist()
        assert real == rows.lengths[batch.rows.numpy()].tolist()
        assert batch.weights.tolist() == [1.0] * len(real)
        lengths += real
    assert lengths == sorted(lengths, reverse=True) and np.unique(lengths).size > 1
