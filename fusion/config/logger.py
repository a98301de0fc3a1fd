"""W&B and CSV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from fusion.config.fields import Settings, checked, choice, integer

WANDB_MODES = ("online", "offline", "disabled")


def _wandb_name(default: str | None) -> Any:
    def accepts(value: str | None) -> bool:
        if value is None:
            return default is None
        allowed = all(c.isprintable() and c not in "/\\#?%:" for c in value)
        return bool(value.strip()) and len(value) <= 128 and allowed

    return checked(default, accepts, "a name of 1 to 128 characters without / \\ # ? % :")


@dataclass
class WandbConfig(Settings, group="logger.wandb"):
    project: str = _wandb_name("adapter-fusion")
    entity: Optional[str] = _wandb_name(None)
    mode: Optional[str] = choice(None, (*WANDB_MODES, "dryrun"), null="online where a key is set")
    init_timeout: int = integer(10, 1, hint=" second")  # for the server's answer; then offline


@dataclass
class CsvConfig(Settings, group="logger.csv"):
    flush_every_n_steps: int = integer(50, 1)


@dataclass
class LoggerConfig:
    wandb: Optional[WandbConfig] = None
    csv: Optional[CsvConfig] = None
