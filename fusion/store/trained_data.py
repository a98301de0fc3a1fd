"""How an artifact's training read its data, for commands that read the same rows again."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.config.data import DataConfig, SplitConfig
from fusion.errors import UserError

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

log = logging.getLogger(__name__)


def data_folder_of(manifest: Manifest) -> str | None:
    """What data.dir was; None: the rows came from the hub or from PyPI.

    A relative folder that is not here is looked for where the training was started.
    """
    trained = manifest.run.config.get("data.dir")
    if not isinstance(trained, str):
        return None
    there = Path(str(manifest.run.folder or ".")) / trained
    return str(there) if not Path(trained).is_dir() and there.is_dir() else trained


def note_ambiguous_labels(manifest: Manifest) -> None:
    """Warn of an artifact of version 0.1 whose labels may have been read wrongly.

    That version read a column that was typed as booleans or integers as ids, even where the label names are truth
    values or numbers in another order, such as `["true", "false"]` or `[1, 2, 3]`. It did not record which it did.
    """
    for task in manifest.tasks:
        names = [str(name) for name in task.labels or ()]
        if manifest.labels_read_as(task.name) is None and not task.label_values and _look_like_ids(names):
            log.warning(
                "%s: version 0.1 may have read the labels %s of %s as ids, which mean others; if its scores are wrong, "
                "train it again with overwrite=true",
                manifest.name,
                ", ".join(names),
                task.name,
            )


def _look_like_ids(names: list[str]) -> bool:
    """Whether a name is the id of another label, or as a truth value would be."""
    ids = [
        {"false": 0, "true": 1}.get(name.lower(), int(name) if name.isdecimal() else None) for name in names
    ]
    return any(id is not None and id != number for number, id in enumerate(ids))


def split_of(manifest: Manifest) -> SplitConfig:
    """The `data.split` of the training.

    Raises:
        UserError: the manifest has a value that is none.
    """
    keys = [field.name for field in fields(SplitConfig)]
    config = manifest.run.config
    try:
        return SplitConfig(
            **{key: config[f"data.split.{key}"] for key in keys if f"data.split.{key}" in config}
        )
    except (UserError, TypeError) as error:
        raise UserError(f"manifest of {manifest.name}: run.config: {error}") from None


def as_trained(manifest: Manifest, data: DataConfig, task: str | None) -> DataConfig:
    """`data`, with the splits that training made of the rows of this task, and its `data.quoting` where none is set.

    Args:
        task: the name of the task whose rows are read. Of a task that the artifact was not trained on, `data` itself.

    Raises:
        UserError: `data.split` is set to something else, so that rows of the training would be scored.
    """
    if task not in manifest.task_names:
        return data
    split = split_of(manifest)
    if data.split not in (SplitConfig(), split):
        asked, trained = (" ".join(one.overrides()) or "none" for one in (data.split, split))
        raise UserError(
            f"{asked}: {manifest.name} was trained with another ({trained}), and other splits would hold "
            "rows that it was trained on\nLeave data.split out: the splits are those of the training"
        )
    quoting = data.quoting or manifest.run.config.get("data.quoting")
    return replace(data, split=split, quoting=quoting if quoting in ("csv", "none") else None)
