"""W&B and CSV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from fusion.config.checks import in_range, require

WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class WandbConfig:
    project: str = "adapter-fusion"
    entity: Optional[str] = None
    mode: Optional[str] = None  # online, offline, disabled; null: online where a key is set
    init_timeout: int = 10  # seconds to wait for the server before going offline

    def __post_init__(self) -> None:
        require(
            self.mode is None or self.mode in (*WANDB_MODES, "dryrun"),
            f"logger.wandb.mode={self.mode}: expected {', '.join(WANDB_MODES)}, or null",
        )
        for key, value in (("project", self.project), ("entity", self.entity)):
            wrong = value is not None and (
                not value.strip()
                or len(value) > 128
                or any(c in "/\\#?%:" or not c.isprintable() for c in value)
            )
            require(
                not wrong,
                f"logger.wandb.{key}={value!r:.200}: expected a name of 1 to 128 characters without / \\ # ? % :",
            )
        in_range("logger.wandb.init_timeout", self.init_timeout, at_least=1, hint=" second")


@dataclass
class CsvConfig:
    flush_every_n_steps: int = 50

    def __post_init__(self) -> None:
        in_range("logger.csv.flush_every_n_steps", self.flush_every_n_steps, at_least=1)


@dataclass
class LoggerConfig:
    wandb: Optional[WandbConfig] = None
    csv: Optional[CsvConfig] = None
