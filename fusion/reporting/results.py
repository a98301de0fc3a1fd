"""From runs to a table: which target, which method, which seeds, and what each of them scored."""

from __future__ import annotations

import contextlib
import json
import statistics as plain_statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.config.compositions import COMPOSITIONS, Composition
from fusion.config.methods import METHODS, Method
from fusion.errors import UserError
from fusion.reporting.reading import Found, RunFolder
from fusion.reporting.statistics import Answers, Difference, Sample, compare, constant_scores, holm
from fusion.runs.identity import identity_config
from fusion.runs.run import OUTCOMES
from fusion.store.compatibility import check_attends
from fusion.store.lookup import read_folder
from fusion.store.settings_groups import Lookup, Settings, differing, key_of

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

BASELINE = "single adapter"
FUSION = "fusion"
_ORDER = ("head", "full fine-tuning", "LoRA", "BitFit", BASELINE, "alone", FUSION)
# Settings that belong to the target and not to the method.
_OF_TARGET = ("task.name", "backbone.name_or_path", "data.limit.train")
_NAMED = ("method.name", "composition.name")
# What a training may spend, by the beginning of the key; and what the keys are called.
_BUDGET = ("optim.", "trainer.", "data.", "loss.")
_BUDGET_NAMES = {
    "optim.lr": "learning rate",
    "optim.head_lr": "head learning rate",
    "optim.patience": "patience",
    "optim.weight_decay": "weight decay",
    "optim.warmup": "warmup",
    "trainer.max_epochs": "epochs",
    "trainer.max_steps": "steps",
    "trainer.max_time": "time",
    "trainer.accumulate_grad_batches": "accumulated batches",
    "data.batch_size": "batch size",
    "data.tokens_per_batch": "tokens per batch",
    "data.max_length": "maximum length",
}


