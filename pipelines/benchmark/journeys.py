"""The suites that time whole commands: epoch, startup, ddp."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from pipelines.benchmark.programs import Outcome, Programs
from pipelines.benchmark.report import Report
from pipelines.benchmark.session import RIVAL, Session
from pipelines.benchmark.verdicts import Figure, Target, ratio
from pipelines.commands import say

ONE_STEP = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
# Every step is logged and every line written, so that the file says when the first step was done.
WRITTEN_AT_ONCE = ("trainer.log_every_n_steps=1", "logger.csv.flush_every_n_steps=1")
METRICS = "csv/metrics.csv"
RATES = {"stage1": 1e-4, "stage2": 5e-5}  # of both: ours are the commands' defaults


def epoch(session: Session) -> Report:
    """One epoch of each task through our commands and through the rival's example; later epochs without the lower half.

    Seconds are those of training alone, from the first batch to the last, and of the evaluation after it, in
    both; loading, tokenising and starting are in neither. Both write a checkpoint.
    """
    settings = session.config.epoch
    programs = Programs(session)
    first = programs.train("stage1", settings.tasks[0], *ONE_STEP, "name=first")
    sources = random_sources(programs, first, settings.sources)
    for task in settings.tasks:
        programs.train("stage1", task, *ONE_STEP)  # tokens are cached from here on
        write_rows(session, task)
    stages = (("stage1", ()), ("stage2", (f"sources=[{','.join(sources)}]",)))
    seconds: dict[str, list[float]] = {}

    def ours(stage: str, task: str, more: tuple[str, ...]) -> None:
        rate = f"optim.lr={RATES[stage]}"
        outcome = programs.train(stage, task, rate, "trainer.max_epochs=1", f"name={task}-{stage}", *more)
        seconds.setdefault(f"ours: {stage} {task}", []).append(outcome.speed["seconds"])

    def theirs(stage: str, task: str) -> None:
        answer = session.worker(RIVAL).ask(
            "epoch",
            rows=str(session.work / f"{task}.json"),
            sources=settings.sources if stage == "stage2" else 0,
            rate=RATES[stage],
            max_length=settings.max_length,
            output=str(session.work / "rival"),
        )
        seconds.setdefault(f"rival: {stage} {task}", []).append(answer["seconds"])

    layers = {
        "all layers": (),
        "upper half": (f"adapter.layers=last:{_layers(first) - _layers(first) // 2}",),
    }
    dropped_on = settings.tasks[-1]

    def later(label: str) -> None:
        epochs = f"trainer.max_epochs={1 + settings.later_epochs}"
        outcome = programs.train("stage1", dropped_on, epochs, f"name={dropped_on}-later", *layers[label])
        mean = statistics.fmean(outcome.epoch_seconds()[1:])
        seconds.setdefault(f"ours: later epoch of {dropped_on}, {label}", []).append(mean)

    rounds = session.config.rounds_of_suite()
    for number in range(rounds):
        forward = number % 2 == 0
        for stage, more in stages:
            for task in settings.tasks:
                for one in (ours, theirs) if forward else (theirs, ours):
                    one(*((stage, task, more) if one is ours else (stage, task)))
        for label in layers if forward else reversed(list(layers)):
            later(label)
        say(f"round {number + 1} of {rounds} done")

    targets = {"stage1": Target(2.0, at_least=True), "stage2": Target(4.0, at_least=True)}
    names = {"stage1": "one adapter", "stage2": f"fusion of {settings.sources}"}
    figures = [
        ratio(
            f"an epoch of {task}, {names[stage]}: the rival's example over our command",
            seconds[f"rival: {stage} {task}"],
            seconds[f"ours: {stage} {task}"],
            targets[stage],
        )
        for stage, _ in stages
        for task in settings.tasks
    ]
    figures.append(
        ratio(
            f"later epochs of {dropped_on}, adapters in the upper half of the layers over all layers",
            seconds[f"ours: later epoch of {dropped_on}, upper half"],
            seconds[f"ours: later epoch of {dropped_on}, all layers"],
            Target(0.5),
        )
    )
    return Report(figures, seconds=seconds)


def _layers(outcome: Outcome) -> int:
    manifest = json.loads((outcome.artifact / "manifest.json").read_text(encoding="utf-8"))
    return int(manifest["backbone"]["layers"])


def random_sources(programs: Programs, trained: Outcome, count: int) -> list[str]:
    """Stores `count` adapters of the trained one's shape with random weights, and gives their names."""
    import torch

    from fusion.store.artifacts import load, save

    artifact = load(str(trained.artifact), programs.store)
    random = torch.Generator().manual_seed(programs.session.config.seed)
    names = [f"source-{number}" for number in range(count)]
    for name in names:
        weights = {
            key: torch.randn(value.shape, generator=random) * 0.02 for key, value in artifact.weights.items()
        }
        save(
            programs.store,
            artifact.manifest.changed(name=name),
            weights,
            artifact.head,
            overwrite=True,
        )
    return names


