"""Rows, splits, lengths and batches."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Optional

from fusion.config.checks import in_range, require
from fusion.text import override


@dataclass
class LimitConfig:
    """How many rows of each split to keep (null: all), drawn with a seed of its own."""

    train: Optional[int] = None
    validation: Optional[int] = None
    test: Optional[int] = None

    def __post_init__(self) -> None:
        for split in ("train", "validation", "test"):
            in_range(f"data.limit.{split}", getattr(self, split), at_least=1, null="all rows")


@dataclass
class SplitConfig:
    """Fractions of the training rows that become the splits which a task does not have."""

    validation: Optional[float] = None
    test: Optional[float] = None
    seed: int = 0  # of the draw, whatever the run's own seed
    stratify: bool = False  # classification: each part has the labels in the same proportions

    def __post_init__(self) -> None:
        for split in ("validation", "test"):
            hint = ", a fraction of the training rows such as 0.1"
            in_range(
                f"data.split.{split}",
                getattr(self, split),
                above=0,
                below=1,
                whole=False,
                hint=hint,
                null="no such split",
            )
        together = (self.validation or 0.0) + (self.test or 0.0)
        require(
            together < 1.0,
            f"data.split.validation={self.validation} and data.split.test={self.test} leave nothing to train on: "
            "expected less than 1 together",
        )
        in_range("data.split.seed", self.seed, at_least=0, at_most=2**32 - 1)
        for key in ("seed", "stratify"):
            require(
                together > 0.0 or not getattr(self, key),
                f"{override(f'data.split.{key}', getattr(self, key))}: no split is made; set data.split.validation=0.1, "
                f"data.split.test=0.1 or both, or leave data.split.{key} out",
            )

    def overrides(self) -> list[str]:
        """What differs from the defaults, as overrides."""
        values = {
            own.name: getattr(self, own.name)
            for own in fields(self)
            if getattr(self, own.name) != own.default
        }
        return [override(f"data.split.{key}", value) for key, value in values.items()]


@dataclass
class DataConfig:
    dir: Optional[str] = None  # read DIR/<task>/<split>.parquet (jsonl, …, conll) in place of the hub
    quoting: Optional[str] = None  # of CSV and TSV files: csv or none; null: csv in CSV, none in TSV
    limit: LimitConfig = field(default_factory=LimitConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    max_length: Optional[int] = (
        128  # tokens of a text or pair, special ones included; null: the artifact's own
    )
    batch_size: int = 32  # rows per device
    tokens_per_batch: Optional[int] = None  # padded tokens per device, in place of batch_size
    workers: int = 0  # loader processes; batches are only gathered there, so 0 is mostly fastest
    cache_dir: Optional[str] = None  # tokenised rows; null: the user's cache folder

    def __post_init__(self) -> None:
        # Null only where an artifact brings its own: `StageConfig` and `RankConfig` ask for a number.
        in_range("data.max_length", self.max_length, at_least=4, null="the artifact's own", hint=" tokens")
        in_range("data.batch_size", self.batch_size, at_least=1, hint=" row")
        least = self.max_length or 4
        in_range(
            "data.tokens_per_batch",
            self.tokens_per_batch,
            at_least=least,
            null="data.batch_size rows",
            hint=f", room for a text of data.max_length={least} tokens",
        )
        require(
            self.quoting in (None, "csv", "none"),
            f"{override('data.quoting', self.quoting)}: expected csv (a field may be in quotes), none (quotes are text), or null: "
            "csv for CSV files, none for TSV files",
        )
        in_range("data.workers", self.workers, at_least=0)
