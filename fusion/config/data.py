"""Settings of splits, sequence lengths and batches."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Optional

from fusion.config.fields import MAX_SEED, Settings, checked, choice, integer, number, require
from fusion.errors import UserError
from fusion.text import override


@dataclass
class LimitConfig(Settings, group="data.limit"):
    """Maximum number of examples per split, sampled with a fixed seed."""

    train: Optional[int] = integer(None, 1, null="all examples")
    validation: Optional[int] = integer(None, 1, null="all examples")
    test: Optional[int] = integer(None, 1, null="all examples")
    train_seed: Optional[int] = integer(None, 0, MAX_SEED, null="the seed of the other splits")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.train_seed is None or self.train is not None,
            f"data.limit.train_seed={self.train_seed}: has no effect without data.limit.train=N; leave it out",
        )


@dataclass
class SplitConfig(Settings, group="data.split"):
    """Fractions of the training examples to hold out as splits that a task does not have."""

    validation: Optional[float] = number(None, "> 0 and < 1", hint=", such as 0.1", null="no such split")
    test: Optional[float] = number(None, "> 0 and < 1", hint=", such as 0.1", null="no such split")
    seed: int = integer(0, 0, MAX_SEED)  # sampling seed, independent of the run's seed
    stratify: bool = False  # classification: preserve the label proportions in each split

    def __post_init__(self) -> None:
        super().__post_init__()
        total = (self.validation or 0.0) + (self.test or 0.0)
        require(
            total < 1.0,
            f"data.split.validation={self.validation} and data.split.test={self.test} leave no training examples: "
            "expected a sum below 1",
        )
        if total == 0.0 and (unused := self.overrides()):
            raise UserError(
                f"{unused[0]}: only applies to held-out splits; set data.split.validation=0.1, data.split.test=0.1 or both, or leave it out"
            )

    def overrides(self) -> list[str]:
        """Return the values that differ from the defaults, as overrides."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return [override(f"data.split.{key}", value) for key, value in values.items()]


class Fold(NamedTuple):
    """A fold of the examples of a split, and the number of folds."""

    fold: int
    folds: int

    @classmethod
    def parse(cls, text: str) -> Fold:
        """Parse "FOLD/FOLDS", such as 0/5. Raises ValueError if it has another format."""
        fold, folds = map(int, re.fullmatch(r"(\d{1,4})/(\d{1,4})", text).groups())  # type: ignore[union-attr]
        if not (fold < folds and folds >= 2):
            raise ValueError(text)
        return cls(fold, folds)

    @classmethod
    def each(cls, folds: int) -> list[Fold]:
        """Return one for each fold."""
        return [cls(fold, folds) for fold in range(folds)]

    def __str__(self) -> str:
        return f"{self.fold}/{self.folds}"

    @property
    def suffix(self) -> str:
        """Ending of the name of an artifact that was trained without the fold."""
        return f"-without-{self.fold}-of-{self.folds}"


def _is_fold(value: Any) -> bool:
    try:
        return value is None or bool(Fold.parse(value))
    except (AttributeError, TypeError, ValueError):
        return False


@dataclass
class DataConfig(Settings, group="data"):
    dir: Optional[str] = None  # read DIR/<task>/<split>.parquet (jsonl, …, conll) instead of the Hub
    quoting: Optional[str] = choice(None, ("csv", "none"), null="csv in CSV files, none in TSV files")
    limit: LimitConfig = field(default_factory=LimitConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    leave_out: Optional[str] = checked(  # the fold of the training examples that is not used
        None, _is_fold, "FOLD/FOLDS such as 0/5, the first of five folds of the training examples, or null for none"
    )
    validation_fold: Optional[str] = checked(  # the only fold of the validation examples that is used
        None, _is_fold, "FOLD/FOLDS such as 0/3, the first of three folds of the validation examples, or null for all"
    )
    # Tokens per text or pair, including special tokens. Null is only valid with a stored artifact, not in training.
    max_length: Optional[int] = integer(128, 4, hint=" tokens", null="the artifact's own")
    batch_size: int = integer(32, 1, hint=" example")  # per device
    tokens_per_batch: Optional[int] = integer(None, 4, null="data.batch_size examples")  # padded tokens per device
    workers: int = integer(0, 0)  # DataLoader workers; they only collate batches, so 0 is usually fastest
    cache_dir: Optional[str] = None  # for token ids; null: the user's cache folder

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.tokens_per_batch is None or self.tokens_per_batch >= (self.max_length or 0),
            f"data.tokens_per_batch={self.tokens_per_batch}: expected >= {self.max_length} "
            "(data.max_length), or null for data.batch_size examples",
        )


def require_max_length(data: DataConfig) -> None:
    """Raise UserError if `max_length` is null, which is only valid with a stored artifact."""
    require(data.max_length is not None, "data.max_length=null: expected a number of tokens >= 4, such as 128")
