"""A part of a split, for what is measured before training: as batches, the same in every run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fusion.data.batches import Batch, SortedBatches
from fusion.data.encode import EncodedRows

_SEED = 0  # of no setting: two seeds of one run look at the same rows


def sampled_batches(
    rows: EncodedRows, at_most: int | None, batch_size: int, tokens_per_batch: int | None = None
) -> Iterator[Batch]:
    """Batches of at most so many rows, drawn with a fixed seed, longest first; None: of all rows."""
    chosen = np.arange(len(rows))
    if at_most is not None and at_most < len(rows):
        chosen = np.random.RandomState(_SEED).permutation(len(rows))[:at_most]
    counts = None if rows.choice_counts is None else rows.choice_counts[chosen]
    for plan in SortedBatches(rows.lengths[chosen], batch_size, tokens=tokens_per_batch, counts=counts):
        yield rows.batch(chosen[plan.rows].tolist())
