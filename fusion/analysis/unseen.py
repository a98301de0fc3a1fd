"""Splits that are drawn from a task's training rows must hold none of those that an artifact was trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fusion.config.data import DataConfig, LimitConfig
from fusion.config.task import TaskConfig
from fusion.data.rows import load_rows
from fusion.data.splits import drawn_from_train
from fusion.errors import UserError
from fusion.store.trained_data import split_of

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


def check_unseen(
    manifests: Iterable[Manifest | None], task: TaskConfig, data: DataConfig, split: str = "validation"
) -> None:
    """Refuse a split that may hold rows which one of the artifacts was trained on.

    `data.split`, or a task whose `hub.splits` are parts such as `train[:90%]`, draws a split from the training rows.
    It is disjoint from what an artifact was trained on only if the rows that remain are those of its training: not
    after the file has changed, nor with another share or seed. Artifacts that were not trained on this task are
    skipped.

    Raises:
        UserError: the remaining rows differ; names the artifact.
    """
    trained = [one for one in manifests if one and task.name in one.task_names]
    if not trained or not drawn_from_train(task, data, split):
        return
    fingerprints: dict[int | None, str] = {}
    for manifest in trained:
        limit = manifest.run.config.get("data.limit.train")
        limit = limit if isinstance(limit, int) else None
        if limit not in fingerprints:
            rows = load_rows(task, dataclasses.replace(data, limit=LimitConfig(train=limit)), "train")
            fingerprints[limit] = rows.fingerprint
        key = "train" if manifest.multitask is None else f"{task.name}/train"
        if manifest.data.fingerprints.get(key) != fingerprints[limit]:
            drawn = split_of(manifest)
            cause = "The data has changed since"
            cure = "restore it"
            if drawn != data.split:
                cause = f"That training had {' '.join(drawn.overrides()) or 'no data.split'}"
                cure = "set the same here"
            raise UserError(
                f"task {task.name}: its {split} split is drawn from the training rows, and those that remain are not "
                f"the rows that {manifest.name} was trained on: it may have been trained on rows of this split\n"
                f"{cause}: {cure}, train {manifest.name} again with overwrite=true, or give the task a {split} file"
            )
