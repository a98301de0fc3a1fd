"""From runs to a table: which target, which method, which seeds, and what each of them scored."""

from __future__ import annotations

import contextlib
import json
import re
import statistics as plain_statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusion.errors import UserError
from fusion.review.report.reading import Found, RunFolder
from fusion.review.report.statistics import Answers, Difference, Sample, compare, holm
from fusion.run import OUTCOMES, identity_config
from fusion.store.manifest import Manifest, check_attends, read_folder

BASELINE = "single adapter"
METHODS = {
    "adapter": BASELINE,
    "head": "head",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "bitfit": "BitFit",
    "multitask_adapter": "multi-task adapter",
    "multitask_full": "multi-task fine-tuning",
}
FUSION = "fusion"
COMPOSITIONS = {"adapterfusion": FUSION}
_ORDER = ("head", "full fine-tuning", "LoRA", "BitFit", BASELINE, "alone", FUSION)
# What makes no other method: the seed, and what belongs to the target.
_NOT_VARIANT = (
    "seed",
    "task",
    "tasks",
    "inputs",
    "name",
    "data.dir",
    "backbone.name_or_path",
    "data.limit.train",
)
_NAMED = ("method.name", "composition.name")


@dataclass(frozen=True)
class Trained:
    """What a training made.

    metric_of: of each task its first metric. variant: the settings that make it another one of its method.
    limit: of the training rows. artifact: where it was stored; manifest: what is there, if it is still.
    """

    run: RunFolder
    name: str
    stage: int
    tasks: tuple[str, ...]
    metric_of: Mapping[str, str]
    method: str
    variant: Mapping[str, Any]
    seed: int
    backbone: str
    limit: int | None
    sources: tuple[str, ...]
    artifact: str
    manifest: Manifest | None

    @property
    def hash(self) -> str | None:
        return None if self.manifest is None else self.manifest.hash

    @property
    def attends(self) -> bool:
        """Whether it is a fusion that is still there and has attention to look into."""
        if self.manifest is None:
            return False
        try:
            check_attends(self.manifest, "", "")
        except UserError:
            return False
        return True


@dataclass(frozen=True)
class Entry:
    """One score: of which run, on which task and split. `trained` is None for an artifact that no run here made."""

    task: str
    split: str
    method: str
    variant: Mapping[str, Any]
    seed: int
    metrics: Mapping[str, float]
    answers: Answers | None
    run: RunFolder
    trained: Trained | None
    backbone: str
    limit: int | None
    anywhere: bool = False  # it learnt nothing from the target, so it belongs to each setting of it


@dataclass
class Group:
    """The runs of one method with one set of settings on one target: they differ in their seeds."""

    method: str
    entries: list[Entry]
    metric: str
    differing: str = ""  # the settings that the method's other groups have otherwise
    others: int = 0  # how many other groups the method has, of which this one is best

    @property
    def samples(self) -> list[Sample]:
        return [Sample(e.seed, e.metrics[self.metric], e.answers) for e in self.entries]

    @property
    def scores(self) -> list[float]:
        return [entry.metrics[self.metric] for entry in self.entries]

    @property
    def mean(self) -> float:
        return plain_statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        return plain_statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def trained(self) -> list[Trained]:
        return [entry.trained for entry in self.entries if entry.trained is not None]


@dataclass
class Target:
    """A target task in one setting, with the best group of each method and all the others.

    differences: by method, to the baseline. adjusted: their p-values after Holm, over the targets.
    """

    label: str
    task: str
    split: str
    metric: str
    rows: int | None
    groups: dict[str, Group]
    variants: dict[str, list[Group]]
    differences: dict[str, Difference] = field(default_factory=dict)
    adjusted: dict[str, float] = field(default_factory=dict)


def targets_of(found: Found, split: str | None = None) -> list[Target]:
    """The targets of all runs, with what every method scored on them.

    Args:
        split: whose scores; None: of each target the split on which most methods have one, of equals the test split.
    """
    trained = trained_runs(found.done)
    entries = [*_own_scores(trained), *_evaluations(found.done, trained)]
    targets = []
    for task in sorted({entry.task for entry in entries}):
        of_task = [entry for entry in entries if entry.task == task]
        settings = sorted({_setting(e) for e in of_task if not e.anywhere}, key=str)
        if not settings:  # scored, and trained for by no run here
            settings = sorted({_setting(e) for e in of_task}, key=str)
        for setting in settings:
            here = [e for e in of_task if _setting(e) == setting or (e.anywhere and e.backbone == setting[0])]
            target = _target(task, _label(task, setting, settings), here, split)
            if target is not None:
                targets.append(target)
    _correct(targets)
    return targets


