"""A W&B run's id: the same whenever the run is taken up again, another once it begins anew.

It lies beside the run's checkpoints, which go when the run is done or begins anew (`resume=false`).
"""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

from fusion.files import write_json

FILE = "wandb.json"
KEPT = r"[\w.-]{1,64}"


def run_id(folder: Path | None, identity: str) -> str | None:
    """The id of the run whose checkpoints lie in `folder`, kept there for the next time.

    Where an agent of W&B's sweeps has given the run an id already, that one stays.

    Args:
        identity: the hash of what the run is; the id begins with it.

    Returns:
        None: whatever W&B takes.
    """
    if os.environ.get("WANDB_SWEEP_ID") and (given := os.environ.get("WANDB_RUN_ID")):
        return given
    if folder is None:
        return None
    file = folder / FILE
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["id"]
        if isinstance(known, str) and re.fullmatch(KEPT, known):
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the first time, or not readable: a new one
    fresh = f"{identity}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"id": fresh})
    except OSError:
        pass  # a full disk says so itself; this run has an id all the same
    return fresh