@dataclass(frozen=True)
class Trained:
    """What a training made.

    metric_of: of each task its first metric. variant: the settings that make it another one of its method, those of
    its sources included. limit: of the training rows. artifact: where it was stored; manifest: what is there, if it is still.
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
    """The runs of one method with one set of settings on one target: they differ in their seeds.

    differing: the settings that the method's other groups have otherwise. others: how many other groups the method
    has. chosen_on: the split whose scores choose among them. against: the baseline's group that it is compared with. difference: to that one. adjusted: its p-value after
    Holm. unequal: how the two differ in budget; then the difference says nothing about the methods.
    """

    method: str
    entries: list[Entry]
    metric: str
    differing: str = ""
    others: int = 0
    chosen_on: str = "validation"
    against: Group | None = None
    difference: Difference | None = None
    adjusted: float | None = None
    unequal: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return key_of(self.entries[0].variant)

    @property
    def budget(self) -> dict[str, Any]:
        """What its training was given, by setting; empty where nothing was trained on the target."""
        if any(entry.anywhere for entry in self.entries):
            return {}
        return {key: value for key, value in self.entries[0].variant.items() if key.startswith(_BUDGET)}

    @property
    def seeds(self) -> int:
        return len({entry.seed for entry in self.entries})

    def scores_by(self, metric: str) -> list[float]:
        return [entry.metrics[metric] for entry in self.entries if metric in entry.metrics]

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
    """A target task in one setting. groups: of each method the best on validation; variants: all of each method.

    constant: by metric, what the split's majority class (or mean) scores for every row; empty: not known.
    """

    label: str
    task: str
    split: str
    metric: str
    rows: int | None
    groups: dict[str, Group]
    variants: dict[str, list[Group]]
    constant: dict[str, float] = field(default_factory=dict)
    majority: str = ""

    @property
    def differences(self) -> dict[str, Difference]:
        """By method, of its best group to the baseline."""
        return {m: g.difference for m, g in self.groups.items() if g.difference is not None}

    @property
    def adjusted(self) -> dict[str, float]:
        """By method, the p-values after Holm, over the targets and settings."""
        return {m: g.adjusted for m, g in self.groups.items() if g.adjusted is not None}

    @property
    def every_group(self) -> list[Group]:
        return [group for groups in self.variants.values() for group in groups]

    @property
    def chosen_here(self) -> list[str]:
        """What was chosen by scores on the rows that are shown, which makes these scores optimistic."""
        chosen = []
        for entry in (entry for group in self.every_group for entry in group.entries if not entry.anywhere):
            result = {} if entry.trained is None else entry.trained.run.result
            scored = {key.rpartition("/")[2] for key in result.get("metrics") or {}}
            if self.split in scored and result.get("best_epoch") is not None and result.get("epochs") != 1:
                chosen.append("the best epoch")
                break
        if any(group.others and self.split.startswith(group.chosen_on) for group in self.groups.values()):
            chosen.append("the best setting of a method")
        return chosen

    @property
    def metrics(self) -> list[str]:
        """Every metric of its results, the one that counts first."""
        names = (name for group in self.every_group for entry in group.entries for name in entry.metrics)
        return list(dict.fromkeys([self.metric, *names]))


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
    trainings = [run for run in runs if run.command in ("stage1", "stage2") and "artifact" in run.result]
    lookup = Lookup({_resolved(str(r.result["artifact"]), r): identity_config(r.config) for r in trainings})
    for run in trainings:
        one = _trained(run, lookup)
        key = (one.artifact, json.dumps(identity_config(run.config), sort_keys=True, default=str))
        if run.skipped and key in made:
            continue
        made[key] = one
    last: dict[str, Trained] = {}
    for (artifact, _), one in made.items():  # an artifact that was replaced is what it was replaced by
        last[artifact] = one
    return list(last.values())


def _trained(run: RunFolder, lookup: Lookup) -> Trained:
    config, result = run.config, run.result
    tasks = config.get("tasks") or [config.get("task") or {}]
    artifact = _resolved(str(result["artifact"]), run)
    manifest = None
    with contextlib.suppress(OSError, UserError):  # it may have been removed since
        manifest = read_folder(Path(artifact))
    settings = _settings_of(run, artifact, manifest, lookup)
    variant = {key: value for key, value in settings.items() if key not in (*_NAMED, *_OF_TARGET)}
    return Trained(
        run=run,
        name=str(result.get("name")),
        stage=int(result.get("stage", 1)),
        tasks=tuple(str(task.get("name")) for task in tasks),
        metric_of={str(task.get("name")): str((task.get("metrics") or [""])[0]) for task in tasks},
        method=_method(config, result, settings),
        variant=variant,
        seed=int(result.get("seed", 0)),
        backbone=str((config.get("backbone") or {}).get("name_or_path")),
        limit=((config.get("data") or {}).get("limit") or {}).get("train"),
        sources=tuple(map(str, result.get("sources") or ())),
        artifact=artifact,
        manifest=manifest,
    )


def _settings_of(run: RunFolder, artifact: str, manifest: Manifest | None, lookup: Lookup) -> Settings:
    """What the runs of one setting share: from the artifact, where it is still the one that the run made."""
    flat, store = identity_config(run.config), Path(artifact).parent
    if manifest is not None:
        stored = manifest.run.config
        if {key: value for key, value in stored.items() if not key.startswith("inputs.")} == flat:
            return lookup.of_artifact(manifest, store)
    return lookup.of_run(flat, store, [str(source) for source in run.result.get("sources") or ()] or None)


def _method(config: Mapping[str, Any], result: Mapping[str, Any], settings: Settings) -> str:
    """What the method is called in the table."""
    if (composition := config.get("composition")) is not None:
        name = _title(composition.get("name"), COMPOSITIONS)
        sources: list[Any] = list(settings.get("sources") or result.get("sources") or ())
        of = f" of {len(sources)}"
        if len(sources) == 1:
            one = sources[0]
            task = one.get("artifact") or one.get("task.name") if isinstance(one, Mapping) else one
            of = f" of {task or 'one'}"
        return f"{name}{of}{' + own adapter' if composition.get('target_adapter') else ''}"
    return _title((config.get("method") or {}).get("name"), METHODS)


def _title(name: Any, table: Mapping[str, Composition | Method]) -> str:
    """A run may be of a version that has other names."""
    known = table.get(str(name))
    return (known.title if known is not None else "") or str(name)


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
            # Seeds of one source are one method, so it is called by its task.
            name = "+".join(maker.tasks) if maker is not None else _task_of(place) or str(result.get("name"))
            method = maker.method if own and maker is not None else f"{name} alone"
            if drop := result.get("drop"):
                method += f", {drop} layers dropped"
            last[place, task, split, drop] = _entry(
                task, split, metrics, answers.get(key), run, maker, method, own
            )
    return [entry for entries in last.values() for entry in entries]


def _task_of(place: str) -> str | None:
    """The task of an artifact that no run here has made; None: it is gone."""
    with contextlib.suppress(OSError, UserError):
        manifest = read_folder(Path(place))
        return "+".join(manifest.task_names)
    return None


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
        limit, variant = (trained.limit if own else None), trained.variant
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
        choosing = [_validation_score(group, entries, metric) for group in found]
        known = [score for score in choosing if score is not None]
        scores = known if len(known) == len(found) else [group.mean for group in found]
        best = found[scores.index(max(scores))]
        for group in found:
            group.others = len(found) - 1
            group.chosen_on = "validation" if scores is known else split
        groups[method] = best
        found.sort(key=lambda group: group is not best)
    rows = {len(e.answers.labels) for e in here if e.answers is not None}
    target = Target(label, task, split, metric, rows.pop() if len(rows) == 1 else None, groups, variants)
    if (base := groups.get(BASELINE)) is not None:
        for group in target.every_group:
            if group is not base:
                _compare(group, base, variants, metric)
    if len({e.answers.fingerprint for e in here if e.answers is not None}) == 1:
        labels = next(e.answers.labels for e in here if e.answers is not None)
        target.majority, target.constant = constant_scores(labels, target.metrics)
    return target


def _compare(group: Group, base: Group, variants: Mapping[str, Sequence[Group]], metric: str) -> None:
    """Compares a group with the baseline's: with that of its own budget, where there is one, else with the best.

    Where a method and the baseline have tried the same budgets, the best of one is compared with the best of the other.
    """
    tried = {method: {key_of(one.budget) for one in groups} for method, groups in variants.items()}
    of_method, others = tried[group.method], variants[BASELINE]
    equal = [one for one in others if key_of(one.budget) == key_of(group.budget) and one is not group]
    fair = of_method == tried[BASELINE] and len(variants[group.method]) == len(others)
    if group.method == BASELINE or not group.budget or (fair and group is variants[group.method][0]):
        group.against = base
    else:
        group.against = base if base in equal or not equal else equal[0]
        fair = False
    if group.budget and not fair:
        named = _budget_differences(group.budget, group.against.budget)
        own = variants[group.method]
        chosen = (len(own) > 1 and group is own[0]) or (len(others) > 1 and group.against is base)
        if group.method != BASELINE and chosen:
            named += _tried(group, own, group.against, others)
        group.unequal = tuple(named)
    group.unequal += _scored_differently(group, group.against)
    # The seed of a source's training says nothing about that of the target's.
    by_seed = not any(entry.anywhere for entry in group.entries)
    for one in (group, group.against):  # several runs of a seed, such as with other sources, are no pairs
        by_seed = by_seed and one.seeds == len(one.entries)
    group.difference = compare(group.samples, group.against.samples, metric, by_seed)


def _scored_differently(group: Group, against: Group) -> tuple[str, ...]:
    """How the validation or test rows of two groups differ; empty: they share some, or it is not known."""
    ones, others = (
        {e.answers.fingerprint: len(e.answers.labels) for e in each.entries if e.answers is not None}
        for each in (group, against)
    )
    if not ones or not others or ones.keys() & others.keys():
        return ()
    counts = [" or ".join(map(str, sorted(set(rows.values())))) for rows in (ones, others)]
    if counts[0] == counts[1]:
        return (f"scored on other {counts[0]} rows",)
    return (f"scored on {counts[0]} rows against {counts[1]}",)


def _budget_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{_BUDGET_NAMES.get(key, key)} {_shown(one.get(key))} against {_shown(other.get(key))}"
        for key in sorted({*one, *other}, key=lambda key: (key not in _BUDGET_NAMES, key))
        if one.get(key) != other.get(key)
    ]


def _tried(
    group: Group, of_method: Sequence[Group], against: Group, of_baseline: Sequence[Group]
) -> list[str]:
    """Settings that the two share, and of which one of them is the best of more values than the other."""
    named = []
    for key in sorted({*group.budget, *against.budget}):
        ones, others = (
            {key_of({"": one.budget.get(key)}) for one in every} for every in (of_method, of_baseline)
        )
        if ones != others and group.budget.get(key) == against.budget.get(key):
            named.append(f"{_BUDGET_NAMES.get(key, key)}: {len(ones)} tried against {len(others)}")
    return named


def _common_split(entries: Sequence[Entry]) -> str:
    """The split on which most methods have a score; of equals, the one that did not choose the best epoch."""
    methods: dict[str, set[str]] = {}
    for entry in entries:
        methods.setdefault(entry.split, set()).add(entry.method)
    return max(methods, key=lambda split: (len(methods[split]), split.startswith("test"), split))


def _variants(method: str, entries: Sequence[Entry], metric: str) -> list[Group]:
    by_settings: dict[str, dict[Any, Entry]] = {}
    for entry in entries:  # the last run of a seed with the same sources counts
        inputs = entry.trained.sources if entry.trained is not None else (str(entry.run.result.get("name")),)
        by_settings.setdefault(key_of(entry.variant), {})[entry.seed, inputs] = entry
    groups = [
        Group(method, [of_seed[seed] for seed in sorted(of_seed)], metric) for of_seed in by_settings.values()
    ]
    for group, settings in zip(groups, differing([one.entries[0].variant for one in groups]), strict=True):
        group.differing = ", ".join(f"{key}={_shown(value)}" for key, value in _brief(settings).items())
    return groups


def _brief(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without what follows from another setting: of several tasks only their names."""
    names = {
        key: value for key, value in settings.items() if key.startswith("tasks.") and key.endswith(".name")
    }
    if not names:
        return dict(settings)
    return {"tasks": list(names.values())} | {k: v for k, v in settings.items() if not k.startswith("tasks.")}


def _validation_score(group: Group, entries: Sequence[Entry], metric: str) -> float | None:
    """The mean validation score of a group's trainings, which chooses among a method's settings; None: not known."""
    runs = {id(one.run) for one in group.trained}
    own = [
        e.metrics[metric]
        for e in entries
        if id(e.run) in runs and e.split.startswith("validation") and metric in e.metrics
    ]
    return plain_statistics.fmean(own) if own else None


def _correct(targets: Sequence[Target]) -> None:
    """Holm's correction: each method is one family of tests, a test for each of its settings on each target."""
    for method in {method for target in targets for method in target.variants}:
        tested = [
            (group, p)
            for target in targets
            for group in target.variants.get(method, ())
            if group.difference is not None and (p := group.difference.p) is not None
        ]
        for (group, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
            group.adjusted = adjusted


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


def _shown(value: Any) -> str:
    return "null" if value is None else "+".join(map(str, value)) if isinstance(value, list) else str(value)
