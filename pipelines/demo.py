"""From nothing to a fused model that answers, on two cores and without a model hub.

    python -m pipelines.demo labels=100 seed=0

Three source adapters (movie reviews, product reviews, editorials) are trained and then fused for tweets, of
which only `labels` have a label. A head alone and a single adapter learn from the very same tweets in the very
same number of steps. Every step is one of the project's commands, printed as you would type it.
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

from omegaconf import OmegaConf

from fusion.cli.config_sources import conf_folder
from fusion.errors import UserError
from fusion.runs.signals import exit_code
from pipelines.commands import call, read_config, say

SOURCES = ("movies", "products", "editorials")
TARGET = "tweets"
STEPS = 5
# The demo brings its own text: a data folder of the user's is for other commands.
HIDDEN = ("FUSION_DATA_DIR",)


@dataclass
class DemoConfig:
    labels: int = 100  # target rows to learn from; as many again choose the best epoch
    seed: int = 0  # of every initial value and of the order of the rows
    rows: int = 3000  # training rows of each source, where it has so many
    source_epochs: int = 3
    target_epochs: int = 20
    output: str = "outputs/demo"

    @property
    def folder(self) -> Path:
        """Of its own for each seed (and rows and epochs, where they are not the usual ones)."""
        usual = {field.name: field.default for field in fields(self)}
        others = ("rows", "source_epochs", "target_epochs")
        more = [f"-{key}-{getattr(self, key)}" for key in others if getattr(self, key) != usual[key]]
        return Path(self.output) / f"seed-{self.seed}{''.join(more)}"

    def __post_init__(self) -> None:
        for key in ("labels", "rows", "source_epochs", "target_epochs"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: expected 0 to 4294967295")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    score: float
    trainable: int | None = None  # parameters that learnt from the target's labels
    seconds: float | None = None  # of that training
    artifact: str | None = None


class Demo:
    """The steps, in order, each leaving its results in a folder that the next one knows."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        # A store per seed: the names in it stay the plain ones, and the sources serve any number of labels.
        self.folder = config.folder
        self.store = self.folder / "store"
        self.shared = ["backbone=minilm", f"seed={config.seed}", f"store={self.store}", "logger=csv"]
        self.target_names = {m: f"{TARGET}-{config.labels}-{m}" for m in ("head", "adapter", "fusion")}

    def run(self) -> list[Row]:
        self.train_sources()
        self.train_target("head", 2, "A head alone", "fusion.stage1", ["method=head", "optim.lr=1e-2"])
        self.train_target("adapter", 3, "A single adapter", "fusion.stage1", ["optim.lr=5e-4"])
        sources = f"sources=[{','.join(SOURCES)}]"
        self.train_target("fusion", 4, "Fusion of the three", "fusion.stage2", [sources, "optim.lr=2e-4"])
        return self.evaluate()

    def train_sources(self) -> None:
        announce(1, f"Three source adapters: {', '.join(SOURCES)}, up to {self.config.rows} rows each")
        overrides = [
            "-m",
            f"+task={','.join(SOURCES)}",
            *self.shared,
            f"data.limit.train={self.config.rows}",
            "optim.lr=5e-4",
            "optim.patience=null",
            f"trainer.max_epochs={self.config.source_epochs}",
            f"hydra.sweep.dir={self.folder / 'runs' / 'sources'}",
        ]
        self.train(1, "fusion.stage1", overrides, SOURCES)

    def train_target(self, method: str, step: int, title: str, module: str, overrides: list[str]) -> None:
        """A training on the target: what differs between the methods is in `overrides` alone."""
        labels, name = self.config.labels, self.target_names[method]
        announce(step, f"{title}, on {labels} labelled {TARGET}")
        overrides = [
            f"+task={TARGET}",
            *overrides,
            *self.shared,
            f"name={name}",
            f"data.limit.train={labels}",
            f"data.limit.validation={labels}",
            "data.batch_size=16",
            "optim.patience=null",
            f"trainer.max_epochs={self.config.target_epochs}",
            f"hydra.run.dir={self.folder / 'runs' / name}",
        ]
        self.train(step, module, overrides, (name,))

    def train(self, step: int, module: str, overrides: list[str], names: tuple[str, ...]) -> None:
        before = [self.stamp(name) for name in names]
        seconds = call(module, overrides, without=HIDDEN)
        if None not in before and before == [self.stamp(name) for name in names]:
            say(
                f"[{step}/{STEPS}] nothing to train: what an earlier run made is taken as it is ({', '.join(names)})"
            )
        else:
            say(f"[{step}/{STEPS}] done in {seconds:.0f} s")

    def stamp(self, name: str) -> int | None:
        """Changes with every new artifact of that name; None where there is none."""
        manifest = self.store / name / "manifest.json"
        return manifest.stat().st_mtime_ns if manifest.is_file() else None

    def evaluate(self) -> list[Row]:
        config = self.config
        announce(5, f"Scores on the test rows of {TARGET}")
        runs = self.folder / "runs" / f"test-{config.labels}"
        artifacts = [*SOURCES, *self.target_names.values()]
        new = [name for name in artifacts if not self.is_scored(runs, name)]
        if new:
            overrides = [
                "-m",
                f"artifact={','.join(new)}",
                f"+task={TARGET}",
                "split=test",
                f"store={self.store}",
                f"hydra.sweep.dir={runs}",
                "hydra.sweep.subdir=${artifact}",
            ]
            call("fusion.evaluate", overrides, without=HIDDEN)
        else:
            say(f"[5/{STEPS}] nothing to score: the scores of an earlier run are taken as they are")
        scores = {name: self.test_score(runs, name) for name in artifacts}
        rows = [
            Row(f"{name}, no {TARGET} label", scores[name], artifact=str(self.store / name))
            for name in SOURCES
        ]
        titles = {
            "head": "head alone",
            "adapter": "single adapter",
            "fusion": f"fusion of the {len(SOURCES)} sources",
        }
        for method, name in self.target_names.items():
            result = self.manifest(name)["result"]
            rows.append(
                Row(
                    titles[method],
                    scores[name],
                    result["parameters"]["trainable"],
                    result["speed"]["seconds"],
                    str(self.store / name),
                )
            )
        return rows

    def is_scored(self, runs: Path, name: str) -> bool:
        """Whether the artifact as it stands was scored already."""
        result, stored = runs / name / "result.json", self.stamp(name)
        return stored is not None and result.is_file() and result.stat().st_mtime_ns > stored

    def manifest(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.store / name / "manifest.json").read_text())
        return content

    def test_score(self, runs: Path, name: str) -> float:
        result = json.loads((runs / name / "result.json").read_text())
        return float(result["metrics"]["test"]["accuracy"])


