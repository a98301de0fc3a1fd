"""Which stored adapters are no source of a fusion unless the user names them: debug runs and diverged trainings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

DEBUG = "-debug"  # ending of the name of what debug=NAME trains
DIVERGED = "-diverged"  # ending of the name of what was best before the loss was no longer finite


def why_unfit(manifest: Manifest) -> str | None:
    """Why `sources=all`, a ranking and proposed commands leave an adapter out; None: they do not."""
    if manifest.name.endswith(DEBUG):
        return "trained with debug="
    if manifest.name.endswith(DIVERGED) or manifest.result.diverged:
        return "its training diverged"
    return None
