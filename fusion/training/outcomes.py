"""What was predicted for each row of a split, beside the run: what two runs can be compared by, row by row."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fusion.config.task import TaskConfig
from fusion.data.encode import EncodedRows
from fusion.files import write_json
from fusion.runs.run import OUTCOMES
from fusion.tasks.table import kind_of
from fusion.training.gathering import gathered

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """The rows of a split that were evaluated, in their order, on the CPU.

    rows: their numbers in the split, fewer than it has where something limits the evaluation
    (`trainer.limit_val_batches`). predictions, labels: for each of these a JSON-able value, see `fusion.tasks.kind`.
    """

    rows: list[int]
    predictions: list[Any]
    labels: list[Any]

    @classmethod
    def of_all(cls, rows: EncodedRows, task: TaskConfig, predictions: list[Any]) -> Scored:
        """Of a whole split."""
        assert rows.labels is not None
        return cls(list(range(len(rows))), predictions, kind_of(task).plain_labels(rows.labels))

    @classmethod
    def gathered(cls, parts: Sequence[Scored]) -> Scored:
        """The rows of all parts and of all processes, in the order of the split.

        Under DDP, every process has to call it, also one without a part.
        """
        own = [(part.rows, part.predictions, part.labels) for part in parts]
        columns = zip(*(part for process in gathered(own) for part in process), strict=True)
        rows, predictions, labels = (list(chain.from_iterable(column)) for column in columns)
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return cls(*([column[place] for place in order] for column in (rows, predictions, labels)))


def outcomes(rows: EncodedRows, scored: Scored) -> dict[str, Any]:
    """Of one split: a fingerprint of the rows that were evaluated, their labels and predictions, in their order.

    Where only some were, `rows` has their numbers, counted from 0, and the fingerprint is of that selection.
    """
    content: dict[str, Any] = {
        "fingerprint": rows.fingerprint,
        "labels": scored.labels,
        "predicted": scored.predictions,
    }
    if len(scored.rows) < len(rows):
        content["rows"] = scored.rows
        selection = f"{rows.fingerprint} {content['rows']}"
        content["fingerprint"] = hashlib.sha256(selection.encode()).hexdigest()
    return content


def write_outcomes(directory: Path, splits: Mapping[str, dict[str, Any]]) -> None:
    """outcomes.json. A folder that cannot be written any more costs a warning, and not the run."""
    try:
        write_json(directory / OUTCOMES, splits)
    except OSError as error:
        log.warning("%s: cannot be written (%s)", directory / OUTCOMES, error.strerror or error)
