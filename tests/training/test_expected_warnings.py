"""Expected warnings are ignored, and no others."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from fusion.config.task import TaskConfig
from fusion.training.expected_warnings import ignore_expected_warnings
from fusion.training.predictions import score


def test_metrics_of_a_regression_emit_no_warnings() -> None:
    task = TaskConfig(kind="regression", text="text", metrics=["pearson", "spearman"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ignore_expected_warnings()
        score(task, torch.ones(4, 1), np.ones(4))
        warnings.warn("Cannot locate reference to <class 'X'>, so it cannot be pickled", stacklevel=1)
    assert [str(warning.message) for warning in seen] == []


def test_other_warnings_are_shown() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ignore_expected_warnings()
        warnings.warn("an overflow", stacklevel=1)
    assert len(seen) == 1
