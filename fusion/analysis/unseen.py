"""Prevent evaluation on examples that an artifact may have been trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.rows import load_rows
from fusion.data.splits import drawn_from_train
from fusion.errors import UserError
from fusion.store.compatibility import limit_of, split_of

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


def check_unseen(
    manifests: Iterable[Manifest | None], task: TaskConfig, data: DataConfig, split: str = "validation"
) -> None:
    """Raise UserError if a split may contain examples that one of the artifacts was trained on.

    A split that is sampled from the training examples (by `data.split`, or by `hub.splits` such as `train[:90%]`) is
    disjoint from the examples of an earlier training run only if that run used exactly the remaining examples, i.e. with
    the same file, fraction and seed. Artifacts that were not trained on this task are skipped.
    """
    trained = [one for one in manifests if one and task.name in one.task_names]
    if not trained or not drawn_from_train(task, data, split):
        return
    fingerprints: dict[str, str] = {}  # by the settings that select training examples
    for manifest in trained:
        config = manifest.run.config
        limit, left_out = limit_of(manifest, config.get("data.limit.train")), config.get("data.leave_out")
        selected = f"{limit} {left_out}"
        if selected not in fingerprints:
            rows = load_rows(task, replace(data, limit=limit, leave_out=left_out), "train")
            fingerprints[selected] = rows.fingerprint
        key = "train" if manifest.multitask is None else f"{task.name}/train"
        if manifest.data.fingerprints.get(key) != fingerprints[selected]:
            drawn = split_of(manifest)
            fix = "The data has changed since then: restore it"
            if drawn != data.split:
                fix = f"Set {' '.join(drawn.overrides()) or 'no data.split'} as in that run"
            raise UserError(
                f"task {task.name}: its {split} split is sampled from the training examples and may contain examples "
                f"that {manifest.name} was trained on\n{fix}, retrain {manifest.name} with overwrite=true, or add a "
                f"{split} file to the task"
            )
