"""A working folder with a tiny backbone and tiny tasks, and the commands as functions."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusion import evaluate, inspect, predict, rank, report, stage1, stage2
from fusion.config.commands import EvaluateConfig, InspectConfig, PredictConfig, RankConfig, ReportConfig
from fusion.config.data import DataConfig
from fusion.config.methods import MethodConfig
from fusion.config.model import BackboneConfig
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.runs.run import INSPECTION, Run, record
from fusion.stages.stage1 import check_stage1
from fusion.store.manifest import checksum_of
from tests.tiny_backbone import WORDS

LABELS = ["bad", "good"]


def write_task(folder: Path, name: str, rows: int = 64) -> TaskConfig:
    """Sentences whose label is whether they hold `good` or `bad`, so that the task can be learned."""
    draw = random.Random(name)
    (folder / name).mkdir(parents=True)
    for split, count in (("train", rows), ("validation", 16), ("test", 8)):
        lines = []
        for _ in range(count):
            label = draw.randrange(2)
            words = [*draw.choices(WORDS[:8], k=draw.randrange(2, 9)), LABELS[label]]
            draw.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return TaskConfig(name=name, text="text", labels=LABELS, metrics=["accuracy", "macro_f1"])


def rating_row(draw: random.Random) -> dict[str, Any]:
    good = draw.randrange(4)
    return {"one": " ".join(["good"] * good + ["bad"] * (3 - good)), "two": "film", "score": float(good)}


def quiz_row(draw: random.Random) -> dict[str, Any]:
    choices = ["a bad film", "poor it is bad", "he hated it", "a bad dog"][: draw.randrange(1, 5)]
    right = draw.randrange(len(choices) + 1)
    choices.insert(right, "a good film")
    return {"question": "which film", "choices": choices, "label": right}


def rows_of(row: Callable[[random.Random], dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    draw = random.Random(0)
    counts = {"train": 40, "validation": 12, "test": 6}
    return {split: [row(draw) for _ in range(count)] for split, count in counts.items()}


def write_rows(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True)
    for split, lines in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_manifest(path: Path, values: dict[str, Any]) -> None:
    """An edited manifest, with the checksum of its content."""
    path.write_text(json.dumps(values | {"checksum": checksum_of(values)}))


def trainer_config(**settings: Any) -> TrainerConfig:
    return TrainerConfig(**{"accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False, **settings})


def add_callback(patch: pytest.MonkeyPatch, callback: Any, first: bool = False) -> None:
    """Add a Lightning callback to each training from now on, behind or before the others."""
    from fusion.training import fit

    make = fit.make_trainer

    def changed(config: Any, callbacks: list[Any], *rest: Any) -> Any:
        return make(config, [callback, *callbacks] if first else [*callbacks, callback], *rest)

    patch.setattr(fit, "make_trainer", changed)


class Bench:
    """A working folder with a backbone and tasks, and the commands as functions."""

    def __init__(self, folder: Path, backbone: Path) -> None:
        self.folder, self.backbone = folder, backbone
        self.tasks = {name: write_task(folder / "data", name) for name in ("films", "books", "plays")}
        self.data = DataConfig(dir=str(folder / "data"), batch_size=8, max_length=16, cache_dir=str(folder / "cache"))
        self.runs = 0
        self.result: dict[str, Any] = {}  # of what a fixture trained

    def settings(self, task: str, **changes: Any) -> dict[str, Any]:
        return {
            "task": self.tasks[task],
            "data": self.data,
            "backbone": BackboneConfig(name_or_path=str(self.backbone), pooling="mean"),
            "optim": OptimConfig(lr=5e-3, patience=None),
            "trainer": trainer_config(),
            "store": str(self.folder / "store"),
        } | changes

    def run(self, command: str, config: Any) -> Run:
        self.runs += 1
        directory = self.folder / "runs" / str(self.runs)
        directory.mkdir(parents=True)
        return Run(command, directory, (), dataclasses.asdict(config), command)

    def stage1(self, task: str, **changes: Any) -> dict[str, Any]:
        config = Stage1Config(**self.settings(task, **changes))
        config.name = config.name or config.default_name()
        return stage1.main.__wrapped__(config, self.run("stage1", config))  # type: ignore[attr-defined]

    def multitask(self, *tasks: str, **changes: Any) -> dict[str, Any]:
        settings = self.settings(tasks[0], **changes) | {"task": None}
        method = settings.pop("method", None) or MethodConfig("multitask_adapter")
        config = Stage1Config(**settings, tasks=[self.tasks[name] for name in tasks], method=method)
        config.name = config.name or config.default_name()
        run = self.run("stage1", config)
        check_stage1(config, run)
        return stage1.main.__wrapped__(config, run)  # type: ignore[attr-defined]

    def add_rating(self) -> None:
        """A regression, `rating`: how many of three words are good."""
        write_rows(self.folder / "data" / "rating", rows_of(rating_row))
        self.tasks["rating"] = TaskConfig(
            name="rating", kind="regression", text=["one", "two"], label="score", metrics=["pearson", "spearman"]
        )

    def add_quiz(self) -> None:
        """Choices, `quiz`: two to five of them, of which one is good."""
        write_rows(self.folder / "data" / "quiz", rows_of(quiz_row))
        self.tasks["quiz"] = TaskConfig(
            name="quiz", kind="choice", text="question", choices="choices", metrics=["accuracy"]
        )

    def stage2(self, task: str, sources: list[str], **changes: Any) -> dict[str, Any]:
        config = Stage2Config(**self.settings(task, **changes), sources=sources)
        config.name = config.name or config.default_name()
        return stage2.main.__wrapped__(config, self.run("stage2", config))  # type: ignore[attr-defined]

    def rank(self, task: str, **changes: Any) -> dict[str, Any]:
        settings = self.settings(task)
        shared = {key: settings[key] for key in ("task", "data", "backbone", "store")}
        config = RankConfig(**shared | {"accelerator": "cpu"} | changes)
        run = self.run("rank", config)
        rank.check(config, run)
        return rank.main.__wrapped__(config, run)  # type: ignore[attr-defined]

    def evaluate(self, artifact: str, **changes: Any) -> dict[str, Any]:
        config = EvaluateConfig(
            artifact=artifact, store=str(self.folder / "store"), data=self.data, accelerator="cpu", **changes
        )
        evaluate.check(config, self.run("evaluate", config))
        return evaluate.main.__wrapped__(config, self.run("evaluate", config))  # type: ignore[attr-defined]

    def predict(self, artifact: str, rows: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
        source, target = self.folder / "rows.jsonl", self.folder / "predictions.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = PredictConfig(
            artifact=artifact,
            input=str(source),
            output=str(target),
            store=str(self.folder / "store"),
            data=self.data,
            accelerator="cpu",
            **changes,
        )
        predict.check(config, self.run("predict", config))
        predict.main.__wrapped__(config, self.run("predict", config))  # type: ignore[attr-defined]
        return [json.loads(line) for line in target.read_text().splitlines()]

    def inspect(self, artifact: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the command returns, and what it wrote."""
        settings: dict[str, Any] = {"store": str(self.folder / "store"), "data": DataConfig(max_length=None)}
        config = InspectConfig(**settings | {"artifact": artifact, "accelerator": "cpu"} | changes)
        run = self.run("inspect", config)
        inspect.check(config, run)
        result = inspect.main.__wrapped__(config, run)  # type: ignore[attr-defined]
        return result, json.loads((run.directory / INSPECTION).read_text())

    def report(self, **changes: Any) -> tuple[dict[str, Any], str]:
        """What the command returns, and the page."""
        settings = {"data": DataConfig(max_length=None), "accelerator": "cpu", "words": 2}
        config = ReportConfig(runs=str(self.folder / "runs"), **settings | changes)  # type: ignore[arg-type]
        run = self.run("report", config)
        report.check(config, run)
        made = record(run, lambda: report.main.__wrapped__(config, run))  # type: ignore[attr-defined]
        return made, config.path.read_text()

    def weights(self, name: str, store: str = "store") -> dict[str, torch.Tensor]:
        return load_file(self.folder / store / name / "weights.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
