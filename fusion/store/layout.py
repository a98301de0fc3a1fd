"""Where the files of a store are.

An artifact is a folder STORE/NAME with `manifest.json`, `weights.safetensors` and `head.safetensors`.
Names that begin with a dot are the store's own: `.runs` (checkpoints), `.replaced` (artifacts that were
overwritten while a fusion still needs them), `.staging` (artifacts being written), `.locks`.
"""

from __future__ import annotations

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
HEAD = "head.safetensors"
REPLACED = ".replaced"
STAGING = ".staging"
OLD = ".old"  # ending of an artifact that is just being replaced, in STAGING
