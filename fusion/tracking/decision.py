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


def is_first_notice() -> bool:
    """Whether no job of this command has reported yet that W&B is offline or disabled. Asking counts as a report."""
    if not (file := os.environ.get(VARIABLE)):
        return True
    try:
        Path(f"{file}.reported").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the folder may be another machine's
        return True
    return True


def name_sweep(folder: Path) -> None:
    """Keep the folder of all jobs, which one notice is for."""
    if file := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError):
            Path(f"{file}.sweep").write_text(str(folder.absolute()), encoding="utf-8")


def sweep_folder() -> Path | None:
    """The folder of the sweep that this process's job belongs to; None: it belongs to none, or to one elsewhere."""
    if file := os.environ.get(VARIABLE):
        with contextlib.suppress(OSError, ValueError):
            return Path(Path(f"{file}.sweep").read_text(encoding="utf-8"))
    return None


@contextlib.contextmanager
def shared_decision() -> Iterator[None]:
    """Share the decision with all processes that are started inside."""
    if os.environ.get(VARIABLE):
        yield
        return
    with contextlib.ExitStack() as stack:
        folder = None
        with contextlib.suppress(OSError):  # a full disk is reported where it matters
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="fusion-wandb-", ignore_cleanup_errors=True)
            )
        if folder is None:  # each process decides for itself
            yield
            return
        os.environ[VARIABLE] = str(Path(folder) / "offline")
        try:
            yield
        finally:
            os.environ.pop(VARIABLE, None)
