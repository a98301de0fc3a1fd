"""How an artifact's training read its data, for commands that read the same rows again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fusion.config import DataConfig, SplitConfig
from fusion.errors import UserError
from fusion.store.manifest import Manifest


def data_folder_of(manifest: Manifest) -> str | None:
    """What data.dir was; None: the rows came from the hub or from PyPI.

    A relative folder that is not here is looked for where the training was started.
    """
    trained = manifest.run["config"].get("data.dir")
    if not isinstance(trained, str):
        return None
    there = Path(str(manifest.run.get("folder") or ".")) / trained
    return str(there) if not Path(trained).is_dir() and there.is_dir() else trained


def as_trained(manifest: Manifest, data: DataConfig, task: str | None) -> DataConfig:
    """`data`, with the splits that training made of the rows of this task, and its `data.quoting` where none is set.

    Args:
        task: the name of the task whose rows are read. Of a task that the artifact was not trained on, `data` itself.

    Raises:
        UserError: `data.split` is set to something else, so that rows of the training would be scored.
    """
    if task not in [
        entry["task"]["name"] for entry in (manifest.multitask or {"": {"task": manifest.task}}).values()
    ]:
        return data
    config = manifest.run["config"]
    keys = ("validation", "test", "seed", "stratify")
    try:
        split = SplitConfig(
            **{key: config[f"data.split.{key}"] for key in keys if f"data.split.{key}" in config}
        )
    except (UserError, TypeError) as error:
        raise UserError(f"manifest of {manifest.name}: run.config: {error}") from None
    if data.split not in (SplitConfig(), split):
        asked, trained = (
            ", ".join(
                f"{key}={getattr(one, key)}"
                for key in keys
                if getattr(one, key) != getattr(SplitConfig(), key)
            )
            or "none"
            for one in (data.split, split)
        )
        raise UserError(
            f"data.split ({asked}): {manifest.name} was trained with another ({trained}), and other splits would hold "
            "rows that it was trained on\nLeave data.split out: the splits are those of the training"
        )
    quoting = data.quoting or config.get("data.quoting")
    return replace(data, split=split, quoting=quoting if quoting in ("csv", "none") else None)
