"""history.jsonl, line by line, for any setting of `logger`."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch

from fusion.config.training import CsvConfig, LoggerConfig
from fusion.training.records import RecordFile
from tests.bench import Bench, add_callback, trainer_config

CSV = LoggerConfig(csv=CsvConfig(flush_every_n_steps=1))


def read(bench: Bench, run: int = 1) -> list[dict[str, Any]]:
    """The lines of one of the bench's runs; the first is that of the fixture."""
    text = (bench.folder / "runs" / str(run) / "history.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


class Watch(lightning.Callback):
    """Computes the gradient norm and learning rate of each step."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        squares = 0.0
        for parameter in pl_module.model.trainable().values():
            squares += sum(value * value for value in parameter.grad.double().flatten().tolist())
        self.norms.append(math.sqrt(squares))
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> tuple[Bench, Watch]:
    """Two epochs of 8 steps, each third step logged."""
    bench = Bench(tmp_path_factory.mktemp("history") / "a folder", tiny_backbone)
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        add_callback(patch, watch)
        bench.stage1("films", logger=CSV, trainer=trainer_config(log_every_n_steps=3, num_sanity_val_steps=2))
    return bench, watch


def test_steps_and_keys(trained: tuple[Bench, Watch]) -> None:
    bench, _ = trained
    header, *lines = read(bench)
    identity = (bench.folder / "store" / "films" / "manifest.json").read_text()
    assert header == {
        "run": f"films-{json.loads(identity)['run']['identity']}",
        "name": "films",
        "command": "stage1",
        "started": header["started"],
    }
    step = {"step", "epoch", "train/loss", "train/task_loss", "train/lr", "train/grad_norm"}
    score = {"step", "epoch", "validation/accuracy", "validation/macro_f1"}
    # Each third step, the first of each epoch, the end of each epoch; no steps of the sanity check.
    assert [(line["step"], line["epoch"], set(line)) for line in lines] == [
        (0, 1, step),
        (2, 1, step),
        (5, 1, step),
        (7, 1, score),
        (8, 2, step),
        (11, 2, step),
        (14, 2, step),
        (15, 2, score),
    ]


def test_values_are_those_of_the_training(trained: tuple[Bench, Watch]) -> None:
    bench, watch = trained
    assert len(watch.norms) == 16
    for line in read(bench)[1:]:
        if "train/loss" in line:
            assert line["train/grad_norm"] == pytest.approx(watch.norms[line["step"]], rel=1e-5)
            assert line["train/lr"] == pytest.approx(watch.rates[line["step"]], rel=1e-6)
    with open(bench.folder / "runs" / "1" / "csv" / "metrics.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    for line in read(bench)[1:]:
        (row,) = [row for row in rows if row["step"] == line["step"]]
        assert row == {**line, "epoch": line["epoch"] - 1}  # which Lightning counts from 0
    best = json.loads((bench.folder / "store" / "films" / "manifest.json").read_text())["result"]
    scores = {line["epoch"]: line["validation/accuracy"] for line in read(bench) if "validation/accuracy" in line}
    assert best["metrics"]["validation"]["accuracy"] == scores[best["best_epoch"]] == max(scores.values())


def test_logging_does_not_change_the_training(trained: tuple[Bench, Watch]) -> None:
    bench, _ = trained
    bench.stage1("films", name="quiet", trainer=trainer_config(log_every_n_steps=1000))
    assert all(torch.equal(tensor, bench.weights("quiet")[name]) for name, tensor in bench.weights("films").items())
    assert [line["step"] for line in read(bench, bench.runs)[1:]] == [0, 7, 8, 15]


def test_barebones_has_no_loggers(trained: tuple[Bench, Watch]) -> None:
    bench, _ = trained
    bare = trainer_config(
        barebones=True, max_epochs=1, enable_checkpointing=False, log_every_n_steps=0, num_sanity_val_steps=0
    )
    bench.stage1("films", name="bare", trainer=bare)
    assert not (bench.folder / "runs" / str(bench.runs) / "history.jsonl").exists()


# --- the file -----------------------------------------------------------------------------------------


def test_whole_lines_without_nan(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "new" / "x.jsonl")
    assert not file.path.exists()  # until something is written
    file.write({"loss": float("nan"), "inner": [float("inf"), {"a": -math.inf}], "ok": 1.5, "text": "ü"})
    assert file.path.read_text(encoding="utf-8") == (
        '{"loss": null, "inner": [null, {"a": null}], "ok": 1.5, "text": "ü"}\n'
    )
    file.write({"step": 2})
    assert len(file.path.read_text().splitlines()) == 2
    RecordFile(file.path).write({"step": 1})
    assert file.path.read_text() == '{"step": 1}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    file = RecordFile(Path("/dev/full"))
    for step in range(3):
        file.write({"step": step})
    (warning,) = caplog.records
    assert "/dev/full: cannot be written (No space left on device)" in warning.message


def test_a_folder_that_cannot_be_created(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    RecordFile(tmp_path / "file" / "x.jsonl").write({"step": 1})
    assert len(caplog.records) == 1
