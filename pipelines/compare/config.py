"""Settings of a comparison, and overrides passed to both stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from fusion.cli.config_sources import conf_folder, keys_of, user_conf_folders
from fusion.config.fields import MAX_SEED, Settings, checked, integer
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.errors import UserError
from fusion.store.lookup import names
from fusion.text import did_you_mean, key_of
from pipelines.commands import distinct, read_config
from pipelines.compare.rows import IDS, NEED_SOURCES, Row, chosen

# Overrides that the comparison sets in every command, and what to set instead.
RESERVED = {
    "store": "output=DIR",
    "name": "output=DIR",
    "overwrite": "a different output=DIR, or remove the artifact from the store",
    "seed": "seeds=[0,1]",
    "hydra.sweep.dir": "output=DIR",
    "hydra.run.dir": "output=DIR",
}
BUDGET = {
    "optim.lr": "rates=[5e-4]",
    "trainer.max_epochs": "epochs=5",
    "optim.patience": "patience=3",
    "data.batch_size": "batch_size=16",
}
UNFIT_IN_A_PATH = set(",=[]{}()'\"$\\")


def _each(default: list[Any], least: float, most: float, expected: str) -> Any:
    def fits(values: list[Any]) -> bool:
        return 0 < len(values) == len(set(values)) and all(least <= value <= most for value in values)

    return checked(default, fits, f"{expected}, without duplicates")


@dataclass
class CompareConfig(Settings):
    sources: list[str] = distinct([], at_least=0)
    methods: list[str] = checked(
        [],
        lambda ids: len(ids) == len(set(ids)) and set(ids) <= set(IDS),
        f"some of {', '.join(IDS)}, without duplicates",
    )
    equal_budget: bool = True
    rates: list[float] = _each([5e-5, 5e-4, 5e-3], 5e-324, 1e3, "numbers above 0 and at most 1000")
    epochs: int = integer(5, 1)
    batch_size: int = integer(16, 1)
    patience: int | None = integer(3, 1, null="no early stopping")
    seeds: list[int] = _each([0], 0, MAX_SEED, f"whole numbers from 0 to {MAX_SEED}")
    source_rows: int = integer(1000, 1)  # training examples of each source, and of each task of multi-task methods
    source_epochs: int = integer(2, 1)
    output: str | None = checked(
        None, lambda path: not UNFIT_IN_A_PATH & set(path or ""), f"a path without {' '.join(sorted(UNFIT_IN_A_PATH))}"
    )


@dataclass(frozen=True)
class Comparison:
    """Settings of a comparison, the target task, and the overrides passed to both stages."""

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
        return any(row.placeholders & NEED_SOURCES for row in self.rows)

    def word(self, key: str) -> str | None:
        """Return the value of an override passed to both stages, or `None` if it is not set."""
        return next((word.partition("=")[2] for word in self.words if key_of(word) == key), None)


def read_comparison(arguments: Sequence[str]) -> Comparison:
    """Parse and check the command line of a comparison."""
    own = {setting.name for setting in fields(CompareConfig)}
    config = read_config(CompareConfig, [word for word in arguments if word.partition("=")[0] in own])
    others = [word for word in arguments if word.partition("=")[0] not in own]
    targets = [word.removeprefix("+task=") for word in others if key_of(word) == "task"]
    folders = [conf_folder(), *user_conf_folders()]
    known = [file.stem for folder in folders for file in sorted((folder / "task").glob("*.yaml"))]
    if len(targets) != 1 or targets[0] not in known:
        near = "".join(did_you_mean(target, known) for target in targets[:1])
        given = " ".join(targets) or "no task"
        raise UserError(
            f"{given}: expected exactly one target +task=NAME out of {', '.join(dict.fromkeys(known))}{near}"
        )
    words = tuple(word for word in others if key_of(word) != "task")
    for word in words:
        _check_word(word, config)
    comparison = Comparison(config, targets[0], words)
    if comparison.need_sources or any("tasks" in row.placeholders for row in comparison.rows):
        if not config.sources:
            raise UserError("sources=[]: the methods require sources; set them, e.g. 'sources=[snli,mrpc]'")
        stored = names(comparison.store)
        if unknown := [source for source in config.sources if source not in (*stored, *known)]:
            raise UserError(
                f"sources: {unknown[0]} is neither an adapter in {comparison.store} ({', '.join(stored) or 'empty'}) nor "
                f"a task; available tasks: {', '.join(known)}"
            )
    return comparison


def _check_word(word: str, config: CompareConfig) -> None:
    key = key_of(word)
    reserved = RESERVED | (BUDGET if config.equal_budget else {})
    if key in reserved:
        more = ", or equal_budget=false" if key in BUDGET else ""
        raise UserError(f"{word}: the comparison sets {key}; expected {reserved[key]}{more}")
    both = set(keys_of(Stage1Config)) & set(keys_of(Stage2Config))
    if "=" not in word or not (key in both or key == "experiment" or key.startswith("hydra")):
        own = [setting.name for setting in fields(CompareConfig)]
        raise UserError(
            f"{word}: expected KEY=VALUE with a key of both stages or of the comparison ({', '.join(own)})"
            f"{did_you_mean(key, [*own, *sorted(both)])}"
        )
