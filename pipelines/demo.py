"""Train source adapters, fuse them for a new task and compare test scores, on two cores and without a model hub.

    python -m pipelines.demo labels=100 seed=0

Three source adapters (movie reviews, product reviews, editorials) are trained and then fused for tweets, with only
`labels` labelled examples. A head alone and a single adapter are trained on the same tweets for the same number of
steps. Every step is one of the project's commands and is printed as you would type it.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusion.cli.console import show_table
from fusion.config.fields import MAX_SEED, Settings, integer
from fusion.errors import UserError
from fusion.files import read_json, write_json
from fusion.store.lookup import read_manifest
from pipelines.commands import call, examples, run_workflow, say

STAGE1 = "fusion.stage1"
SOURCES = ("movies", "products", "editorials")
TARGET = "tweets"
# For each method: the title in the table, the command and its overrides.
METHODS = {
    "head": ("head alone", STAGE1, ("method=head", "optim.lr=1e-2")),
    "adapter": ("single adapter", STAGE1, ("optim.lr=5e-4",)),
    "fusion": (
        f"fusion of the {len(SOURCES)} sources",
        "fusion.stage2",
        (f"sources=[{','.join(SOURCES)}]", "optim.lr=2e-4"),
    ),
}

# Defaults of the sizes, by backbone: a step of the larger ones takes ten times as long.
SIZES = {"minilm": {"rows": 3000, "source_epochs": 3, "target_epochs": 20}}
LARGER = {"rows": 1000, "source_epochs": 1, "target_epochs": 10}


@dataclass
class DemoConfig(Settings):
    labels: int = integer(100, 1)  # training examples of the target; as many others select the best epoch
    seed: int = integer(0, 0, MAX_SEED)  # of the initialization and the order of the examples
    # Maximum number of training examples per source, and epochs. By default, what takes minutes: see `SIZES`.
    rows: int | None = integer(None, 1, null="the default of the backbone")
    source_epochs: int | None = integer(None, 1, null="the default of the backbone")
    target_epochs: int | None = integer(None, 1, null="the default of the backbone")
    backbone: str = "minilm"
    accept_licence: bool = False  # of the backbone, if it is only available under such terms
    output: str = "outputs/demo"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in self.default_sizes.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def default_sizes(self) -> dict[str, int]:
        return SIZES.get(self.backbone, LARGER)

    @property
    def folder(self) -> Path:
        """Directory of this backbone, seed and configuration of the sources.

        All values of `labels` use the same source adapters.
        """
        parts = [*([] if self.backbone == DemoConfig.backbone else [self.backbone]), f"seed-{self.seed}"]
        parts += [
            f"{name}-{getattr(self, name)}" for name, size in self.default_sizes.items() if getattr(self, name) != size
        ]
        return Path(self.output) / "-".join(parts)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def name(self, method: str) -> str:
        return f"{TARGET}-{self.labels}-{method}"


@dataclass(frozen=True)
class Row:
    """A line of the table; `trainable` and `seconds` are those of the training run on the target."""

    method: str
    score: float
    trainable: int | None = None
    seconds: float | None = None
    artifact: str | None = None


def run(config: DemoConfig) -> list[Row]:
    """Run all steps. Returns the zero-shot test scores of the source adapters, and the test scores of the methods."""
    runs, tests = config.folder / "runs", config.folder / "runs" / f"test-{config.labels}"
    store = f"store={config.store}"
    shared = [f"backbone={config.backbone}", f"seed={config.seed}", store, "logger=csv", "optim.patience=null"]
    shared += ["backbone.accept_licence=true"] if config.accept_licence else []
    sources = [
        "-m",
        f"+task={','.join(SOURCES)}",
        *shared,
        f"data.limit.train={config.rows}",
        "optim.lr=5e-4",
        f"trainer.max_epochs={config.source_epochs}",
        f"hydra.sweep.dir={runs / 'sources'}",
    ]
    steps = [(f"Three source adapters: {', '.join(SOURCES)}, up to {config.rows} examples each", STAGE1, sources)]
    for method, (title, module, own) in METHODS.items():
        overrides = [
            f"+task={TARGET}",
            *own,
            *shared,
            f"name={config.name(method)}",
            f"data.limit.train={config.labels}",
            f"data.limit.validation={config.labels}",
            "data.batch_size=16",
            f"trainer.max_epochs={config.target_epochs}",
            f"hydra.run.dir={runs / config.name(method)}",
        ]
        steps.append((f"{title}, on {config.labels} labelled {TARGET}", module, overrides))
    artifacts = f"artifact={','.join([*SOURCES, *map(config.name, METHODS)])}"
    place = [store, f"hydra.sweep.dir={tests}", "hydra.sweep.subdir=${artifact}"]
    overrides = ["-m", artifacts, f"+task={TARGET}", "split=test", *place]
    steps.append((f"Scores on the test split of {TARGET}", "fusion.evaluate", overrides))
    for number, (what, module, overrides) in enumerate(steps, 1):
        say(f"\n[{number}/{len(steps)}] {what}")
        say(f"[{number}/{len(steps)}] done in {call(module, overrides):.0f} s")

    def score(name: str) -> float:
        return float(read_json(tests / name / "result.json")["metrics"]["test"]["accuracy"])

    rows = [Row(f"{name}, no {TARGET} label", score(name), artifact=str(config.store / name)) for name in SOURCES]
    for method, (title, *_) in METHODS.items():
        name = config.name(method)
        result = read_manifest(name, config.store).result
        trained = result.parameters["trainable"], result.speed["seconds"]
        rows.append(Row(title, score(name), *trained, str(config.store / name)))
    return rows


def labels_of(split: str, limit: int | None = None) -> list[Any]:
    """Return the labels of a split of the target. Raises UserError if it has fewer examples than `limit`."""
    labels = examples(TARGET, split, limit).labels or []
    if limit is not None and len(labels) < limit:
        raise UserError(f"labels={limit}: {TARGET} has only {len(labels)} examples in {split}")
    return labels


def majority_score(train: list[Any], test: list[Any]) -> float:
    """Return the test accuracy of always predicting the most frequent training label."""
    majority = max(sorted(set(train)), key=train.count)
    return test.count(majority) / len(test)


def table(rows: list[Row]) -> list[list[str]]:
    cells = [["method", "accuracy", "trainable", "seconds", "artifact"]]
    for row in rows:
        trainable = "" if row.trainable is None else f"{row.trainable:,}"
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        cells.append([row.method, f"{row.score:.3f}", trainable, seconds, row.artifact or ""])
    return cells


def verdict(rows: list[Row], test_rows: int) -> str:
    """Return a sentence about the best method, its lead over the second, and the standard error of the lead."""
    best, second = sorted(rows, key=lambda row: row.score, reverse=True)[:2]
    lead = best.score - second.score
    noise = 2 * math.sqrt(sum(row.score * (1 - row.score) / test_rows for row in (best, second)))
    return (
        f"Best: {best.method} with {best.score:.3f}, {lead:.3f} ({round(lead * test_rows)} of {test_rows} examples) "
        f"above {second.method}.\nThis is {'within' if lead < noise else 'beyond'} two standard errors of the "
        f"difference ({noise:.3f}), with a single seed."
    )


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Draw the scores as PATH.png and PATH.svg, with one color for all methods not trained on the target."""
    from fusion.reporting.figures import save, scores_figure

    lines = {row.method: (row.method if row.trainable else "", [row.score]) for row in rows}
    save(scores_figure({f"accuracy, {title}": lines}), path.parent, path.name)


