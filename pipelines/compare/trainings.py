"""The training command of a method, and its result, read from the stored artifacts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from fusion.config.data import Fold
from fusion.errors import UserError
from fusion.store.lookup import names, read_manifest
from fusion.store.manifest import Manifest
from fusion.text import key_of
from pipelines.commands import typed
from pipelines.compare.config import Comparison
from pipelines.compare.rows import FOLDS, MULTITASK, ROWS, Row

SOURCE_RATE = 5e-4


@dataclass(frozen=True)
class Training:
    """A training sweep. `artifacts`: artifact names by learning rate, with the key `None` if it is not swept."""

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
    """Build the training sweep of a method over learning rates and seeds; `values` replace its placeholders."""
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
    artifacts = {
        rate: [artifact_name(comparison, row.id, rate).replace("${seed}", str(seed)) for seed in config.seeds]
        for rate in (config.rates if grid else [None])
    }
    swept.append(f"name={artifact_name(comparison, row.id, '${optim.lr}' if grid else None)}")
    return _training(comparison, row.module, row.id, own, budget, swept, artifacts)


def fold_training(comparison: Comparison, rate: float | None) -> Training:
    """Build the sweep that trains the single adapter with one learning rate without each fold of the examples."""
    row = next(row for row in ROWS if row.id == "pfeiffer")
    one = comparison if rate is None else replace(comparison, config=replace(comparison.config, rates=[rate]))
    whole = row_training(one, row, {})
    every = Fold.each(FOLDS)
    folder = comparison.output / "runs" / "folds"
    overrides = [word for word in whole.overrides if key_of(word) != "hydra.sweep.dir"]
    overrides += [f"data.leave_out={','.join(map(str, every))}", f"hydra.sweep.dir={folder}"]
    artifacts = [f"{name}{left_out.suffix}" for name in whole.names for left_out in every]
    return Training(whole.module, tuple(overrides), {None: artifacts}, folder)


def artifact_name(comparison: Comparison, id: str, rate: float | str | None) -> str:
    """Return the name of a method's artifacts, which contains `${seed}` unless the only seed is 0."""
    seed = "" if comparison.config.seeds == [0] else "-seed-${seed}"
    return f"{comparison.target}-{id}{'' if rate is None else f'-lr-{rate}'}{seed}"


def source_trainings(comparison: Comparison, tasks: Sequence[str], drop: int | None = None) -> list[Training]:
    """Build the sweep that trains source adapters, and a separate one for the target if it has fewer examples.

    With `drop`, the first layers have no adapters, and the artifacts are named TASK-dropped.
    """
    config, limit = comparison.config, comparison.word("data.limit.train")
    groups: dict[int, list[str]] = {}
    for task in tasks:
        # As a source, the target is trained on at most as many examples as in the comparison.
        fewer = task == comparison.target and limit is not None and limit.isdigit()
        rows = min(config.source_rows, int(limit or 0)) if fewer else config.source_rows
        groups.setdefault(rows, []).append(task)
    suffix = "" if drop is None else "-dropped"
    trainings = []
    for rows, group in groups.items():
        own = [f"+task={','.join(group)}", *([] if drop is None else [f"adapter.drop=specialized:{drop}"])]
        budget = [f"data.limit.train={rows}", f"trainer.max_epochs={config.source_epochs}", f"optim.lr={SOURCE_RATE}"]
        name = [f"name=${{task.name}}{suffix}"] if suffix else []
        folder = f"sources{suffix}{'-target' if len(groups) > 1 and group == [comparison.target] else ''}"
        artifacts: dict[float | None, list[str]] = {None: [f"{task}{suffix}" for task in group]}
        trainings.append(_training(comparison, "fusion.stage1", folder, own, budget, name, artifacts))
    return trainings


