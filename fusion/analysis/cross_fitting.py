"""Which sources stage 2 trains with: source dropout, and the folds of cross-fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusion.config.data import DataConfig
from fusion.config.stages import Stage2Config
from fusion.config.task import TaskConfig
from fusion.data.rows import folds_of, load_rows
from fusion.errors import UserError
from fusion.runs.inputs import Inputs
from fusion.store.compatibility import own_adapters
from fusion.training.source_sampling import SourceSampling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fusion.store.manifest import Manifest


def source_sampling(config: Stage2Config, inputs: Inputs) -> SourceSampling | None:
    """Return how the sources of each training batch are sampled, or `None` if all are always active.

    Raises UserError if an artifact of a fold was not trained on the examples of the other folds.
    """
    asked, task = config.composition, config.task
    assert task is not None
    folds = None
    if asked.cross_fit is not None:
        folds = checked_folds(task, config.data, asked.cross_fit, inputs.folds)
    if folds is None and not asked.source_dropout:
        return None
    total = len(inputs.sources)
    dropped = range(total) if asked.dropped == "all" else own_adapters(inputs.sources, task.name)
    return SourceSampling(total, asked.source_dropout, tuple(dropped), folds)


def checked_folds(
    task: TaskConfig, data: DataConfig, count: int, artifacts: Mapping[int, Sequence[Manifest]]
) -> NDArray[np.int64]:
    """Return the fold of each training example (n,).

    Raises UserError if an artifact was not trained on exactly the training examples outside its fold.

    Args:
        artifacts: artifacts in the order of the folds, by the index of their source.
    """
    rows = load_rows(task, data, "train")
    folds = folds_of(task, rows, count)
    for fold in range(count):
        expected = rows.taken(np.flatnonzero(folds != fold).tolist()).with_fingerprint().fingerprint
        for each in artifacts.values():
            if each[fold].data.fingerprints.get("train") != expected:
                raise UserError(
                    f"composition.cross_fit={count}: {each[fold].name} was not trained on the examples of this run without "
                    f"fold {fold}\nSet data.limit.train, data.limit.train_seed, data.split and data.dir as in that run, or "
                    "retrain the target's adapters on these examples"
                )
    return folds