def write_rows(session: Session, task: str) -> None:
    """The very rows that our command reads, as JSON for the rival."""
    import yaml

    from fusion.cli.config_sources import conf_folder
    from fusion.config.data import DataConfig, LimitConfig
    from fusion.config.task import TaskConfig
    from fusion.data.rows import load_rows

    limit = session.config.epoch.limit
    content: dict[str, Any] = yaml.safe_load(
        (conf_folder() / "task" / f"{task}.yaml").read_text(encoding="utf-8")
    )
    config = TaskConfig.from_dict(content | {"name": task}, where=f"task {task}")
    data = DataConfig(dir=session.config.data_dir, limit=LimitConfig(train=limit, validation=limit))
    splits = {}
    for split in ("train", "validation"):
        rows = load_rows(config, data, split)
        splits[split] = {"texts": rows.texts, "labels": rows.labels}
    Path(session.work / f"{task}.json").write_text(json.dumps(splits), encoding="utf-8")


def startup(session: Session) -> Report:
    """From the start of a command to its first finished step, its tokens cached; and to the end of --help."""
    programs = Programs(session)
    task = session.config.epoch.tasks[-1]
    programs.train("stage1", task, *ONE_STEP)
    seconds: dict[str, list[float]] = {"first step": [], "--help": []}
    for number in range(session.config.rounds_of_suite()):
        outcome = programs.train("stage1", task, *ONE_STEP, *WRITTEN_AT_ONCE, watch=METRICS)
        assert outcome.until is not None
        seconds["first step"].append(outcome.until)
        seconds["--help"].append(programs.run("fusion.stage1", ["--help"], session.threads)[0])
        say(f"round {number + 1} of {session.config.rounds_of_suite()} done")
    figures = [
        Figure(
            f"stage 1 on {task}, tokens cached: start to first step",
            tuple(seconds["first step"]),
            Target(10.0),
            unit="s",
        ),
        Figure("--help", tuple(seconds["--help"]), Target(2.0), unit="s"),
    ]
    return Report(figures, seconds=seconds)


def ddp(session: Session) -> Report:
    """Rows a second of two processes of one thread, against one process of two threads, on the same batches."""
    programs = Programs(session)
    task, rows = session.config.epoch.tasks[-1], session.config.batch_size
    accelerator = "gpu" if session.setup.device == "cuda" else "cpu"
    ways: dict[str, tuple[int, tuple[str, ...]]] = {
        "one process, two threads": (2, ()),
        "two processes, one thread": (
            1,
            (
                "trainer.devices=2",
                "trainer.strategy=ddp",
                f"trainer.accelerator={accelerator}",
                f"data.batch_size={max(1, rows // 2)}",
            ),
        ),
    }
    programs.train("stage1", task, *ONE_STEP)
    speeds: dict[str, list[float]] = {}
    for number in range(session.config.rounds_of_suite()):
        for label in ways if number % 2 == 0 else reversed(list(ways)):
            threads, more = ways[label]
            outcome = programs.train("stage1", task, "trainer.max_epochs=1", *more, threads=threads)
            speeds.setdefault(label, []).append(outcome.speed["examples_per_second"])
        say(f"round {number + 1} of {session.config.rounds_of_suite()} done")
    figures = [
        ratio(
            "rows a second: two DDP processes of one thread over one of two threads",
            speeds["two processes, one thread"],
            speeds["one process, two threads"],
            Target(0.9, at_least=True),
        )
    ]
    lines = [f"{label}: {statistics.median(values):.1f} rows a second" for label, values in speeds.items()]
    return Report(figures, more={"rows_a_second": speeds}, lines=["", *lines])
