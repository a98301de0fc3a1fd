"""What was predicted for each row of a split, beside the run: what two runs can be compared by, row by row."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.data.encode import EncodedRows
from fusion.run import OUTCOMES, write_json
from fusion.training.gathering import gathered

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """The rows of a split that were evaluated, in their order, on the CPU.

    rows, predictions, labels: (rows,). Where something limits the evaluation (`trainer.limit_val_batches`), they are
    fewer than the split has.
    """

    rows: Tensor
    predictions: Tensor
    labels: Tensor

    @classmethod
    def of_all(cls, rows: EncodedRows, predictions: Tensor) -> Scored:
        """Of a whole split. predictions: (rows,)."""
        assert rows.labels is not None
        return cls(torch.arange(len(rows)), predictions, torch.from_numpy(rows.labels))

    @classmethod
    def gathered(cls, parts: Sequence[Scored]) -> Scored:
        """The rows of all parts and of all processes, in the order of the split.

        Under DDP, every process has to call it, also one without a part.
        """
        own = [(part.rows, part.predictions, part.labels) for part in parts]
        columns = zip(*(part for process in gathered(own) for part in process), strict=True)
        rows, predictions, labels = (torch.cat(column) for column in columns)
        order = rows.argsort()
        return cls(rows[order], predictions[order], labels[order])


def outcomes(rows: EncodedRows, scored: Scored) -> dict[str, Any]:
    """Of one split: a fingerprint of the rows that were evaluated, their labels and predictions, in their order.

    Where only some were, `rows` has their numbers, counted from 0, and the fingerprint is of that selection.
    """
    content: dict[str, Any] = {
        "fingerprint": rows.fingerprint,
        "labels": scored.labels.tolist(),
        "predicted": scored.predictions.tolist(),
    }
    if len(scored.rows) < len(rows):
        content["rows"] = scored.rows.tolist()
        selection = f"{rows.fingerprint} {content['rows']}"
        content["fingerprint"] = hashlib.sha256(selection.encode()).hexdigest()
    return content


def write_outcomes(directory: Path, splits: Mapping[str, dict[str, Any]]) -> None:
    """outcomes.json. A folder that cannot be written any more costs a warning, and not the run."""
    try:
        write_json(directory / OUTCOMES, splits)
    except OSError as error:
        log.warning("%s: cannot be written (%s)", directory / OUTCOMES, error.strerror or error)
