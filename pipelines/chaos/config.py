"""Kills real runs at random places, starts them again, and compares what they end with.

    python -m pipelines.chaos kills=100
    python -m pipelines.chaos kills=10 kinds=[adapter,fusion] fork=true

Tiny runs of both stages, in one process and in two, are killed by SIGKILL up to four times each: within a batch, in
a validation, while a checkpoint, a cache or the artifact is half written, between renames, and at any moment; the
process itself, a rank, the process that started the ranks, or all of them. After each death the same command is
started again. Its weights must be those of an undisturbed run, bit for bit, and nobody who looks into the store may
ever see half an artifact.

In OUTPUT: table.md and results.json, and the folders of those runs that did not end as they should.
Exit codes: 0 all were equal, 1 one was not, 2 a wrong command, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion.errors import UserError
from pipelines.chaos.work import KINDS


@dataclass
class ChaosConfig:
    kills: int = 100  # deaths that have to happen
    seed: int = 0  # of what dies where
    output: str = "outputs/chaos"
    jobs: int = 2  # runs at a time
    kinds: list[str] = field(default_factory=list)  # of runs; empty: all
    backbone: str | None = None  # a name of conf/backbone; null: a tiny random one
    fork: bool = (
        False  # victims are forked from a process that has imported all: quicker, no death in an import
    )

    def __post_init__(self) -> None:
        for key in ("kills", "jobs"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: expected at least 1")
        unknown = [name for name in self.kinds if name not in KINDS]
        if unknown:
            raise UserError(f"kinds: {', '.join(unknown)} is none; expected some of {', '.join(KINDS)}")
