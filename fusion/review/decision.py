"""Whether W&B is used online: decided once, and remembered by the later jobs of a sweep and by their DDP processes.

A server that does not answer is waited for once. The decision is shared through a file that the processes started
by this one find by an environment variable; processes elsewhere decide for themselves.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "FUSION_WANDB_DECISION"
_reason: str | None = None


def remember_offline(reason: str) -> None:
    """Keep everything that follows offline."""
    global _reason
    _reason = reason
    if file := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):  # the folder may be another machine's
            Path(file).write_text(reason, encoding="utf-8")


def offline_reason() -> str | None:
    """Why W&B is offline from now on; None: nothing has gone wrong so far."""
    global _reason
    if _reason is None and (file := os.environ.get(VARIABLE)):
        with contextlib.suppress(OSError, ValueError):
            _reason = Path(file).read_text(encoding="utf-8") or None
    return _reason


@contextlib.contextmanager
def shared_decision() -> Iterator[None]:
    """Share the decision with all processes that are started inside."""
    if os.environ.get(VARIABLE):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="fusion-wandb-", ignore_cleanup_errors=True) as folder:
        os.environ[VARIABLE] = str(Path(folder) / "offline")
        try:
            yield
        finally:
            os.environ.pop(VARIABLE, None)