def work(config: DemoConfig) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.pop("FUSION_DATA_DIR", None)  # the commands use the demo's own data, not the user's folder
    train, test = labels_of("train", config.labels), labels_of("test")
    selecting = len(labels_of("validation")[: config.labels])
    rows = [Row("majority class", majority_score(train, test)), *run(config)]
    path = config.folder / f"labels-{config.labels}"
    content = {"config": asdict(config), "test_rows": len(test), "rows": [asdict(row) for row in rows]}
    write_json(path.with_suffix(".json"), content)
    title = f"{TARGET} with {config.labels} labels, seed {config.seed}; {len(test)} test examples"
    title += "" if config.backbone == DemoConfig.backbone else f"; {config.backbone}"
    draw(rows, title, path)
    say(f"\n{title}\n")
    show_table(table(rows))
    sources = sum(read_manifest(name, config.store).result.speed["seconds"] or 0.0 for name in SOURCES)
    say(
        f"\n{verdict(rows, len(test))}\n"
        f"The sources were trained in {sources:.0f} s, once for all targets. {selecting} other {TARGET} selected the best "
        f"epoch of each method.\nResults: {path}.json, figure: {path}.png\n"
        f"Source attention, token-level: python -m fusion.report runs={shlex.quote(str(config.folder))}"
    )


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(DemoConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
