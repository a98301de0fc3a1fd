"""What was predicted for each row of a split, beside the run: what two runs can be compared by, row by row."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fusion.data.encode import EncodedRows
from fusion.run import OUTCOMES, write_json

log = logging.getLogger(__name__)


def outcomes(rows: EncodedRows, predicted: Tensor) -> dict[str, Any]:
    """Of one split: the rows' fingerprint, their labels and what was predicted, in the rows' order.

    Args:
        predicted: (rows,), class ids, or values of a regression.
    """
    assert rows.labels is not None
    return {
        "fingerprint": rows.fingerprint,
        "labels": rows.labels.tolist(),
        "predicted": predicted.tolist(),
    }


def write_outcomes(directory: Path, splits: Mapping[str, dict[str, Any]]) -> None:
    """outcomes.json. A folder that cannot be written any more costs a warning, and not the run."""
    try:
        write_json(directory / OUTCOMES, splits)
    except OSError as error:
        log.warning("%s: cannot be written (%s)", directory / OUTCOMES, error.strerror or error)