def trained_runs(runs: Iterable[RunFolder]) -> list[Trained]:
    """What the trainings made, the last of each artifact. A run that found its work done stands for the one before."""
    made: dict[tuple[str, str], Trained] = {}
    for run in runs:
        if run.command not in ("stage1", "stage2") or "artifact" not in run.result:
            continue
        one = _trained(run)
        key = (one.artifact, json.dumps(identity_config(run.config), sort_keys=True, default=str))
        if run.skipped and key in made:
            continue
        made[key] = one
    last: dict[str, Trained] = {}
    for (artifact, _), one in made.items():  # an artifact that was replaced is what it was replaced by
        last[artifact] = one
    return list(last.values())


def _trained(run: RunFolder) -> Trained:
    config, result = run.config, run.result
    tasks = config.get("tasks") or [config.get("task") or {}]
    artifact = _resolved(str(result["artifact"]), run)
    manifest = None
    with contextlib.suppress(OSError, UserError):  # it may have been removed since
        manifest = read_folder(Path(artifact))
    flat = identity_config(config)
    variant = {
        key: value
        for key, value in flat.items()
        if key not in _NAMED and not any(key == k or key.startswith(f"{k}.") for k in _NOT_VARIANT)
    }
    if "sources" in variant:
        variant["sources"] = [_unseeded(str(source)) for source in variant["sources"] or []]
    return Trained(
        run=run,
        name=str(result.get("name")),
        stage=int(result.get("stage", 1)),
        tasks=tuple(str(task.get("name")) for task in tasks),
        metric_of={str(task.get("name")): str((task.get("metrics") or [""])[0]) for task in tasks},
        method=_method(config, result),
        variant=variant,
        seed=int(result.get("seed", 0)),
        backbone=str((config.get("backbone") or {}).get("name_or_path")),
        limit=((config.get("data") or {}).get("limit") or {}).get("train"),
        sources=tuple(map(str, result.get("sources") or ())),
        artifact=artifact,
        manifest=manifest,
    )


