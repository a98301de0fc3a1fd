"""Metrics of all runs, one entry per run, task and split, with the training run of the artifact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.config.compositions import COMPOSITIONS
from fusion.config.methods import METHODS
from fusion.config.training import default_rate
from fusion.errors import UserError
from fusion.files import read_json
from fusion.reporting.reading import RunFolder
from fusion.reporting.statistics import Predictions
from fusion.runs.identity import identity_config
from fusion.runs.run import OUTCOMES
from fusion.store.lookup import read_folder
from fusion.store.settings_groups import Lookup, Settings, key_of

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

# Settings that identify the target or the method; all others form the variant of the method.
_NOT_VARIANT = ("method.name", "composition.name", "task.name", "backbone.name_or_path", "data.limit.train")


@dataclass(frozen=True)
class Trained:
    run: RunFolder
    metric_of: Mapping[str, str]  # first metric of each task
    method: str
    variant: Mapping[str, Any]  # settings that distinguish runs of the same method, including those of the sources
    setting: tuple[str, int | None]  # experimental condition: backbone, maximum number of training examples
    artifact: str
    manifest: Manifest | None  # None: the artifact was removed

    @property
    def name(self) -> str:
        return str(self.run.result.get("name"))

    @property
    def seed(self) -> int:
        return int(self.run.result.get("seed", 0))

    @property
    def hash(self) -> str | None:
        return None if self.manifest is None else self.manifest.hash

    @property
    def has_default_rate(self) -> bool:
        """Whether the learning rate is the default of the backbone and the method or composition."""
        config = self.run.config
        method, composition = (str((config.get(key) or {}).get("name")) for key in ("method", "composition"))
        if "selection" in self.run.result:
            return True  # those of its methods, or a search
        known = COMPOSITIONS.get(composition) or METHODS.get(method)
        rates = (config.get("backbone") or {}).get("rates")
        return known is not None and self.variant.get("optim.lr") == default_rate(known.rate, rates)

    @property
    def attends(self) -> bool:
        """Whether the artifact exists and has attention to inspect."""
        made = self.manifest
        return made is not None and made.kind == "fusion" and not COMPOSITIONS[made.made_by].no_weights


@dataclass(frozen=True)
class Score:
    """Metrics of one run on a task and split."""

    task: str
    split: str
    method: str
    metrics: Mapping[str, float]
    predictions: Predictions | None
    run: RunFolder
    trained: Trained | None  # training run of the artifact, if found
    anywhere: bool = False  # trained on a different task, so the score applies to all settings of the target

    @property
    def variant(self) -> Mapping[str, Any]:
        return {} if self.trained is None else self.trained.variant

    @property
    def seed(self) -> int:
        return 0 if self.trained is None else self.trained.seed

    @property
    def setting(self) -> tuple[str, int | None]:
        """Setting of the target: (backbone, maximum number of training examples)."""
        backbone, limit = ("", None) if self.trained is None else self.trained.setting
        return backbone, None if self.anywhere else limit

    @property
    def inputs(self) -> tuple[str, ...]:
        if self.trained is None:
            return (str(self.run.result.get("name")),)
        return tuple(map(str, self.trained.run.result.get("sources") or ()))


def all_scores(runs: Sequence[RunFolder]) -> list[Score]:
    """Return the validation metrics of the training runs at their best epoch, and the last evaluation of each artifact."""
    trained = trained_runs(runs)
    scores = [
        Score(task, split, one.method, metrics, predictions, one.run, one)
        for one in trained
        for task, split, metrics, predictions in _metrics_of(one.run, next(iter(one.metric_of)))
    ]
    by_path = {one.artifact: one for one in trained}
    last: dict[tuple[Any, ...], Score] = {}
    for run in _with_artifact(runs, "evaluate"):
        path, drop = artifact_path(run), run.result.get("drop")
        maker = by_path.get(path)
        if maker is not None and maker.hash is not None and run.result.get("hash") not in (None, maker.hash):
            continue  # the artifact was replaced after the evaluation
        for task, split, metrics, predictions in _metrics_of(run, str(run.result.get("task")).split("+")[0]):
            own = maker is not None and task in maker.metric_of
            method = maker.method if own and maker is not None else f"{_title_elsewhere(run, path, maker)} alone"
            method += f", {drop} layers dropped" if drop else ""
            score = Score(task, split, method, metrics, predictions, run, maker, not own)
            last[path, task, split, drop] = score
    return [*scores, *last.values()]


def _with_artifact(runs: Iterable[RunFolder], *commands: str) -> list[RunFolder]:
    return [run for run in runs if run.command in commands and "artifact" in run.result]


def _title_elsewhere(run: RunFolder, path: str, maker: Trained | None) -> str:
    """Return the name of an artifact that was trained on other tasks: these, so that its seeds form one method."""
    if maker is not None:
        tasks = "+".join(maker.metric_of)
        return f"{maker.method} on {tasks}" if maker.run.command == "stage2" else tasks
    manifest = read_artifact(path)
    return str(run.result.get("name")) if manifest is None else "+".join(manifest.task_names)


def _metrics_of(run: RunFolder, default_task: str) -> Iterable[tuple[str, str, dict[str, float], Predictions | None]]:
    """Yield task, split, finite metrics and predictions for each entry of a result."""
    outcomes = read_json(run.folder / OUTCOMES)
    for key, metrics in (run.result.get("metrics") or {}).items():
        task, _, split = key.rpartition("/")
        numbers = {
            str(name): float(value)
            for name, value in (metrics.items() if isinstance(metrics, dict) else ())
            if isinstance(value, (int, float)) and np.isfinite(value)
        }
        if numbers:
            yield task or default_task, split, numbers, Predictions.of(outcomes.get(key))


def trained_runs(runs: Iterable[RunFolder]) -> list[Trained]:
    """Return the last training run of each artifact. Skipped runs (already done) are replaced by the original run."""
    trainings = [
        (artifact_path(run), identity_config(run.config), run)
        for run in _with_artifact(runs, "stage1", "stage2", "select")
    ]
    lookup = Lookup({artifact: flat for artifact, flat, _ in trainings})
    made: dict[tuple[str, str], Trained] = {}
    for artifact, flat, run in trainings:
        key = (artifact, key_of(flat))
        if not (run.skipped and key in made):
            made[key] = _trained(run, artifact, flat, lookup)
    return list({one.artifact: one for one in made.values()}.values())


def _trained(run: RunFolder, artifact: str, flat: dict[str, Any], lookup: Lookup) -> Trained:
    config, store, manifest = run.config, Path(artifact).parent, read_artifact(artifact)
    stored = {} if manifest is None else manifest.run.config
    if manifest is not None and {k: v for k, v in stored.items() if not k.startswith("inputs.")} == flat:
        settings = lookup.of_artifact(manifest, store)
    else:  # the artifact was replaced by a different run or removed
        settings = lookup.of_run(flat, store, list(map(str, run.result.get("sources") or ())) or None)
    tasks = config.get("tasks") or [config.get("task") or {}]
    return Trained(
        run=run,
        metric_of={str(task.get("name")): str((task.get("metrics") or [""])[0]) for task in tasks},
        method=_method(config, run.result, settings),
        variant={key: value for key, value in settings.items() if key not in _NOT_VARIANT},
        setting=(str(flat.get("backbone.name_or_path")), flat.get("data.limit.train")),
        artifact=artifact,
        manifest=manifest,
    )


def read_artifact(path: str) -> Manifest | None:
    with contextlib.suppress(OSError, UserError):
        return read_folder(Path(path))
    return None


def _method(config: Mapping[str, Any], result: Mapping[str, Any], settings: Settings) -> str:
    """Return the title of the method in tables. Runs of different versions may use different names."""
    composition, selection = config.get("composition"), result.get("selection")
    name = str((composition or config.get("method") or {}).get("name"))
    if selection is not None and selection["chosen"] != name:
        name = str(selection["chosen"])
        composition = {} if name in COMPOSITIONS else None
    selected = "" if selection is None else ", selected"
    known = METHODS.get(name) if composition is None else COMPOSITIONS.get(name)
    title = (known.title if known is not None else "") or name
    if composition is None:
        return title + selected
    sources: list[Any] = list(settings.get("sources") or result.get("sources") or ())
    of = str(len(sources))
    if len(sources) == 1:
        one = sources[0]
        of = str((one.get("artifact") or one.get("task.name") or "one") if isinstance(one, Mapping) else one)
    return f"{title} of {of}{' + own adapter' if composition.get('target_adapter') else ''}{selected}"


def artifact_path(run: RunFolder) -> str:
    """Return the absolute path of the run's artifact."""
    place = Path(str(run.result["artifact"]))
    if not place.is_absolute():
        for above in (Path.cwd(), *run.folder.parents):  # relative to the directory where the run was started
            if (above / place).exists():
                return str((above / place).resolve())
    return str(place)
