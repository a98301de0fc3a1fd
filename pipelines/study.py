"""Compare fusion with its baselines on many targets with few labels, at equal budget and on examples that chose nothing.

    python -m pipelines.study data_dir=../shared/data targets=[sst2,qqp] rows=[100] seeds=[1,2,3]

Source adapters are trained once, on up to `source_rows` examples. For each target, number of training examples and seed
(which also selects the sample of training examples), each method of `methods` is trained with the same number of
steps and the same examples. The best of its evaluations, and for each method and number of examples the best of `rates`
(with the first seed, averaged over the targets), are selected on `validation_rows` examples that are held out from the
training split. The scores are those on the examples of the task's test split or, if it has no labels, validation split,
which select nothing. The sources of a target never include its own adapter of all examples, nor those of
`RELATED_TEXTS`.

Each result is appended to `results` as one JSON line, so that an interrupted study continues. Artifacts of stage 2 are
removed after their evaluation. `report=true` trains nothing and prints the tables.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusion.cli.console import show_table
from fusion.config.fields import Settings, checked, integer
from fusion.errors import UserError
from fusion.files import read_json
from fusion.reporting.statistics import Sample, compare, holm
from fusion.store.lookup import names
from pipelines.commands import attempt, distinct, examples, run_workflow, say, task_config

STAGE1, STAGE2 = "fusion.stage1", "fusion.stage2"
BASELINE = "adapter"
# Pairs of tasks that share texts: the adapter of one is not a source for the other.
RELATED_TEXTS = ({"sst2", "mr"}, {"mrpc", "stsb"}, {"movies", "movies_rating"}, {"tweets", "tweets_rating"})
_HELD_OUT_SEED = 20_261_201
FOLDS = 4


class StudyMethod(NamedTuple):
    """A method of the study. Its overrides may contain {own}, {sources} and {rows}."""

    title: str
    module: str
    overrides: str
    rates: tuple[float, ...]  # learning rates to select from
    needs: tuple[str, ...] = ()  # methods whose artifacts are among the sources


_FUSION = "composition=adapterfusion sources=[{sources}"
METHODS: dict[str, StudyMethod] = {
    "head": StudyMethod("head", STAGE1, "method=head", (2e-3, 5e-3, 2e-2)),
    "adapter": StudyMethod("single adapter", STAGE1, "", (5e-4, 1e-3, 2e-3)),
    "full": StudyMethod("full fine-tuning", STAGE1, "method=full", (2e-5, 5e-5, 1e-4)),
    "fusion": StudyMethod("fusion, as published", STAGE2, _FUSION + ",{own}]", (1e-4, 2e-4, 5e-4), ("adapter",)),
    "fusion_without_own": StudyMethod("fusion without the own adapter", STAGE2, _FUSION + "]", (1e-4, 2e-4, 5e-4)),
    "fusion_cross_fit": StudyMethod(
        "fusion, cross-fitted",
        STAGE2,
        _FUSION + f",{{own}}] composition.cross_fit={FOLDS}",
        (1e-4, 2e-4, 5e-4),
        ("adapter",),
    ),
    "fusion_dropout": StudyMethod(
        "fusion, own adapter dropped",
        STAGE2,
        _FUSION + ",{own}] composition.source_dropout=0.5 composition.dropped=own",
        (1e-4, 2e-4, 5e-4),
        ("adapter",),
    ),
    "fusion_new_adapter": StudyMethod(
        "fusion with a new adapter and a null source",
        STAGE2,
        _FUSION + "] composition.null_source=true composition.target_adapter=true",
        (2e-4, 5e-4, 1e-3),
    ),
    "scalearn": StudyMethod(
        "ScaLearn", STAGE2, "composition=scalearn sources=[{sources},{own}]", (2e-3, 5e-3, 1e-2), ("adapter",)
    ),
    "mean": StudyMethod("mean", STAGE2, "composition=mean sources=[{sources},{own}]", (2e-3, 5e-3, 2e-2), ("adapter",)),
    "continued": StudyMethod(
        "best source, continued", STAGE2, "composition=continued sources=[{sources}]", (5e-4, 1e-3, 2e-3)
    ),
}


@dataclass
class StudyConfig(Settings):
    targets: list[str] = distinct(["sst2", "qqp", "subj", "cola", "mrpc", "stsb", "snli", "rte", "cb", "tweets"])
    sources: list[str] = distinct(
        ["mr", "sst2", "products", "movies", "qqp", "mrpc", "stsb", "snli", "qnli", "subj", "cola"]
    )
    rows: list[int] = distinct([100, 1000])
    seeds: list[int] = distinct([1, 2, 3, 4, 5])
    methods: list[str] = checked(
        list(METHODS),
        lambda ids: 0 < len(ids) == len(set(ids)) and set(ids) <= METHODS.keys(),
        f"some of {', '.join(METHODS)}",
    )
    backbone: str = "minilm"
    data_dir: str | None = None
    source_rows: int = integer(3000, 1)
    validation_rows: int = integer(100, 1)
    test_rows: int = integer(500, 1)
    output: str = "outputs/study"
    results: str = "docs/results/study.jsonl"
    overrides: list[str] = field(  # of the methods
        default_factory=lambda: [
            "data.batch_size=16",
            "data.max_length=96",
            "optim.epochs=3",
            "optim.min_steps=150",
            "optim.patience=null",
        ]
    )
    source_overrides: list[str] = field(
        default_factory=lambda: ["data.max_length=96", "trainer.max_epochs=3", "optim.lr=1e-3"]
    )
    report: bool = False

    @property
    def store(self) -> Path:
        return Path(self.output) / "store"

    @property
    def data(self) -> Path:
        return Path(self.output) / "data"

    @property
    def shared(self) -> list[str]:
        return [f"backbone={self.backbone}", f"store={self.store}", "logger=none"]

    def sources_of(self, target: str) -> list[str]:
        related = [pair for pair in RELATED_TEXTS if target in pair]
        return [source for source in self.sources if source != target and not any(source in pair for pair in related)]


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


class Cell(NamedTuple):
    """One training in the study."""

    backbone: str
    target: str
    rows: int
    method: str
    seed: int
    rate: float


def read_results(path: Path) -> dict[Cell, dict[str, Any]]:
    """Return the results by cell. Raises UserError for a line that is not a result."""
    found: dict[Cell, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], 1):
        try:
            result = json.loads(line)
            found[Cell(*(result[key] for key in Cell._fields))] = result
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: is not a result of the study; remove the line") from None
    return found


def append_results(path: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Append lines. A single write, since several studies may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(dict(result)) + "\n" for result in results)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


class Study:
    """Runs the trainings that have no result yet."""

    def __init__(self, config: StudyConfig) -> None:
        self.config, self.path = config, Path(config.results)
        self.results = read_results(self.path)

    def cell(self, target: str, rows: int, method: str, seed: int, rate: float) -> Cell:
        return Cell(self.config.backbone, target, rows, method, seed, rate)

    def train_sources(self) -> None:
        config = self.config
        wanted = {source for target in config.targets for source in config.sources_of(target)} - set(
            names(config.store)
        )
        data = [f"data.dir={config.data_dir}"] if config.data_dir else []
        for source in sorted(wanted):
            place = [] if source in _CORPORA else data
            limits = [f"data.limit.train={config.source_rows}", "data.limit.validation=300"]
            words = [f"+task={source}", *config.shared, *place, *limits, *config.source_overrides]
            run(STAGE1, [*words, f"hydra.run.dir={config.output}/runs/source-{source}"])

    def run(self) -> None:
        """Train everything. The learning rates are selected with the first seed, before the other seeds are trained."""
        config = self.config
        for target in config.targets:
            write_splits(config, target)
        self.train_sources()
        first, *others = config.seeds
        for rows in config.rows:
            for method in config.methods:
                for target in config.targets:
                    self.train(target, rows, method, [first], METHODS[method].rates)
                rate = best_rate(self.results, config, rows, method)
                say(f"\n{METHODS[method].title}, {rows} examples: learning rate {rate:g}")
                for target in config.targets:
                    self.train(target, rows, method, others, [rate])

    def train(self, target: str, rows: int, method: str, seeds: Sequence[int], rates: Sequence[float]) -> None:
        """Train a method with each seed and learning rate that has no result, evaluate, and append the results."""
        config, definition = self.config, METHODS[method]
        missing = [(s, r) for r in rates for s in seeds if self.cell(target, rows, method, s, r) not in self.results]
        if not missing:
            return
        for needed in definition.needs:
            first = config.seeds[0]
            self.train(target, rows, needed, [first], METHODS[needed].rates)
            rate = best_rate(self.results, config, rows, needed)
            self.train(target, rows, needed, [seed for seed, _ in missing], [rate])
        if {seed for seed, _ in missing} == {config.seeds[0]}:
            self._sweep(target, rows, method, [config.seeds[0]], [rate for _, rate in missing])
            return
        for rate in sorted({rate for _, rate in missing}):
            self._sweep(target, rows, method, [seed for seed, other in missing if other == rate], [rate])

    def _sweep(self, target: str, rows: int, method: str, seeds: Sequence[int], rates: Sequence[float]) -> None:
        """Train a method in one sweep, evaluate the artifacts in another, and append the results."""
        config, definition, runs = self.config, METHODS[method], Path(self.config.output) / "runs"
        own = ""
        if definition.needs:
            own_rate = best_rate(self.results, config, rows, BASELINE)
            own = artifact_name(target, rows, BASELINE, "${seed}", f"{own_rate:g}")
            if "cross_fit" in definition.overrides:
                self._train_folds(target, rows, seeds, own_rate, own)
        words = definition.overrides.format(own=own, sources=",".join(config.sources_of(target))).split()
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
        run("fusion.evaluate", ["-m", f"artifact={','.join(cells)}", f"+task={target}", "split=test", *store, *folder])
        found = [result_of(cell, runs / name, runs / f"{name}-test") for name, cell in cells.items()]
        append_results(self.path, found)
        self.results |= dict(zip(cells.values(), found, strict=True))
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
        return [f"+task={target}", *config.shared, *sample, *config.overrides]

    def _train_folds(self, target: str, rows: int, seeds: Sequence[int], rate: float, own: str) -> None:
        """Train the own adapters without each fold of the examples; existing ones are skipped by the command."""
        folds = ",".join(f"{fold}/{FOLDS}" for fold in range(FOLDS))
        swept = [f"seed={','.join(map(str, seeds))}", f"optim.lr={rate}", f"name={own}", f"data.leave_out={folds}"]
        run(STAGE1, ["-m", *self._words(target, rows), *swept, *self._folders("${name}-without-${data.leave_out}")])


_CORPORA = ("tweets", "movies", "products", "editorials")


def run(module: str, words: Sequence[str]) -> None:
    """Run a command. Raises UserError if it fails."""
    outcome = attempt(module, words)
    if outcome.code:
        raise UserError(f"{module} failed with exit code {outcome.code}: {' '.join(outcome.errors[-2:])}")


def artifact_name(target: str, rows: int, method: str, seed: str, rate: str) -> str:
    return f"{target}-{rows}-{method}-lr-{rate}-seed-{seed}"


def result_of(cell: Cell, trained_in: Path, tested_in: Path) -> dict[str, Any]:
    """Return a line of the results from the folders of the training and the evaluation."""
    trained, tested = read_json(trained_in / "result.json"), read_json(tested_in / "result.json")
    ((_, validation),) = trained["metrics"].items()
    ((_, test),) = tested["metrics"].items()
    metric = next(iter(test))
    return {
        **cell._asdict(),
        "metric": metric,
        "validation": validation[metric],
        "test": test[metric],
        "metrics": test,
        "test_examples": tested["rows"],
        "best_epoch": trained["best_epoch"],
        "seconds": round(trained["speed"]["seconds"], 1),
        "trainable": trained["parameters"]["trainable"],
    }


def best_rate(results: Mapping[Cell, Mapping[str, Any]], config: StudyConfig, rows: int, method: str) -> float:
    """Return the learning rate with the highest mean validation score over the targets, with the first seed.

    Only targets with a result for every learning rate are used; without one, the middle rate.
    """
    rates, first = METHODS[method].rates, config.seeds[0]
    scores: dict[float, list[float]] = {rate: [] for rate in rates}
    for target in config.targets:
        cells = [Cell(config.backbone, target, rows, method, first, rate) for rate in rates]
        if all(cell in results for cell in cells):
            for cell in cells:
                scores[cell.rate].append(results[cell]["validation"])
    if not scores[rates[0]]:
        return rates[len(rates) // 2]
    return max(rates, key=lambda rate: statistics.fmean(scores[rate]))


class Comparison(NamedTuple):
    """Difference of a method from the baseline on one target."""

    target: str
    rows: int
    method: str
    scores: list[float]
    baseline: list[float]
    difference: float
    low: float | None
    high: float | None
    p: float | None  # after Holm's correction over the targets


def comparisons(
    results: Mapping[Cell, Mapping[str, Any]], config: StudyConfig, against: str = BASELINE
) -> list[Comparison]:
    """Compare each method with a baseline, paired by seed. Methods and targets without results are omitted."""
    found = []
    for rows in config.rows:
        rates = {method: best_rate(results, config, rows, method) for method in {*config.methods, against}}
        for method in config.methods:
            each = []
            for target in config.targets:
                pairs = []
                for seed in config.seeds:
                    own, other = (
                        results.get(Cell(config.backbone, target, rows, one, seed, rates[one]))
                        for one in (method, against)
                    )
                    if own is not None and other is not None:
                        pairs.append((seed, own["test"], other["test"]))
                if not pairs:
                    continue
                difference = compare(
                    [Sample(s, one) for s, one, _ in pairs], [Sample(s, two) for s, _, two in pairs], ""
                )
                scores, baselines = [one for _, one, _ in pairs], [two for *_, two in pairs]
                numbers = difference.mean, difference.low, difference.high, difference.p
                each.append(Comparison(target, rows, method, scores, baselines, *numbers))
            known = [one for one in each if one.p is not None]
            adjusted = dict(zip((one.target for one in known), holm([one.p or 0.0 for one in known]), strict=True))
            found += [one._replace(p=adjusted.get(one.target)) for one in each]
    return found


def report(config: StudyConfig, results: Mapping[Cell, Mapping[str, Any]]) -> None:
    """Print, for each number of examples, the mean scores by target and method, and the differences from the adapter."""
    for rows in config.rows:
        every = [one for one in comparisons(results, config) if one.rows == rows]
        by_method: dict[str, list[Comparison]] = defaultdict(list)
        for one in every:
            by_method[one.method].append(one)
        if not every:
            continue
        say(f"\n{config.backbone}, {rows} training examples, test scores, mean ± standard deviation over seeds\n")
        targets = [target for target in config.targets if any(one.target == target for one in every)]
        table = [["method", *targets, "mean", "difference"]]
        for method, own in by_method.items():
            scores = {one.target: one.scores for one in own}
            shown = [mean_and_deviation(scores[target]) if target in scores else "" for target in targets]
            mean = (
                f"{statistics.fmean(map(statistics.fmean, scores.values())):.3f}" if len(scores) == len(targets) else ""
            )
            table.append(
                [METHODS[method].title, *shown, mean, f"{statistics.fmean(one.difference for one in own):+.3f}"]
            )
        show_table(table)
        say(f"\nPaired differences from the {METHODS[BASELINE].title}, 95 % intervals; p after Holm's correction\n")
        table = [["method", "wins", "ties", "losses", *targets]]
        for method, own in by_method.items():
            if method == BASELINE:
                continue
            wins = sum(one.low is not None and one.low > 0 for one in own)
            losses = sum(one.high is not None and one.high < 0 for one in own)
            differences = {one.target: shown_difference(one) for one in own}
            counts = [str(wins), str(len(own) - wins - losses), str(losses)]
            table.append([METHODS[method].title, *counts, *(differences.get(target, "") for target in targets)])
        show_table(table)


def mean_and_deviation(scores: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.3f}{deviation}"


def shown_difference(one: Comparison) -> str:
    interval = "" if one.low is None or one.high is None else f" ({one.low:+.3f} to {one.high:+.3f})"
    p = "" if one.p is None else f", p {one.p:.2f}"
    return f"{one.difference:+.3f}{interval}{p}"


def work(config: StudyConfig) -> None:
    study = Study(config)
    if not config.report:
        study.run()
    report(config, study.results)


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(StudyConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
