"""The rows that a stored adapter was trained on, read again by what its manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config.data import DataConfig, LimitConfig
from fusion.data.encode import EncodedRows, encode
from fusion.data.rows import load_splits
from fusion.errors import UserError
from fusion.store.trained_data import as_trained

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


def source_rows(source: Manifest, data: DataConfig, at_most: int, tokenizer: Any) -> list[EncodedRows]:
    """The training rows of each task that the source was trained on, at most so many in all.

    They are looked for where the source's run found them, then in the `data.dir` of this command. A limit draws
    the first of a fixed shuffle, so those of a smaller limit are among those of the source's own.

    Raises:
        UserError: they are in none of these places; what the first of them said.
    """
    found = []
    for trained in source.tasks:
        task = trained.as_config(source.name)
        own = source.run.config.get("data.limit.train")
        limit = max(2, at_most // len(source.tasks))
        limit = min(own, limit) if isinstance(own, int) else limit
        errors: list[UserError] = []
        for place in _places(source, data):
            where = as_trained(source, DataConfig(dir=place, limit=LimitConfig(train=limit)), task.name)
            try:
                rows, _ = load_splits(task, where, ["train"], source.labels_read_as(task.name))
            except UserError as error:
                errors.append(error)
                continue
            assert data.max_length is not None
            found.append(encode(rows["train"], tokenizer, data.max_length, data.cache_dir))
            break
        else:
            raise errors[0]
    return found


def _places(source: Manifest, data: DataConfig) -> list[str | None]:
    """Values of `data.dir` to try, in order; None: the hub, or the task's own corpus."""
    own, folder = source.run.config.get("data.dir"), source.run.folder
    places: list[str | None] = []
    if isinstance(own, str):
        if isinstance(folder, str):
            places.append(str(Path(folder) / Path(own).expanduser()))
        places.append(own)
    if data.dir is not None:
        places.append(data.dir)
    if not isinstance(own, str):
        places.append(None)
    return list(dict.fromkeys(places))
