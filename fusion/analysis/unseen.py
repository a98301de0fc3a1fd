"""Refuse to evaluate on rows that an artifact may have been trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from fusion.config.data import DataConfig, LimitConfig
from fusion.config.task import TaskConfig
from fusion.data.rows import load_rows
from fusion.data.splits import drawn_from_train
from fusion.errors import UserError
from fusion.store.compatibility import split_of

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


def check_unseen(
    manifests: Iterable[Manifest | None], task: TaskConfig, data: DataConfig, split: str = "validation"
) -> None:
    """Refuse a split of rows that one of the artifacts may have been trained on.

    A split that is drawn from the training rows (by `data.split`, or by `hub.splits` such as `train[:90%]`) is disjoint
    from the rows of an earlier training only if that training had exactly the remaining rows. It had not if the file
    has changed since, or with another share or seed. Artifacts that were not trained on this task are skipped.

    Raises:
        UserError: the remaining rows differ.
    """
    trained = [one for one in manifests if one and task.name in one.task_names]
    if not trained or not drawn_from_train(task, data, split):
        return
    fingerprints: dict[int | None, str] = {}  # by the limit of the training
    for manifest in trained:
        limit = manifest.run.config.get("data.limit.train")
        limit = limit if isinstance(limit, int) else None
        if limit not in fingerprints:
            rows = load_rows(task, replace(data, limit=LimitConfig(train=limit)), "train")
            fingerprints[limit] = rows.fingerprint
        key = "train" if manifest.multitask is None else f"{task.name}/train"
        if manifest.data.fingerprints.get(key) != fingerprints[limit]:
            drawn = split_of(manifest)
            fix = "The data has changed since: restore it"
            if drawn != data.split:
                fix = f"Set {' '.join(drawn.overrides()) or 'no data.split'} as in that training"
            raise UserError(
                f"task {task.name}: its {split} split is drawn from the training rows, and may have rows that "
                f"{manifest.name} was trained on\n{fix}, train {manifest.name} again with overwrite=true, or give the "
                f"task a {split} file"
            )
