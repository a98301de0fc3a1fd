"""The artifact that a command uses, checked before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fusion.backbones.files import check_files
from fusion.config.commands import UseConfig
from fusion.store.compatibility import check_drop, check_trust
from fusion.store.lookup import read_manifest

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


def usable_manifest(config: UseConfig) -> Manifest:
    """The manifest of `config.artifact`.

    Raises:
        UserError: there is no such artifact, it has fewer layers than `drop`, its backbone runs code of its own that
            is not trusted, or the files of its backbone are damaged.
    """
    manifest = read_manifest(config.artifact, Path(config.store))
    trusted = config.backbone.trust_remote_code
    check_drop(manifest, config.drop)
    check_trust(manifest, trusted)
    check_files(config.backbone.name_or_path or manifest.backbone.name_or_path, trusted)
    return manifest
