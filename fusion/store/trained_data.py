"""How an artifact's training read its data, for commands that read the same examples again."""

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
    """What data.dir was; None: the data came from the hub or from PyPI.

    A relative folder that is not here is looked up where the training was started.
    """
    trained = manifest.run.config.get("data.dir")
    if not isinstance(trained, str):
        return None
    there = Path(str(manifest.run.folder or ".")) / trained
    return str(there) if not Path(trained).is_dir() and there.is_dir() else trained


def note_ambiguous_labels(manifest: Manifest) -> None:
    """Warn of an artifact of version 0.1 whose labels may have been read wrongly.

    It read a column of booleans or integers as ids, even where the label names are truth values or numbers in another
    order, such as `["true", "false"]` or `[1, 2, 3]`, and did not record which of the two it did.
    """
    for task in manifest.tasks:
        if manifest.labels_read_as(task.name) is not None or task.label_values:
            continue
        names = [str(name) for name in task.labels or ()]
        ids = [{"false": "0", "true": "1"}.get(name.lower(), name) for name in names]
        if any(id.isdecimal() and int(id) != number for number, id in enumerate(ids)):
            log.warning(
                "%s: version 0.1 may have read the labels %s of %s as ids, which mean others; if its scores are wrong, "
                "train it again with overwrite=true",
                manifest.name,
                ", ".join(names),
                task.name,
            )


def split_of(manifest: Manifest) -> SplitConfig:
    """The `data.split` of the training.

    Raises:
        UserError: the manifest has a wrong value.
    """
    config = manifest.run.config
    keys = [(field.name, f"data.split.{field.name}") for field in fields(SplitConfig)]
    try:
        return SplitConfig(**{name: config[key] for name, key in keys if key in config})
    except (UserError, TypeError) as error:
        raise UserError(f"manifest of {manifest.name}: run.config: {error}") from None


def as_trained(manifest: Manifest, data: DataConfig, task: str | None) -> DataConfig:
    """`data` with the splits of the training for this task, and its `data.quoting` if none is set.

    Args:
        task: the name of the task that is read; for a task that the artifact was not trained on, `data` is returned.

    Raises:
        UserError: `data.split` is set to something else, so that training examples would be scored.
    """
    if task not in manifest.task_names:
        return data
    split = split_of(manifest)
    if data.split not in (SplitConfig(), split):
        asked, trained = (" ".join(one.overrides()) or "none" for one in (data.split, split))
        raise UserError(
            f"{asked}: {manifest.name} was trained with another ({trained}), and other splits would contain examples "
            "that it was trained on\nLeave data.split out: the splits are those of the training"
        )
    quoting = data.quoting or manifest.run.config.get("data.quoting")
    return replace(data, split=split, quoting=quoting if quoting in ("csv", "none") else None)
