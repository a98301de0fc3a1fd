"""The command that trains a row, and the artifacts that it stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.text import key_of
from pipelines.commands import typed
from pipelines.compare.config import Comparison
from pipelines.compare.rows import MULTITASK, Row

SOURCE_RATE = 5e-4


@dataclass(frozen=True)
class Training:
    """A sweep: its command, the names of its artifacts by learning rate (None: no grid), and the folder of its runs."""

    module: str
    overrides: tuple[str, ...]
    artifacts: dict[float | None, list[str]]
    folder: Path

    def __str__(self) -> str:
        return typed(self.module, self.overrides)

    @property
    def names(self) -> list[str]:
        return [name for names in self.artifacts.values() for name in names]


def row_training(comparison: Comparison, row: Row, values: Mapping[str, str]) -> Training:
    """The command of a row: a sweep over the learning rates and the seeds.

    Args:
        values: replacements of the row's names in braces.
    """
    config = comparison.config
    own = row.words.format_map(values).split()
    grid = config.equal_budget and row.trains
    budget = []
    if row.group == MULTITASK:
        budget = [f"data.limit.train={config.source_rows}", f"trainer.max_epochs={config.source_epochs}"]
    else:
        own.insert(0, f"+task={comparison.target}")
        if grid and "trainer.max_epochs" not in map(key_of, own):
            budget.append(f"trainer.max_epochs={config.epochs}")
        if grid:
            budget.append(f"data.batch_size={config.batch_size}")
    swept = [f"seed={','.join(map(str, config.seeds))}"]
    if grid:
        budget.append(f"optim.patience={'null' if config.patience is None else config.patience}")
        swept.insert(0, f"optim.lr={','.join(map(str, config.rates))}")
    name = artifact_name(comparison, row.id, "${optim.lr}" if grid else None)
    artifacts = {
        rate: [name.replace("${optim.lr}", str(rate)).replace("${seed}", str(seed)) for seed in config.seeds]
        for rate in (config.rates if grid else [None])
    }
    words = [*_merged(own, comparison.words, budget), *swept, f"name={name}"]
    return _training(comparison, row.module, row.id, words, artifacts)


def artifact_name(comparison: Comparison, id: str, rate: float | str | None) -> str:
    """The name of a row's artifacts, with `${seed}` unless the only seed is 0."""
    seed = "" if comparison.config.seeds == [0] else "-seed-${seed}"
    return f"{comparison.target}-{id}{'' if rate is None else f'-lr-{rate}'}{seed}"


def source_trainings(comparison: Comparison, tasks: Sequence[str], drop: int | None = None) -> list[Training]:
    """The commands that train source adapters: one, and another for the target if it has fewer examples.

    Args:
        drop: number of first layers without adapters; the artifacts are then named TASK-dropped.
    """
    config, limit = comparison.config, comparison.word("data.limit.train")
    groups: dict[int, list[str]] = {}
    for task in tasks:
        # As a source, the target has no more examples than as the target.
        fewer = task == comparison.target and limit is not None and limit.isdigit()
        rows = min(config.source_rows, int(limit or 0)) if fewer else config.source_rows
        groups.setdefault(rows, []).append(task)
    suffix, own = ("", []) if drop is None else ("-dropped", [f"adapter.drop=specialized:{drop}"])
    trainings = []
    for rows, group in groups.items():
        budget = [f"data.limit.train={rows}", f"trainer.max_epochs={config.source_epochs}", f"optim.lr={SOURCE_RATE}"]
        words = [f"+task={','.join(group)}", *_merged(own, comparison.words, budget)]
        if suffix:
            words.append(f"name=${{task.name}}{suffix}")
        target = "-target" if len(groups) > 1 and group == [comparison.target] else ""
        artifacts: dict[float | None, list[str]] = {None: [f"{task}{suffix}" for task in group]}
        trainings.append(_training(comparison, "fusion.stage1", f"sources{suffix}{target}", words, artifacts))
    return trainings


def _training(
    comparison: Comparison, module: str, folder: str, words: Sequence[str], artifacts: dict[float | None, list[str]]
) -> Training:
    runs = comparison.output / "runs" / folder
    logger = [] if comparison.word("logger") is not None else ["logger=csv"]
    place = [f"store={comparison.store}", f"hydra.sweep.dir={runs}"]
    return Training(module, ("-m", *words, *logger, *place), artifacts, runs)


def _merged(own: Sequence[str], given: Sequence[str], budget: Sequence[str]) -> list[str]:
    """All overrides, except given ones whose key the comparison sets."""
    keys = {key_of(word) for word in (*own, *budget)}
    return [*own, *(word for word in given if key_of(word) not in keys), *budget]
