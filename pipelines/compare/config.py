"""What a comparison is told: a few settings of its own, and words that both stages get as they are."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from fusion.cli.config_sources import conf_folder, keys_of, user_conf_folders
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.errors import UserError
from pipelines.commands import read_config
from pipelines.compare.rows import IDS, NEED_SOURCES, Row, chosen

# What the comparison says itself to the stages, and the setting (if there is one) that it takes it from.
SAID_HERE = {
    "store": "output=DIR",
    "name": "output=DIR",
    "overwrite": "output=ANOTHER, or that what is to be trained again is removed from the store",
    "seed": "seeds=[0,1]",
    "optim.lr": "rates=[5e-4]",
    "hydra.sweep.dir": "output=DIR",
    "hydra.run.dir": "output=DIR",
}
SAID_WITH_A_BUDGET = {
    "trainer.max_epochs": "epochs=5",
    "optim.patience": "patience=3",
    "data.batch_size": "batch_size=16",
}
UNFIT_IN_A_PATH = set(",=[]{}()'\"$\\")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass
class CompareConfig:
    sources: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)  # ids of rows; none: all
    equal_budget: bool = True  # the same epochs, patience and grid of rates for every row
    rates: list[float] = field(default_factory=lambda: [5e-5, 5e-4, 5e-3])
    epochs: int = 5
    batch_size: int = 16  # few rows a batch: on a small target, many steps an epoch
    patience: int | None = 3
    seeds: list[int] = field(default_factory=lambda: [0])
    source_rows: int = 1000  # of each source, and of each task of a multi-task row
    source_epochs: int = 2  # of both, too
    output: str | None = None  # null: outputs/compare/TARGET

    def __post_init__(self) -> None:
        for key in ("sources", "methods", "rates", "seeds"):
            values = getattr(self, key)
            _require(len(set(values)) == len(values), f"{key}={_listed(values)}: expected each once")
        for key, example in (("rates", "5e-5,5e-4"), ("seeds", "0,1,2")):
            _require(
                len(getattr(self, key)) > 0, f"{key}=[]: expected one or more, such as {key}=[{example}]"
            )
        for rate in self.rates:
            _require(0 < rate < 1e3, f"rates={_listed(self.rates)}: expected numbers above 0, such as 5e-4")
        for seed in self.seeds:
            _require(0 <= seed < 2**32, f"seeds={_listed(self.seeds)}: expected numbers from 0 to 4294967295")
        for key in ("epochs", "batch_size", "patience", "source_rows", "source_epochs"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"{key}={value}: expected at least 1")
        unknown = [name for name in self.methods if name not in IDS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], IDS, 3)
            meant = f": did you mean {' or '.join(near)}?" if near else "."
            raise UserError(f"methods: there is no {unknown[0]}{meant} Known: {', '.join(IDS)}")
        unfit = UNFIT_IN_A_PATH & set(self.output or "")
        _require(not unfit, f"output={self.output}: expected a path without {' '.join(sorted(unfit))}")


@dataclass(frozen=True)
class Settings:
    """A comparison's settings, the target, and the words that both stages get."""

    config: CompareConfig
    target: str
    words: tuple[str, ...]

    @property
    def output(self) -> Path:
        return Path(self.config.output or f"outputs/compare/{self.target}")

    @property
    def store(self) -> Path:
        return self.output / "store"

    @cached_property
    def rows(self) -> list[Row]:
        return chosen(self.config.methods)

    @property
    def need_sources(self) -> bool:
        return any(row.blanks & NEED_SOURCES for row in self.rows)

    def word(self, key: str) -> str | None:
        """The value that was handed on for a key, None where there is none."""
        return next((word.partition("=")[2] for word in self.words if key_of(word) == key), None)


def key_of(word: str) -> str:
    """`+task=cb` -> `task`."""
    return word.lstrip("+~").partition("=")[0]


def tasks() -> dict[str, Path]:
    """The task files that there are, the project's and the user's own, by name."""
    folders = [conf_folder(), *user_conf_folders()]
    return {file.stem: file for folder in folders for file in sorted((folder / "task").glob("*.yaml"))}


def read_settings(arguments: list[str]) -> Settings:
    """The comparison that a command line asks for.

    Raises:
        UserError: no target or several, a key that neither the comparison nor both stages have, or a value of
            the wrong type or out of its range.
    """
    own = {setting.name for setting in fields(CompareConfig)}
    config = read_config(CompareConfig, [word for word in arguments if word.partition("=")[0] in own])
    others = [word for word in arguments if word.partition("=")[0] not in own]
    target = _target([word for word in others if key_of(word) == "task"])
    words = [word for word in others if key_of(word) != "task"]
    for word in words:
        _check_word(word, config)
    settings = Settings(config, target, tuple(words))
    if (settings.need_sources or any("tasks" in row.blanks for row in settings.rows)) and not config.sources:
        raise UserError(
            "no sources: say 'sources=[snli,mrpc]', names of adapters in the store or of tasks to train them on;\n"
            "only rows of one task alone do without: methods=[head,pfeiffer]"
        )
    return settings


def _target(words: list[str]) -> str:
    known = tasks()
    names = [word.partition("=")[2] for word in words]
    if len(names) != 1 or not words[0].startswith("+") or set(names[0]) & set(",[]"):
        said = " ".join(words) or "no task"
        raise UserError(f"{said}: expected one target, +task=NAME, one of {', '.join(known)}")
    if names[0] not in known:
        near = difflib.get_close_matches(names[0], known, 3)
        meant = f": did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
        raise UserError(f"unknown task {names[0]!r}{meant}")
    return names[0]


def _check_word(word: str, config: CompareConfig) -> None:
    """Refuse a word that not both stages take, before anything is trained."""
    key, equals, _ = word.lstrip("+~").partition("=")
    if not equals:
        raise UserError(
            f"{word}: expected KEY=VALUE; the comparison runs its sweeps itself (--help lists the keys)"
        )
    taken = SAID_HERE | (SAID_WITH_A_BUDGET if config.equal_budget else {})
    if key == "optim.lr" and not config.equal_budget:
        return
    if key in taken:
        more = ", or equal_budget=false" if key in SAID_WITH_A_BUDGET else ""
        raise UserError(f"{word}: the comparison says {key} itself; expected {taken[key]}{more}")
    if key.startswith("hydra") or key == "experiment":
        return
    one, two = keys_of(Stage1Config), keys_of(Stage2Config)
    if key in one and key in two:
        return
    if key in one or key in two:
        stage = "stage 1" if key in one else "stage 2"
        raise UserError(
            f"{word}: only {stage} has {key}, and a word is handed on to both stages; "
            "what differs between the methods is in pipelines/compare/rows.py"
        )
    own = list(asdict(CompareConfig()))
    near = difflib.get_close_matches(key, [*own, *(known for known in one if known in two)], 3)
    meant = f": did you mean {' or '.join(near)}?" if near else f"; expected one of {', '.join(own)}"
    raise UserError(f"unknown key {key}{meant}")


def _listed(values: list[Any]) -> str:
    return f"[{','.join(map(str, values))}]"
