"""The sources that are active in a training batch, and the fold of each of its texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusion.data.batches import Batch
from fusion.training.source_sampling import SourceSampling

CPU = torch.device("cpu")


def batch(rows: list[int], choice_counts: list[int] | None = None) -> Batch:
    counts = None if choice_counts is None else torch.tensor(choice_counts)
    ids = torch.ones(len(rows) if counts is None else int(counts.sum()), 3, dtype=torch.int64)
    return Batch(ids, ids, None, None, counts, torch.tensor(rows), torch.ones(len(rows)), len(rows))


def drawn(sampling: SourceSampling, batches: int = 400) -> np.ndarray:
    masks = [sampling.sources_on(7, epoch, number, CPU) for epoch in range(2) for number in range(batches // 2)]
    return torch.stack([mask for mask in masks if mask is not None]).numpy()


def test_each_source_is_inactive_with_the_given_probability() -> None:
    sampling = SourceSampling(4, 0.3, (0, 1, 2, 3))
    on = drawn(sampling)
    assert on.shape == (400, 4) and on.any(1).all()
    # 0.7, and a little more, since one source stays active where all would be inactive: 0.3^4 of the batches
    assert on.mean(0) == pytest.approx(0.7, abs=0.07)
    assert np.array_equal(on, drawn(sampling))
    assert abs(np.corrcoef(on[:, 0], on[:, 1])[0, 1]) < 0.15
    assert len({tuple(mask) for mask in on.tolist()}) > 10


def test_only_the_selected_sources_are_dropped_and_never_all() -> None:
    own = drawn(SourceSampling(3, 0.5, (1,)))
    assert own[:, [0, 2]].all() and 0.4 < own[:, 1].mean() < 0.6
    assert drawn(SourceSampling(1, 0.9, (0,))).all()
    few = drawn(SourceSampling(2, 0.9, (0, 1)))
    assert few.any(1).all() and 0.35 < few.mean() < 0.65


def test_without_dropout_all_are_active() -> None:
    assert SourceSampling(3).sources_on(0, 0, 0, CPU) is None
    assert SourceSampling(3).folds_of(batch([2, 0])) is None


def test_folds_of_the_texts_of_a_batch() -> None:
    sampling = SourceSampling(2, folds=np.array([4, 3, 2, 1, 0]))
    assert sampling.folds_of(batch([1, 4, 1])).tolist() == [3, 0, 3]  # type: ignore[union-attr]
    assert sampling.folds_of(batch([0, 2], [3, 2])).tolist() == [4, 4, 4, 2, 2]  # type: ignore[union-attr]
