"""The trainings of the study: the splits of the targets, the source adapters, and a sweep per target and method."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusion.config.data import Fold
from fusion.errors import UserError
from fusion.files import read_json
from fusion.locks import LOCKS, lock
from fusion.store.lookup import names
from pipelines.commands import attempt, examples, say, task_config
from pipelines.study.config import BASELINE, FOLDS, LORA, METHODS, METRICS, STAGE1, StudyConfig
from pipelines.study.results import Cell, append_results, best_rate, read_results

_HELD_OUT_SEED = 20_261_201


def write_splits(config: StudyConfig, task: str) -> None:
    """Write the target's splits: test examples, validation examples that are held out from train, and the rest of train."""
    folder = config.data / task
    if (folder / "test.jsonl").is_file():
        return
    train = examples(task, "train", None, config.data_dir)
    try:
        test = examples(task, "test", config.test_rows, config.data_dir)
    except UserError:
        test = None
    if test is None or test.labels is None:
        test = examples(task, "validation", config.test_rows, config.data_dir)
    order = np.random.RandomState(_HELD_OUT_SEED).permutation(len(train)).tolist()
    count = min(config.validation_rows, len(train) // 3)
    parts = {
        "train": train.taken(sorted(order[count:])),
        "validation": train.taken(sorted(order[:count])),
        "test": test,
    }
    described = task_config(task)
    columns = [described.text] if isinstance(described.text, str) else list(described.text)
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):  # test is written last, see above
        rows = parts[split]
        lines = []
        for number, texts in enumerate(rows.texts):
            line: dict[str, Any] = dict(zip(columns, texts, strict=True))
            if rows.choices is not None:
                names_of = described.choices if isinstance(described.choices, list) else None
                line |= (
                    dict(zip(names_of, rows.choices[number], strict=True))
                    if names_of
                    else {str(described.choices): rows.choices[number]}
                )
            line[described.label] = (rows.labels or [])[number]
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


