"""What a worker is asked to do: one kind of work of one model. Plain data, for both interpreters."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

TRAIN, INFER, FLOOR, LOOP, CLIPPED = "train", "infer", "floor", "loop", "clipped"
FUSION, ADAPTER, BARE, FULL = "fusion", "adapter", "bare", "full"


@dataclass(frozen=True)
class Case:
    """One measured thing.

    work: train (a step), infer (a batch), floor (the matrix products of the training step alone),
        loop (a training step inside Lightning) or clipped (the same step without Lightning).
    method: fusion, adapter (one), bare (no slot_module), full (the whole backbone trains).
    sources: N of a fusion. bottleneck: R; 0 where there is none.
    dropout: whether the rival keeps the dropout that it has by default.
    """

    work: str
    method: str
    sources: int = 0
    bottleneck: int = 0
    dropout: bool = False

    def __str__(self) -> str:
        size = f" of {self.sources}" if self.method == FUSION else ""
        bottleneck = f", R {self.bottleneck}" if self.bottleneck else ""
        return f"{self.work} {self.method}{size}{bottleneck}{', its dropout' if self.dropout else ''}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Setup:
    """What both workers are told before anything else.

    backbone: a folder that both can load. weights: where the adapters, fusions and the head are, see weights.py.
    """

    backbone: str
    weights: str
    batch_size: int
    tokens: int
    threads: int
    seed: int
    device: str = "cpu"
    precision: str = "float32"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
