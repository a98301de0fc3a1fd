"""The folder that an artifact's rows were read from, for commands that read them again."""

from __future__ import annotations

from pathlib import Path

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
