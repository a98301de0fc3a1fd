"""What the report reads from an inspection of a fusion: source ablation, and token-level attention weights."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusion.reporting.statistics import Difference, Predictions, Sample, compare

_STEPS = 255  # a weight of 1 in a byte


def ablation(inspection: Mapping[str, Any], metric: str) -> dict[str, Difference]:
    """By source, the score without it minus the score with all; with an interval over the rows if they were kept."""
    rows = {key: inspection.get(key) for key in ("fingerprint", "labels")}
    full, kept = inspection["metrics"][metric], Predictions.of(rows | {"predicted": inspection.get("predicted")})
    made = {}
    for source, one in inspection["masked"].items():
        score, without = one["metrics"][metric], Predictions.of(rows | {"predicted": one.get("predicted")})
        if kept is None or without is None:
            made[source] = Difference(score - full)
        else:
            made[source] = compare([Sample(0, score, without)], [Sample(0, full, kept)], metric)
    return made


def is_complete(inspection: Mapping[str, Any]) -> bool:
    """Whether an inspection file has everything that the page shows."""
    try:
        metric = next(iter(inspection["metrics"]))
        scored = [inspection, *inspection["masked"].values(), *(inspection["pruned"] or [])]
        words = {"row", "tokens", "special", "weights", "predicted", "truth", "right"}
        return (
            all(isinstance(one["metrics"][metric], (int, float)) for one in scored)
            and all("kept" in step for step in inspection["pruned"] or [])
            and all(words <= set(row) for row in inspection["words"])
            and {"sources", "slots", "split", "rows"} <= set(inspection)
        )
    except (KeyError, TypeError, AttributeError, StopIteration):
        return False


def pack(weights: NDArray[np.floating]) -> str:
    """Weights in 0 to 1, of any shape, row after row: one byte each, in base64."""
    return base64.b64encode((weights.clip(0, 1) * _STEPS).round().astype(np.uint8).tobytes()).decode()


def unpack(packed: str, shape: tuple[int, ...]) -> NDArray[np.floating]:
    """What `pack` was given, to within half a step.

    Raises:
        ValueError: it is no base64, or of another shape.
    """
    values: NDArray[np.floating] = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(shape) / _STEPS
    return values
