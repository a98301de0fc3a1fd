"""Whether the backbone of a run that is done is still the one that its artifact was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.backbones.files import stamp
from fusion.config.model import BackboneConfig
from fusion.errors import UserError

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


def check_unchanged(stored: Manifest, config: BackboneConfig) -> None:
    """Refuse to take a stored artifact for the result of a run whose backbone folder has changed since.

    The config is the same then, and the numbers would not be. The backbone is loaded only where its files were
    written; manifests of 0.1 do not tell, and a folder that is gone cannot.

    Raises:
        UserError: the weights or the tokenizer differ; has both hashes.
    """
    kept = stored.run.backbone_stamp
    now = stamp(config.name_or_path)
    if kept is None or now is None or kept == now:
        return
    from fusion.backbones.load import load_backbone

    backbone = load_backbone(config.name_or_path, config.revision, config.trust_remote_code)
    here = {"fingerprint": backbone.fingerprint, "tokenizer": backbone.tokenizer_hash}
    differing = [
        f"backbone {key} {str(there)[:8]} there, {value[:8]} here"
        for key, value in here.items()
        if (there := getattr(stored.backbone, key)) not in (None, value)
    ]
    if differing:
        raise UserError(
            f"the store has another {stored.name}, since {config.name_or_path} has changed: {'; '.join(differing)}\n"
            "Keep both with name=ANOTHER, or replace it with overwrite=true"
        )
