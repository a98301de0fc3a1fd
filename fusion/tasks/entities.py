"""Entities of tagged sentences, counted by nervaluate as CoNLL's `conlleval` does.

An entity is correct if its words and its type are. `B-X` starts one, and so does `I-X` after `O` or another type, so
IOB1 tags and invalid tag sequences are read as well.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METRICS = ("entity_f1", "entity_precision", "entity_recall")


def can_count() -> bool:
    """Whether nervaluate is installed; it needs Python 3.11."""
    return importlib.util.find_spec("nervaluate") is not None


def is_bio(tag: str) -> bool:
    return tag == "O" or (tag[:2] in ("B-", "I-") and len(tag) > 2)


def entity_counts(true: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> NDArray[np.int64]:
    """(sentences, 3): the numbers of correct, predicted and true entities, from BIO tags, one per word."""
    import numpy as np
    from nervaluate.loaders import ListLoader
    from nervaluate.strategies import StrictEvaluation

    load, strict = ListLoader().load, StrictEvaluation()
    counts = np.zeros((len(true), 3), np.int64)
    pairs = zip(load(list(map(list, true))), load(list(map(list, predicted))), strict=True)
    for number, (gold, found) in enumerate(pairs):
        if gold or found:
            result, _ = strict.evaluate(gold, found, [])
            counts[number] = result.correct, result.actual, result.possible
    return counts


def entity_scores(counts: NDArray[np.int64]) -> dict[str, float]:
    """Micro averages over all sentences, from `entity_counts`; 0 where they are not defined."""
    right, found, there = map(int, counts.sum(0))
    return {
        "entity_f1": 2 * right / (found + there) if found + there else 0.0,
        "entity_precision": right / found if found else 0.0,
        "entity_recall": right / there if there else 0.0,
    }