def _method(config: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """What the method is called in the table."""
    if (composition := config.get("composition")) is not None:
        name = COMPOSITIONS.get(composition.get("name"), str(composition.get("name")))
        sources = [_unseeded(str(source)) for source in result.get("sources") or ()]
        of = f" of {len(sources)}" if len(sources) != 1 else f" of {sources[0]}"
        return f"{name}{of}{' + own adapter' if composition.get('target_adapter') else ''}"
    name = str((config.get("method") or {}).get("name"))
    return METHODS.get(name, name)


def _own_scores(trained: Sequence[Trained]) -> list[Entry]:
    """What the trainings scored on their validation rows, in their best epoch."""
    entries = []
    for one in trained:
        answers = one.run.json(OUTCOMES) or {}
        for key, metrics in (one.run.result.get("metrics") or {}).items():
            task, _, split = key.rpartition("/")
            entries += _entry(
                task or one.tasks[0], split, metrics, answers.get(key), one.run, one, one.method
            )
    return entries


def _evaluations(runs: Iterable[RunFolder], trained: Sequence[Trained]) -> list[Entry]:
    """What `fusion.evaluate` scored; the last word on an artifact, task and split counts."""
    by_place = {one.artifact: one for one in trained}
    last: dict[tuple[Any, ...], list[Entry]] = {}
    for run in runs:
        if run.command != "evaluate" or "artifact" not in run.result:
            continue
        result, place = run.result, _resolved(str(run.result["artifact"]), run)
        maker = by_place.get(place)
        if maker is not None and maker.hash is not None and result.get("hash") not in (None, maker.hash):
            continue  # it scored what was replaced since
        tasks = str(result.get("task")).split("+")
        answers = run.json(OUTCOMES) or {}
        for key, metrics in (result.get("metrics") or {}).items():
            task, _, split = key.rpartition("/")
            task = task or tasks[0]
            own = maker is not None and task in maker.tasks
            name = _unseeded(str(result.get("name")))
            method = maker.method if own and maker is not None else f"{name} alone"
            if drop := result.get("drop"):
                method += f", {drop} layers dropped"
            last[place, task, split, drop] = _entry(
                task, split, metrics, answers.get(key), run, maker, method, own
            )
    return [entry for entries in last.values() for entry in entries]


def _entry(
    task: str,
    split: str,
    metrics: Any,
    answers: Any,
    run: RunFolder,
    trained: Trained | None,
    method: str,
    own: bool = True,
) -> list[Entry]:
    numbers = {
        str(name): float(value)
        for name, value in (metrics.items() if isinstance(metrics, dict) else ())
        if isinstance(value, (int, float)) and np.isfinite(value)
    }
    if not numbers:
        return []
    backbone, limit, seed = "", None, 0
    variant: Mapping[str, Any] = {}
    if trained is not None:
        backbone, seed = trained.backbone, trained.seed
        limit, variant = (trained.limit, trained.variant) if own else (None, {})
    return [
        Entry(
            task,
            split,
            method,
            variant,
            seed,
            numbers,
            _answers(answers),
            run,
            trained,
            backbone,
            limit,
            not own,
        )
    ]


def _answers(content: Any) -> Answers | None:
    try:
        labels, predicted = np.asarray(content["labels"]), np.asarray(content["predicted"])
        if (
            labels.shape != predicted.shape
            or labels.ndim != 1
            or not {labels.dtype.kind, predicted.dtype.kind} <= set("if")
        ):
            return None
        return Answers(str(content["fingerprint"]), labels, predicted)
    except (TypeError, KeyError, ValueError):
        return None


def _setting(entry: Entry) -> tuple[str, int | None]:
    return entry.backbone, entry.limit


def _label(task: str, setting: tuple[str, int | None], settings: Sequence[tuple[str, int | None]]) -> str:
    parts = [task]
    if len({limit for _, limit in settings}) > 1:
        parts.append("all rows" if setting[1] is None else f"{setting[1]} rows")
    if len({backbone for backbone, _ in settings}) > 1:
        parts.append(setting[0].rstrip("/").rsplit("/", 1)[-1])
    return " · ".join(parts)


def _target(task: str, label: str, entries: Sequence[Entry], asked: str | None) -> Target | None:
    split = asked or _common_split(entries)
    here = [entry for entry in entries if entry.split == split]
    if not here:
        return None
    named = [
        e.trained.metric_of.get(task) for e in here if e.trained is not None and e.trained.metric_of.get(task)
    ]
    metric = named[0] if named else next(iter(here[0].metrics))
    assert metric is not None
    here = [entry for entry in here if metric in entry.metrics]
    if not here:
        return None
    variants = {
        method: _variants(method, [entry for entry in here if entry.method == method], metric)
        for method in sorted({entry.method for entry in here}, key=order_of)
    }
    groups = {}
    for method, found in variants.items():
        best = max(found, key=lambda group: _choosing_score(group, entries, metric))
        best.others = len(found) - 1
        groups[method] = best
    rows = {len(e.answers.labels) for e in here if e.answers is not None}
    target = Target(label, task, split, metric, rows.pop() if len(rows) == 1 else None, groups, variants)
    if (base := groups.get(BASELINE)) is not None:
        for method, group in groups.items():
            if method != BASELINE:
                # The seed of a source's training says nothing about that of the target's.
                by_seed = not any(entry.anywhere for entry in group.entries)
                target.differences[method] = compare(group.samples, base.samples, metric, by_seed)
    return target


def _common_split(entries: Sequence[Entry]) -> str:
    """The split on which most methods have a score; of equals, the one that did not choose the best epoch."""
    methods: dict[str, set[str]] = {}
    for entry in entries:
        methods.setdefault(entry.split, set()).add(entry.method)
    return max(methods, key=lambda split: (len(methods[split]), split.startswith("test"), split))


def _variants(method: str, entries: Sequence[Entry], metric: str) -> list[Group]:
    by_settings: dict[str, dict[int, Entry]] = {}
    for entry in entries:  # the last run of a seed counts
        key = json.dumps(entry.variant, sort_keys=True, default=str)
        by_settings.setdefault(key, {})[entry.seed] = entry
    groups = [
        Group(method, [of_seed[seed] for seed in sorted(of_seed)], metric) for of_seed in by_settings.values()
    ]
    keys = {key for group in groups for key in group.entries[0].variant}
    differing = [
        key
        for key in sorted(keys)
        if len({json.dumps(group.entries[0].variant.get(key), default=str) for group in groups}) > 1
    ]
    for group in groups:
        group.differing = ", ".join(f"{key}={_shown(group.entries[0].variant.get(key))}" for key in differing)
    return groups


def _choosing_score(group: Group, entries: Sequence[Entry], metric: str) -> float:
    """What decides which settings of a method stand in the table: the validation score of its trainings."""
    runs = {id(one.run) for one in group.trained}
    own = [
        e.metrics[metric]
        for e in entries
        if id(e.run) in runs and e.split.startswith("validation") and metric in e.metrics
    ]
    return plain_statistics.fmean(own) if own else group.mean


def _correct(targets: Sequence[Target]) -> None:
    """Holm's correction: each method is one family of tests, a test for each target."""
    for method in {method for target in targets for method in target.differences}:
        family = [
            (t, p) for t in targets if method in t.differences and (p := t.differences[method].p) is not None
        ]
        for (target, _), adjusted in zip(family, holm([p for _, p in family]), strict=True):
            target.adjusted[method] = adjusted


def order_of(method: str) -> tuple[int, str]:
    if method.endswith(" alone"):
        return _ORDER.index("alone"), method
    first = next(
        (n for n, name in enumerate(_ORDER) if method == name or method.startswith(f"{name} ")), len(_ORDER)
    )
    return first, method


def _resolved(path: str, run: RunFolder) -> str:
    """A path as the run named it, absolute: relative ones are of the folder in which it was started."""
    place = Path(path)
    if place.is_absolute():
        return str(place)
    # The run's own folder was named relative to the same place, and is known absolutely.
    for above in (Path.cwd(), *run.folder.parents):
        if (above / place).exists():
            return str((above / place).resolve())
    return str(place)


def _unseeded(name: str) -> str:
    return re.sub(r"-seed-\d+$", "", name)


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
