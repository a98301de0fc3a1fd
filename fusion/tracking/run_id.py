"""The id of a W&B run: the same for every resume of the run, a new one once it starts over.

It is kept with the run's checkpoints, which are removed when the run is done or starts over (`resume=false`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from pathlib import Path

from fusion.files import write_json

FILE = "wandb.json"


def run_id(folder: Path | None, identity: str) -> str | None:
    """The id of the run whose checkpoints are in `folder`, created on first use.

    An agent of a W&B sweep assigns the id itself.

    Args:
        identity: the hash of the run's settings, the prefix of a new id.

    Returns:
        None without a folder: W&B chooses one.
    """
    if os.environ.get("WANDB_SWEEP_ID") and (assigned := os.environ.get("WANDB_RUN_ID")):
        return assigned
    if folder is None:
        return None
    file = folder / FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # the first start, or a damaged file
        known = json.loads(file.read_text(encoding="utf-8"))["id"]
        if re.fullmatch(r"[\w.-]{1,64}", known):
            return str(known)
    new = f"{identity}-{secrets.token_hex(3)}"
    with contextlib.suppress(OSError):  # a full disk is reported by the checkpoints
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {"id": new})
    return new
