"""From a row to the command that trains it, and to the artifacts that the command leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.runs.identity import NOT_IDENTITY, NOT_IDENTITY_TRAINER
from pipelines.commands import typed
from pipelines.compare.config import Settings, key_of
from pipelines.compare.rows import MULTITASK, Row

SOURCE_RATE = 5e-4
NOT_COMPARED = {*NOT_IDENTITY, *(f"trainer.{key}" for key in NOT_IDENTITY_TRAINER)}


@dataclass(frozen=True)
class Member:
    """One job of a sweep. `words`: what is typed for it and decides its numbers."""

    name: str
    rate: float | None
    seed: int | None
    words: frozenset[str]


@dataclass(frozen=True)
class Training:
    """A command: a sweep over `members`, whose runs lie in `folder`."""

    module: str
    overrides: tuple[str, ...]
    members: tuple[Member, ...]
    folder: Path

    def __str__(self) -> str:
        return typed(self.module, list(self.overrides))


def row_training(settings: Settings, row: Row, filled: Mapping[str, str]) -> Training:
    """The command of a row: a sweep over the grid's rates and the seeds.

    Args:
        filled: for each of the row's words in braces what stands there.
    """
    config = settings.config
    own = row.words.format_map(filled).split()
    task = [] if row.group == MULTITASK else [f"+task={settings.target}"]
    budget: list[str] = []
    rates: Sequence[float] = ()
    if row.group == MULTITASK:
        budget += [f"data.limit.train={config.source_rows}", f"trainer.max_epochs={config.source_epochs}"]
    elif config.equal_budget and row.trains and not any(key_of(w) == "trainer.max_epochs" for w in own):
        budget.append(f"trainer.max_epochs={config.epochs}")
    if config.equal_budget and row.trains:
        if row.group != MULTITASK:
            budget.append(f"data.batch_size={config.batch_size}")
        budget.append(f"optim.patience={'null' if config.patience is None else config.patience}")
        rates = config.rates
    swept = [f"optim.lr={','.join(map(str, rates))}"] if rates else []
    swept.append(f"seed={','.join(map(str, config.seeds))}")
    stem = f"{settings.target}-{row.id}"
    typed_name = stem + ("-lr-${optim.lr}" if rates else "") + seed_suffix(settings)
    words = _merged(task + own, settings.words, budget)
    members = tuple(
        Member(
            name=typed_name.replace("${optim.lr}", str(rate)).replace("${seed}", str(seed)),
            rate=rate,
            seed=seed,
            words=_compared([*words, f"seed={seed}", *([f"optim.lr={rate}"] if rate is not None else [])]),
        )
        for rate in (rates or (None,))
        for seed in config.seeds
    )
    return _training(settings, row.module, row.id, [*words, *swept, f"name={typed_name}"], members)


def seed_suffix(settings: Settings) -> str:
    """What a row's artifacts are called beside the method and the rate."""
    return "" if settings.config.seeds == [0] else "-seed-${seed}"


def source_trainings(settings: Settings, tasks: Sequence[str], drop: int | None = None) -> list[Training]:
    """The commands that train source adapters: one, or two where the target's own may see fewer rows.

    Args:
        drop: train them without adapters in so many of the lower layers, called TASK-dropped.
    """
    by_rows: dict[str, list[str]] = {}
    for task in tasks:
        by_rows.setdefault(_source_rows(settings, task), []).append(task)
    dropped = "dropped" if drop is not None else ""
    own = [f"adapter.drop=specialized:{drop}"] if dropped else []
    trainings = []
    for rows, group in by_rows.items():
        budget = [
            f"data.limit.train={rows}",
            f"trainer.max_epochs={settings.config.source_epochs}",
            f"optim.lr={SOURCE_RATE}",
        ]
        words = _merged(own, settings.words, budget)
        members = tuple(
            Member(source_name(task, drop), SOURCE_RATE, None, _compared([f"+task={task}", *words]))
            for task in group
        )
        name = ["name=${task.name}-dropped"] if dropped else []
        folder = "-".join(
            filter(
                None,
                ["sources", dropped, "target" if len(by_rows) > 1 and group == [settings.target] else ""],
            )
        )
        typed_words = [f"+task={','.join(group)}", *words, *name]
        trainings.append(_training(settings, "fusion.stage1", folder, typed_words, members))
    return trainings


def source_name(task: str, drop: int | None = None) -> str:
    return task if drop is None else f"{task}-dropped"


def _source_rows(settings: Settings, task: str) -> str:
    """The target has no more rows as a source than as the target: its other labels are not there to be used."""
    rows, limit = settings.config.source_rows, settings.word("data.limit.train")
    if task == settings.target and limit is not None and limit.isdigit():
        rows = min(rows, int(limit))
    return str(rows)


def _training(
    settings: Settings, module: str, folder: str, words: list[str], members: tuple[Member, ...]
) -> Training:
    runs = settings.output / "runs" / folder
    logger = [] if settings.word("logger") is not None else ["logger=csv"]
    place = [f"store={settings.store}", f"hydra.sweep.dir={runs}"]
    return Training(module, ("-m", *words, *logger, *place), members, runs)


def _merged(own: Sequence[str], handed_on: Sequence[str], budget: Sequence[str]) -> list[str]:
    """All words; of a key that is said twice the comparison's own stands."""
    said = {key_of(word) for word in (*own, *budget)}
    return [*own, *(word for word in handed_on if key_of(word) not in said), *budget]


def _compared(words: Sequence[str]) -> frozenset[str]:
    """What decides the numbers: not where the run writes and how it is watched."""
    kept = []
    for word in words:
        key = key_of(word)
        ignored = key in NOT_COMPARED or key.split(".")[0] in NOT_COMPARED
        if not ignored:
            kept.append(word.replace("\\", ""))  # Hydra writes ${…} down as $\{…\}
    return frozenset(kept)


def recorded_words(overrides: Sequence[str]) -> frozenset[str]:
    """The words that a stored artifact was made with, to be compared with a member's."""
    return _compared(overrides)