def announce(step: int, what: str) -> None:
    say(f"\n[{step}/{STEPS}] {what}")


def labels_of(split: str, limit: int | None = None) -> list[Any]:
    """The target's labels of a split, as the commands see them under `data.limit.SPLIT=limit`.

    Raises:
        UserError: the text is not cached and cannot be fetched, or has fewer rows than `limit`.
    """
    from fusion.config.data import DataConfig, LimitConfig
    from fusion.config.task import TaskConfig
    from fusion.data.rows import load_rows

    file = OmegaConf.load(conf_folder() / "task" / f"{TARGET}.yaml")
    task = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), file))
    assert isinstance(task, TaskConfig)
    task.name = TARGET
    labels = load_rows(task, DataConfig(limit=LimitConfig(**{split: limit})), split).labels
    assert labels is not None
    if limit is not None and len(labels) < limit:
        raise UserError(
            f"labels={limit}: {TARGET} has {len(labels)} rows of {split}; expected no more than that"
        )
    return list(labels)


def majority_score(seen: list[Any], asked: list[Any]) -> float:
    """Accuracy of always saying what most of the rows to learn from are."""
    majority = max(sorted(set(seen)), key=seen.count)
    return asked.count(majority) / len(asked)


def table(rows: list[Row]) -> str:
    """The rows in aligned columns, for a terminal."""
    cells = [("", "accuracy", "trainable", "seconds", "artifact")]
    for row in rows:
        trainable = "" if row.trainable is None else f"{row.trainable:,}"
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        cells.append((row.method, f"{row.score:.3f}", trainable, seconds, row.artifact or ""))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for method, *numbers, artifact in cells:
        aligned = "  ".join(text.rjust(width) for text, width in zip(numbers, widths[1:], strict=False))
        lines.append(f"{method.ljust(widths[0])}  {aligned}  {artifact}".rstrip())
    return "\n".join(lines)


def verdict(rows: list[Row], test_rows: int) -> str:
    """What won, by how much, and how much of that chance alone could make."""
    ranked = sorted(rows, key=lambda row: row.score, reverse=True)
    best, second = ranked[0], ranked[1]
    by = best.score - second.score
    noise = math.sqrt(sum(row.score * (1 - row.score) / test_rows for row in (best, second)))
    if by == 0:
        first = f"{best.method} and {second.method} come out level at {best.score:.3f}."
    else:
        first = (
            f"{best.method} won: {best.score:.3f}, {by:.3f} ({round(by * test_rows)} of {test_rows} rows) "
            f"ahead of {second.method}."
        )
    chance = "within" if by < 2 * noise else "beyond"
    return (
        f"{first[0].upper()}{first[1:]}\n"
        f"That lead is {chance} two standard errors of a difference on so many rows ({2 * noise:.3f}), and one seed is "
        "one seed."
    )


def draw(rows: list[Row], title: str, path: Path) -> bool:
    """The table's scores as bars; false where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    colours = ["#b8c4ce" if row.trainable is None else "#5b8db8" for row in rows[:-1]] + ["#d9772b"]
    bars = axes.barh([row.method for row in rows], [row.score for row in rows], color=colours)
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0.5 if min(row.score for row in rows) > 0.55 else 0.0, 1.0)
    axes.set_xlabel("accuracy on the test rows" + ("; the axis starts at 0.5" if axes.get_xlim()[0] else ""))
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__, "Keys and what they are unless said: ", DemoConfig(), sep="\n")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = read_config(DemoConfig, arguments)
        seen, asked = labels_of("train", config.labels), labels_of("test")
        choosing = len(labels_of("validation")[: config.labels])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    demo = Demo(config)
    rows = [Row("majority class", majority_score(seen, asked)), *demo.run()]
    results = demo.folder / f"labels-{config.labels}.json"
    test_rows = len(asked)
    content = {"config": asdict(config), "test_rows": test_rows, "rows": [asdict(row) for row in rows]}
    (results).write_text(json.dumps(content, indent=2) + "\n")
    title = f"{TARGET} with {config.labels} labels, seed {config.seed}"
    picture = results.with_suffix(".png")
    drawn = draw(rows, title, picture)

    say(f"\n{title[0].upper()}{title[1:]}; {test_rows} test rows\n\n{table(rows)}\n")
    say(verdict(rows, test_rows))
    sources = sum(demo.manifest(name)["result"]["speed"]["seconds"] for name in SOURCES)
    say(
        f"The sources took {sources:.0f} s of training, once for all targets. {choosing} further {TARGET} chose the "
        "best epoch of each method.\n"
        f"Results: {results}"
        + (f", picture: {picture}" if drawn else " (no picture: matplotlib is not installed)")
        + f"\nWhom the fusion listened to, word by word: python -m fusion.report runs={shlex.quote(str(demo.folder))}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
