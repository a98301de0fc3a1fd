"""Source ablation: the score without each source, from an inspection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusion.reporting.statistics import Difference, Predictions, Sample, compare


def ablation(inspection: Mapping[str, Any], metric: str) -> dict[str, Difference]:
    """By source, the score without it minus the score with all; with an interval over the rows if they were kept."""
    rows = {key: inspection.get(key) for key in ("fingerprint", "labels")}
    full, kept = (inspection["metrics"][metric], Predictions.of(rows | {"predicted": inspection.get("predicted")}))
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
