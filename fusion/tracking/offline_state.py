"""What the jobs of one command share about W&B: why it is offline, and whether the user has been told.

An unresponsive server is waited for once; parallel jobs in other processes decide for themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass
class OfflineState:
    """reason: why later runs are offline. noticed: a notice was given. sweep: the folder that the notice names."""

    reason: str | None = None
    noticed: bool = False
    sweep: Path | None = None

    def first_notice(self) -> bool:
        first, self.noticed = not self.noticed, self.sweep is not None
        return first


state = OfflineState()


def name_sweep(folder: Path) -> None:
    """Record the folder of the sweep, which a single notice covers."""
    state.sweep = folder.absolute()


@contextlib.contextmanager
def shared_decision() -> Iterator[None]:
    """The scope of one command."""
    before = vars(state).copy()
    vars(state).update(vars(OfflineState()))
    try:
        yield
    finally:
        vars(state).update(before)
