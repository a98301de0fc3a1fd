"""Splits that a task does not have, taken from its training rows: fixed by a seed of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.errors import UserError

# Draws of rows must never change: RandomState's stream is frozen (NEP 19), that of Generator is not.
_SEED = 20_261_128


@dataclass(frozen=True)
class Holdout:
    """How the training rows are shared out.

    Attributes:
        split: which of the parts is meant: train (what the others leave), validation or test.
        fractions: of each split that is made, in the order in which rows are drawn.
        seed: of the draw.
        stratify: whether each part has the labels in the proportions of the whole, up to rounding.
    """

    split: str
    fractions: Mapping[str, float]
    seed: int = 0
    stratify: bool = False

    def rows(self, count: int, labels: Sequence[Any] | None, where: str) -> list[int]:
        """The rows of the part, rising, out of `count` rows.

        Args:
            labels: of all rows, to stratify by.
            where: for messages.

        Raises:
            UserError: a part would be empty.
        """
        order = np.random.RandomState([_SEED, self.seed]).permutation(count)
        groups = [order]
        if self.stratify:
            assert labels is not None
            given = np.asarray(labels)[order]
            groups = [order[given == label] for label in np.unique(given)]
        taken = np.zeros(len(groups), np.int64)
        parts: dict[str, list[NDArray[np.intp]]] = {}
        for split, fraction in self.fractions.items():
            # An example of each label stays in train.
            sizes = _sizes(fraction, [len(group) for group in groups], taken, keep=1 if self.stratify else 0)
            if sizes.sum() == 0:
                raise UserError(
                    f"{where}: data.split.{split}={fraction:g} of {count} training rows is no row\n"
                    "Raise the fraction, or add rows"
                )
            parts[split] = [
                group[start : start + size] for group, start, size in zip(groups, taken, sizes, strict=True)
            ]
            taken += sizes
        parts["train"] = [group[start:] for group, start in zip(groups, taken, strict=True)]
        rows = np.sort(np.concatenate(parts[self.split]))
        if len(rows) == 0:
            said = " and ".join(f"data.split.{split}={share:g}" for split, share in self.fractions.items())
            raise UserError(
                f"{where}: {said} of {count} training rows leave none to train on\nLower the fraction"
            )
        return rows.tolist()


def _sizes(fraction: float, counts: Sequence[int], taken: NDArray[np.int64], keep: int) -> NDArray[np.int64]:
    """How many rows of each group a part takes: its share of the whole by the largest remainders.

    Args:
        counts: rows of each group.
        taken: of these, by parts before.
        keep: rows of each group that stay.
    """
    wanted = math.floor(fraction * sum(counts) + 0.5)
    exact = fraction * np.asarray(counts, np.float64)
    room = np.maximum(np.asarray(counts) - taken - keep, 0)
    sizes = np.minimum(np.floor(exact + 1e-9).astype(np.int64), room)
    by_remainder = np.argsort(-(exact - sizes), kind="stable")
    for group in by_remainder:
        if sizes.sum() >= wanted:
            break
        sizes[group] += int(room[group] > sizes[group])
    return sizes
