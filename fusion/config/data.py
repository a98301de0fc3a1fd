"""Rows, splits, lengths and batches."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Optional

from fusion.config.fields import MAX_SEED, Settings, choice, integer, number, require
from fusion.errors import UserError
from fusion.text import override


@dataclass
class LimitConfig(Settings, group="data.limit"):
    """How many rows of each split to keep, drawn with a separate seed."""

    train: Optional[int] = integer(None, 1, null="all rows")
    validation: Optional[int] = integer(None, 1, null="all rows")
    test: Optional[int] = integer(None, 1, null="all rows")


@dataclass
class SplitConfig(Settings, group="data.split"):
    """Fractions of the training rows that become the splits which a task does not have."""

    validation: Optional[float] = number(None, "> 0 and < 1", hint=", such as 0.1", null="no such split")
    test: Optional[float] = number(None, "> 0 and < 1", hint=", such as 0.1", null="no such split")
    seed: int = integer(0, 0, MAX_SEED)  # of the draw, independent of the run's seed
    stratify: bool = False  # classification: each part has the labels in the same proportions

    def __post_init__(self) -> None:
        super().__post_init__()
        total = (self.validation or 0.0) + (self.test or 0.0)
        require(
            total < 1.0,
            f"data.split.validation={self.validation} and data.split.test={self.test} leave nothing to train on: "
            "expected less than 1 together",
        )
        if total == 0.0 and (unused := self.overrides()):
            raise UserError(
                f"{unused[0]}: no split is made; set data.split.validation=0.1, data.split.test=0.1 or both, or leave it out"
            )

    def overrides(self) -> list[str]:
        """What differs from the defaults, as overrides."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return [override(f"data.split.{key}", value) for key, value in values.items()]


@dataclass
class DataConfig(Settings, group="data"):
    dir: Optional[str] = None  # read DIR/<task>/<split>.parquet (jsonl, …, conll), not the hub
    quoting: Optional[str] = choice(None, ("csv", "none"), null="csv in CSV files, none in TSV files")
    limit: LimitConfig = field(default_factory=LimitConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    # Tokens of a text or pair, special ones included. Null is for artifacts that are used, not for training.
    max_length: Optional[int] = integer(128, 4, hint=" tokens", null="the artifact's own")
    batch_size: int = integer(32, 1, hint=" row")  # per device
    tokens_per_batch: Optional[int] = integer(None, 4, null="data.batch_size rows")  # padded, per device
    workers: int = integer(0, 0)  # loader processes; batches are only gathered there, so 0 is mostly fastest
    cache_dir: Optional[str] = None  # tokenised rows; null: the user's cache folder

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.tokens_per_batch is None or self.tokens_per_batch >= (self.max_length or 0),
            f"data.tokens_per_batch={self.tokens_per_batch}: expected >= {self.max_length}, so that a text of "
            f"data.max_length={self.max_length} tokens fits, or null for data.batch_size rows",
        )


def require_max_length(data: DataConfig) -> None:
    """Refuse null, which only an artifact gives a meaning."""
    require(data.max_length is not None, "data.max_length=null: expected a number of tokens >= 4, such as 128")
