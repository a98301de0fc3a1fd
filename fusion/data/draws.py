"""Random draws of rows, each with its own fixed seed: limits, parts of a split, and held-out splits.

A draw never changes: RandomState's stream is frozen (NEP 19), unlike Generator's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.errors import UserError

_LIMIT_SEED = 20_200_501
_PART_SEED = 20_210_419
_HOLDOUT_SEED = 20_261_128


def limited_rows(count: int, limit: int) -> list[int]:
    """`limit` of `count` rows, ascending."""
    return np.sort(np.random.RandomState(_LIMIT_SEED).permutation(count)[:limit]).tolist()


def part_rows(count: int, start: int, stop: int) -> list[int]:
    """The rows from `start` to `stop` percent of a fixed shuffle, ascending: some data sets are sorted by label."""
    order = np.random.RandomState(_PART_SEED).permutation(count)
    return np.sort(order[count * start // 100 : count * stop // 100]).tolist()


@dataclass(frozen=True)
class Holdout:
    """A division of the training rows into splits.

    Attributes:
        split: the part that is meant: train (the rows that are left), validation or test.
        fractions: of each split, in the order in which their rows are drawn.
        stratify: whether each part has the labels in the proportions of the whole, up to rounding.
    """

    split: str
    fractions: Mapping[str, float]
    seed: int = 0
    stratify: bool = False

    def rows(self, count: int, labels: Sequence[Any] | None, where: str) -> list[int]:
        """The rows of the part, ascending, out of `count` rows with these labels. Raises UserError if a part is empty."""
        order = np.random.RandomState([_HOLDOUT_SEED, self.seed]).permutation(count)
        groups = [order]
        if self.stratify:
            assert labels is not None
            shuffled = np.asarray(labels)[order]
            groups = [order[shuffled == label] for label in np.unique(shuffled)]
        counts = np.array([len(group) for group in groups])
        taken = np.zeros(len(groups), np.int64)
        parts = {}
        for split, fraction in self.fractions.items():
            # With stratify, one row of each label stays in train.
            sizes = _sizes(fraction, counts, np.maximum(counts - taken - int(self.stratify), 0))
            ranges = zip(groups, taken, taken + sizes, strict=True)
            parts[split] = np.concatenate([group[start:end] for group, start, end in ranges])
            taken += sizes
        parts["train"] = np.concatenate([group[start:] for group, start in zip(groups, taken, strict=True)])
        if empty := [split for split, rows in parts.items() if not len(rows)]:
            fractions = ", ".join(f"data.split.{split}={share:g}" for split, share in self.fractions.items())
            raise UserError(
                f"{where}: {fractions} of {count} training rows leave no row for {', '.join(empty)}\n"
                "Change the fraction, or add rows"
            )
        return np.sort(parts[self.split]).tolist()


def _sizes(fraction: float, counts: NDArray[np.int64], room: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows of each group a part takes: its share of `counts`, at most `room`, by the largest remainder method."""
    wanted = math.floor(fraction * counts.sum() + 0.5)
    exact = fraction * counts.astype(np.float64)
    sizes = np.minimum(np.floor(exact + 1e-9).astype(np.int64), room)
    for group in np.argsort(-(exact - sizes), kind="stable"):
        if sizes.sum() >= wanted:
            break
        sizes[group] += int(room[group] > sizes[group])
    return sizes
