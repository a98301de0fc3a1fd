"""Train source adapters, fuse them for a new task and compare test scores, on two cores and without a model hub.

    python -m pipelines.demo labels=100 seed=0

Three source adapters (movie reviews, product reviews, editorials) are trained and then fused for tweets, with only
`labels` labelled examples. A head alone and a single adapter are trained on the same tweets for the same number of
steps. Every step is one of the project's commands and is printed as you would type it.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fusion.cli.config_sources import conf_folder
from fusion.cli.console import show_table
from fusion.config.fields import MAX_SEED, Settings, integer
from fusion.errors import UserError
from fusion.files import write_json
from pipelines.commands import call, run_workflow, say, stored

SOURCES = ("movies", "products", "editorials")
TARGET = "tweets"
# For each method: the title in the table, the command and its overrides.
METHODS = {
    "head": ("head alone", "fusion.stage1", ("method=head", "optim.lr=1e-2")),
    "adapter": ("single adapter", "fusion.stage1", ("optim.lr=5e-4",)),
    "fusion": (
        f"fusion of the {len(SOURCES)} sources",
        "fusion.stage2",
        (f"sources=[{','.join(SOURCES)}]", "optim.lr=2e-4"),
    ),
}
# The demo uses its own data, not the user's folder.
HIDDEN = ("FUSION_DATA_DIR",)


@dataclass
class DemoConfig(Settings):
    labels: int = integer(100, 1)  # training examples of the target; as many others select the best epoch
    seed: int = integer(0, 0, MAX_SEED)  # of the initialization and the order of the examples
    rows: int = integer(3000, 1)  # maximum number of training examples per source
    source_epochs: int = integer(3, 1)
    target_epochs: int = integer(20, 1)
    output: str = "outputs/demo"

    @property
    def folder(self) -> Path:
        """One folder per seed and per setting of the sources, which are shared by all values of `labels`."""
        parts = [f"seed-{self.seed}"]
        for f in fields(self):
            if f.name in ("rows", "source_epochs", "target_epochs") and getattr(self, f.name) != f.default:
                parts.append(f"{f.name}-{getattr(self, f.name)}")
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
    """Run all steps; the commands reuse artifacts and scores that already exist."""
    shared = ["backbone=minilm", f"seed={config.seed}", f"store={config.store}", "logger=csv"]
    shared.append("optim.patience=null")
    announce(1, f"Three source adapters: {', '.join(SOURCES)}, up to {config.rows} examples each")
    overrides = [
        "-m",
        f"+task={','.join(SOURCES)}",
        *shared,
        f"data.limit.train={config.rows}",
        "optim.lr=5e-4",
        f"trainer.max_epochs={config.source_epochs}",
        f"hydra.sweep.dir={config.folder / 'runs' / 'sources'}",
    ]
    done(1, call("fusion.stage1", overrides, without=HIDDEN))
    for step, (method, (title, module, own)) in enumerate(METHODS.items(), 2):
        announce(step, f"{title}, on {config.labels} labelled {TARGET}")
        overrides = [
            f"+task={TARGET}",
            *own,
            *shared,
            f"name={config.name(method)}",
            f"data.limit.train={config.labels}",
            f"data.limit.validation={config.labels}",
            "data.batch_size=16",
            f"trainer.max_epochs={config.target_epochs}",
            f"hydra.run.dir={config.folder / 'runs' / config.name(method)}",
        ]
        done(step, call(module, overrides, without=HIDDEN))
    return evaluate(config)


def announce(step: int, what: str) -> None:
    say(f"\n[{step}/5] {what}")


def done(step: int, seconds: float) -> None:
    say(f"[{step}/5] done in {seconds:.0f} s")


def evaluate(config: DemoConfig) -> list[Row]:
    """Return the test scores of the sources, which saw no label of the target, and of the methods."""
    announce(5, f"Scores on the test split of {TARGET}")
    runs = config.folder / "runs" / f"test-{config.labels}"
    artifacts = [*SOURCES, *map(config.name, METHODS)]
    overrides = [
        "-m",
        f"artifact={','.join(artifacts)}",
        f"+task={TARGET}",
        "split=test",
        f"store={config.store}",
        f"hydra.sweep.dir={runs}",
        "hydra.sweep.subdir=${artifact}",
    ]
    call("fusion.evaluate", overrides, without=HIDDEN)

    def score(name: str) -> float:
        result = json.loads((runs / name / "result.json").read_text(encoding="utf-8"))
        return float(result["metrics"]["test"]["accuracy"])

    rows = [Row(f"{name}, no {TARGET} label", score(name), artifact=str(config.store / name)) for name in SOURCES]
    for method, (title, *_) in METHODS.items():
        name = config.name(method)
        result = stored(config.store, name)["result"]
        trained = result["parameters"]["trainable"], result["speed"]["seconds"]
        rows.append(Row(title, score(name), *trained, str(config.store / name)))
    return rows


def labels_of(split: str, limit: int | None = None) -> list[Any]:
    """Return the target's labels of a split, as the commands read them with `data.limit.SPLIT=limit`.

    Raises:
        UserError: if the text is not cached and cannot be downloaded, or has fewer examples than `limit`.
    """
    from omegaconf import OmegaConf

    from fusion.config.data import DataConfig, LimitConfig
    from fusion.config.task import TaskConfig
    from fusion.data.rows import load_rows

    file = OmegaConf.load(conf_folder() / "task" / f"{TARGET}.yaml")
    task = OmegaConf.merge(OmegaConf.structured(TaskConfig), file, {"name": TARGET})
    data = DataConfig(limit=LimitConfig(**{split: limit}))
    labels = load_rows(OmegaConf.to_object(task), data, split).labels  # type: ignore[arg-type]
    assert labels is not None
    if limit is not None and len(labels) < limit:
        raise UserError(f"labels={limit}: {TARGET} has only {len(labels)} examples in {split}")
    return list(labels)


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
    train, test = labels_of("train", config.labels), labels_of("test")
    selecting = len(labels_of("validation")[: config.labels])
    rows = [Row("majority class", majority_score(train, test)), *run(config)]
    path = config.folder / f"labels-{config.labels}"
    content = {"config": asdict(config), "test_rows": len(test), "rows": [asdict(row) for row in rows]}
    write_json(path.with_suffix(".json"), content)
    title = f"{TARGET} with {config.labels} labels, seed {config.seed}; {len(test)} test examples"
    draw(rows, title, path)
    say(f"\n{title}\n")
    show_table(table(rows))
    sources = sum(stored(config.store, name)["result"]["speed"]["seconds"] for name in SOURCES)
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