def _training(
    comparison: Comparison,
    module: str,
    folder: str,
    own: Sequence[str],
    budget: Sequence[str],
    swept: Sequence[str],
    artifacts: dict[float | None, list[str]],
) -> Training:
    """Merge all overrides; those passed to both stages are omitted if the comparison sets the same key."""
    runs = comparison.output / "runs" / folder
    keys = {key_of(word) for word in (*own, *budget)}
    given = [word for word in comparison.words if key_of(word) not in keys]
    logger = [] if comparison.word("logger") is not None else ["logger=csv"]
    place = [f"store={comparison.store}", f"hydra.sweep.dir={runs}"]
    return Training(module, ("-m", *own, *given, *budget, *swept, *logger, *place), artifacts, runs)


@dataclass
class RowResult:
    """Result of a method."""

    id: str
    title: str
    group: str
    rate: float | None  # with the best mean score over seeds; `None` if it was not swept
    artifacts: list[str]  # trained with it, one per seed
    scores: dict[str, list[float]]  # metric values of these artifacts
    grid: dict[str, dict[str, float]]  # mean over seeds by learning rate and metric
    trainable: int
    stored_bytes: int
    sources: list[str]
    seconds_per_step: float | None  # median over seeds; `None` if nothing was trained
    best_epochs: list[int]
    command: str
    inference: dict[str, float] | None = None  # time of the first artifact relative to the backbone without adapters
    seconds: float | None = None

    @property
    def main_metric(self) -> str:
        """The first metric of the task, which selects the epoch and the learning rate."""
        return next(iter(self.scores))

    @property
    def score(self) -> float:
        return fmean(self.scores[self.main_metric])


def target_scores(manifest: Manifest, target: str) -> dict[str, float]:
    """Return the metrics on the first validation split of the target; in multi-task runs, it is named TASK/SPLIT."""
    own = [split for split in manifest.metrics if split.startswith(f"{target}/")]
    splits = own or [split for split in manifest.metrics if "/" not in split]
    if not splits:
        raise UserError(f"{manifest.name} was not evaluated on {target}, only on {', '.join(manifest.metrics)}")
    metrics = manifest.metrics[splits[0]]
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def row_result(
    row: Row, training: Training, store: Path, target: str, without: Collection[str] = ()
) -> RowResult | None:
    """Return the result of the best learning rate that has an artifact, not in `without`, for every seed, or `None`."""
    usable = set(names(store)) - set(without)
    complete = {
        rate: [read_manifest(name, store) for name in artifacts]
        for rate, artifacts in training.artifacts.items()
        if usable.issuperset(artifacts)
    }
    if not complete:
        return None
    scores: dict[float | None, dict[str, list[float]]] = {}
    for rate, manifests in complete.items():
        each = [target_scores(manifest, target) for manifest in manifests]
        scores[rate] = {metric: [of_seed[metric] for of_seed in each] for metric in each[0]}
    means = {rate: {metric: fmean(v) for metric, v in of.items()} for rate, of in scores.items()}
    first = {rate: next(iter(of.values())) for rate, of in means.items()}
    best = max(first, key=lambda rate: -math.inf if math.isnan(first[rate]) else first[rate])
    results = [one.result for one in complete[best]] if row.trains else []

    def median_speed(key: str) -> float | None:
        values = [value for result in results if (value := result.speed.get(key)) is not None]
        return median(values) if values else None

    return RowResult(
        id=row.id,
        title=row.title,
        group=row.group,
        rate=best,
        artifacts=training.artifacts[best],
        scores=scores[best],
        grid={} if best is None else {str(rate): mean for rate, mean in means.items()},
        trainable=results[0].parameters["trainable"] if results else 0,
        stored_bytes=sum(file.bytes for file in complete[best][0].files.values()),
        sources=[source.name for source in complete[best][0].sources],
        seconds_per_step=median_speed("seconds_per_step"),
        best_epochs=[result.best_epoch for result in results if result.best_epoch is not None],
        command=str(training),
        seconds=median_speed("seconds"),
    )