class Study:
    """Runs the trainings that have no result yet. Several processes with the same settings share the work."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.path = config, Path(config.results)
        self.results = read_results(config)

    def cell(self, target: str, rows: int, method: str, seed: int, rate: float) -> Cell:
        return Cell(self.config.backbone, target, rows, method, seed, rate)

    def run(self) -> None:
        """Train everything. The learning rates are selected with the first seed, before the other seeds are trained."""
        config = self.config
        first, *others = config.seeds
        self._each("splits", config.targets, partial(write_splits, config))
        sources = {source for target in config.targets for source in config.sources_of(target)}
        used = [METHODS[one] for one in config.methods]
        if any("{sources}" in one.overrides for one in used):
            self._each("source", sorted(sources), self.train_source, "", config.source_overrides)
        if any(one.uses_loras for one in used):
            self._each("source", sorted(sources), self.train_source, LORA, config.lora_overrides)
        for rows in config.rows:
            for method in config.order:
                what = f"{rows}-{method}"
                self._each(what, config.targets, self.train, rows, method, [first], METHODS[method].rates)
                rate = best_rate(self.results, config, rows, method)
                say(f"\n{METHODS[method].title}, {rows} examples: learning rate {rate:g}")
                self._each(what, config.targets, self.train, rows, method, others, [rate])

    def _each(self, what: str, tasks: Sequence[str], work: Callable[..., None], *settings: Any) -> None:
        """Call `work` with each task and the settings; tasks that another process works on come last."""
        busy: list[str] = []
        for wait, remaining in ((0.0, tasks), (-1.0, busy)):
            for task in remaining:
                path = self.config.store / LOCKS / f"study-{what}-{task}"
                try:
                    with lock(path, f"{what} {task} is being trained", wait):
                        self.results = read_results(self.config)
                        work(task, *settings)
                except TimeoutError:
                    busy.append(task)
        self.results = read_results(self.config)

    def train_source(self, source: str, ending: str, overrides: Sequence[str]) -> None:
        """Train the adapter or LoRA of a source, named SOURCE + ending, unless it is stored."""
        config, name = self.config, f"{source}{ending}"
        if name in names(config.store):
            return
        place = [f"data.dir={config.data_dir}"] if config.data_dir and task_config(source).corpus is None else []
        limits = [f"data.limit.train={config.source_rows}", "data.limit.validation=300"]
        words = [f"+task={source}", f"name={name}", *config.shared, *place, *limits, *overrides]
        run(STAGE1, [*words, f"hydra.run.dir={config.output}/runs/source-{name}"])

    def train(self, target: str, rows: int, method: str, seeds: Sequence[int], rates: Sequence[float]) -> None:
        """Train a method with each seed and learning rate that has no result, evaluate, and append the results."""
        seeds_of: dict[tuple[float, ...], list[int]] = defaultdict(list)  # by the rates that are missing
        for seed in seeds:
            missing = tuple(r for r in rates if self.cell(target, rows, method, seed, r) not in self.results)
            seeds_of[missing].append(seed)
        for missing, each in seeds_of.items():
            if missing:
                self._sweep(target, rows, method, each, missing)

    def _sweep(self, target: str, rows: int, method: str, seeds: Sequence[int], rates: Sequence[float]) -> None:
        """Train a method in one sweep, evaluate the artifacts in another, and append the results."""
        config, definition, runs = self.config, METHODS[method], Path(self.config.output) / "runs"
        own = ""
        if definition.uses_own:
            own_rate = best_rate(self.results, config, rows, BASELINE)  # trained before, see StudyConfig.order
            own = artifact_name(target, rows, BASELINE, "${seed}", f"{own_rate:g}")
            self._train_own(target, rows, seeds, own_rate, own, folds="cross_fit" in definition.overrides)
        sources = config.sources_of(target)
        loras = ",".join(f"{source}{LORA}" for source in sources)
        words = definition.overrides.format(own=own, sources=",".join(sources), loras=loras).split()
        swept = [f"seed={','.join(map(str, seeds))}", f"optim.lr={','.join(map(str, rates))}"]
        swept.append(f"name={artifact_name(target, rows, method, '${seed}', '${optim.lr}')}")
        run(definition.module, ["-m", *words, *self._words(target, rows), *swept, *self._folders("${name}")])
        cells = {
            artifact_name(target, rows, method, str(seed), str(rate)): self.cell(target, rows, method, seed, rate)
            for seed in seeds
            for rate in rates
        }
        store = [f"store={config.store}", f"data.dir={config.data}"]
        folder = self._folders("${artifact}-test")
        test = [f"+task={target}", "split=test", *store, *folder]
        run("fusion.evaluate", ["-m", f"artifact={','.join(cells)}", *test])
        found = [
            result_of(cell, config.fingerprint(method), runs / name, runs / f"{name}-test")
            for name, cell in cells.items()
        ]
        append_results(self.path, found)
        for name in cells:
            if method != BASELINE:
                shutil.rmtree(config.store / name)
            for one in (name, f"{name}-test"):
                shutil.rmtree(runs / one, ignore_errors=True)

    def _folders(self, name: str) -> list[str]:
        return [f"hydra.sweep.dir={self.config.output}/runs", f"hydra.sweep.subdir={name}"]

    def _words(self, target: str, rows: int) -> list[str]:
        config = self.config
        sample = [f"data.dir={config.data}", f"data.limit.train={rows}", "data.limit.train_seed=${seed}"]
        metrics = [f"task.metrics=[{','.join(METRICS[target])}]"] if target in METRICS else []
        return [f"+task={target}", *metrics, *config.shared, *sample, *config.overrides]

    def _train_own(self, target: str, rows: int, seeds: Sequence[int], rate: float, own: str, folds: bool) -> None:
        """Train own adapters that are not in the store, and with `folds` those without a fold of the examples."""
        wanted, stored = {own.replace("${seed}", str(seed)) for seed in seeds}, names(self.config.store)
        swept = [f"seed={','.join(map(str, seeds))}", f"optim.lr={rate}", f"name={own}"]
        words = ["-m", *self._words(target, rows), *swept]
        if not wanted <= set(stored):
            run(STAGE1, [*words, *self._folders("${name}")])
        if folds:  # the command skips existing ones
            left_out = f"data.leave_out={','.join(map(str, Fold.each(FOLDS)))}"
            run(STAGE1, [*words, left_out, *self._folders("${name}-without-${data.leave_out}")])


def run(module: str, words: Sequence[str]) -> None:
    """Run a command. Raises UserError if it fails."""
    outcome = attempt(module, words)
    if outcome.code:
        raise UserError(f"{module} failed with exit code {outcome.code}: {' '.join(outcome.errors[-2:])}")


def artifact_name(target: str, rows: int, method: str, seed: str, rate: str) -> str:
    return f"{target}-{rows}-{method}-lr-{rate}-seed-{seed}"


def result_of(cell: Cell, settings: str, trained_in: Path, tested_in: Path) -> dict[str, Any]:
    """Return a line of the results from the folders of the training and the evaluation."""
    trained, tested = read_json(trained_in / "result.json"), read_json(tested_in / "result.json")
    ((_, validation),) = trained["metrics"].items()
    ((_, test),) = tested["metrics"].items()
    metric = next(iter(validation))
    return {
        **cell._asdict(),
        "settings": settings,
        "metric": metric,
        "validation": validation[metric],
        "test": test[metric],
        "metrics": test,
        "test_examples": tested["rows"],
        "best_epoch": trained["best_epoch"],
        "seconds": round(trained["speed"]["seconds"], 1),
        "trainable": trained["parameters"]["trainable"],
    }
