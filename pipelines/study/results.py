"""Results of the study: one JSON line per training, and the learning rates selected from them."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fusion.errors import UserError
from pipelines.study.config import METHODS, StudyConfig


class Cell(NamedTuple):
    """One training in the study."""

    backbone: str
    target: str
    rows: int
    method: str
    seed: int
    rate: float


def read_results(config: StudyConfig) -> dict[Cell, dict[str, Any]]:
    """Return the results with these settings by cell. Raises UserError for a line that is not a result."""
    path = Path(config.results)
    found: dict[Cell, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        try:
            result = json.loads(line)
            cell = Cell(*(result[key] for key in Cell._fields))
            if cell.method in METHODS and result["settings"] == config.fingerprint(cell.method):
                found[cell] = result
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: is not a result of the study; remove the line") from None
    return found


def append_results(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Append lines. A single write, since several studies may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(dict(result)) + "\n" for result in results)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def best_rate(results: Mapping[Cell, Mapping[str, Any]], config: StudyConfig, rows: int, method: str) -> float:
    """Return the learning rate with the highest mean validation score over the targets, with the first seed.

    Only targets with a result for every learning rate are used; without one, the middle rate.
    """
    rates, first = METHODS[method].rates, config.seeds[0]
    scores: dict[float, list[float]] = {rate: [] for rate in rates}
    for target in config.targets:
        cells = [Cell(config.backbone, target, rows, method, first, rate) for rate in rates]
        if all(cell in results for cell in cells):
            for cell in cells:
                scores[cell.rate].append(results[cell]["validation"])
    if not scores[rates[0]]:
        return rates[len(rates) // 2]
    return max(rates, key=lambda rate: statistics.fmean(scores[rate]))
