"""Real runs tracked offline: the content of their W&B files, and the upload by `fusion.sync`."""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import wandb
from PIL import Image

from fusion import sync
from fusion.config.training import LoggerConfig, TrainerConfig, WandbConfig
from fusion.store.lookup import read_manifest
from fusion.store.manifest import Manifest
from fusion.tracking import offline
from fusion.tracking.offline import FILE as LINKS
from fusion.tracking.offline import find_offline
from tests.bench import Bench
from tests.test_stages import StopAfter
from tests.tracking.conftest import KEY, clean_wandb, history, records, summary
from tests.tracking.wandb_server import WandbServer, wandb_server

OFFLINE = LoggerConfig(wandb=WandbConfig(mode="offline"))


@dataclass
class Runs:
    """The job folders of the runs, and what the store has."""

    bench: Bench
    films: Path
    books: Path
    interrupted: Path
    resumed: Path
    evaluate: Path
    home: Path
    result: dict[str, Any]

    def manifest(self, name: str) -> Manifest:
        return read_manifest(name, self.bench.folder / "store")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Iterator[Runs]:
    """Two sources, a fusion that is interrupted after its first epoch and resumed, and its evaluation."""
    from fusion.training import fit as fit_module

    folder = tmp_path_factory.mktemp("tracked")
    bench = Bench(folder / "a folder", tiny_backbone)
    with clean_wandb(folder / "home") as patch:
        trainer = TrainerConfig(accelerator="cpu", max_epochs=2, enable_progress_bar=False, log_every_n_steps=3)
        bench.stage1("films", logger=OFFLINE, trainer=trainer)
        bench.stage1("books", logger=OFFLINE, init_from="films")
        make_trainer = fit_module.make_trainer
        with pytest.MonkeyPatch.context() as cut:
            cut.setattr(fit_module, "make_trainer", lambda c, k, *more: make_trainer(c, [*k, StopAfter(1)], *more))
            with pytest.raises(RuntimeError, match="power"):
                bench.stage2("plays", ["films", "books"], logger=OFFLINE, trainer=trainer)
        result = bench.stage2("plays", ["films", "books"], logger=OFFLINE, trainer=trainer)
        bench.evaluate("plays-adapterfusion", logger=OFFLINE)
        patch.setenv("WANDB_API_KEY", KEY)
        folders = [bench.folder / "runs" / str(number) for number in (1, 2, 3, 4, 6)]
        films, books, interrupted, resumed, evaluate = folders
        yield Runs(bench, films, books, interrupted, resumed, evaluate, folder / "home", result)


def the_run(directory: Path) -> dict[str, Any]:
    (run,) = records(directory, "run")
    return run


def written(directory: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def test_labels_of_runs(runs: Runs) -> None:
    backbone = runs.bench.backbone.name
    found = {
        directory: (run["display_name"], run["job_type"], run["run_group"], run["tags"])
        for directory in (runs.films, runs.resumed, runs.evaluate)
        for run in [the_run(directory)]
    }
    assert found == {
        runs.films: ("films · adapter · seed 42", "stage1", "stage1", ["films", backbone, "adapter"]),
        runs.resumed: ("plays ← films+books · seed 42", "stage2", "stage2", ["plays", backbone, "adapterfusion"]),
        runs.evaluate: (
            "plays-adapterfusion on plays validation",
            "evaluate",
            "evaluate",
            ["plays", backbone, "adapterfusion"],
        ),
    }


def test_config_is_flat_and_complete(runs: Runs) -> None:
    import dataclasses

    from fusion.config.stages import Stage2Config

    config = the_run(runs.resumed)["config"]["update"]
    nested = {key for key, value in config.items() if isinstance(value, dict) and key != "_wandb"}
    assert nested == set()
    expected_config = Stage2Config(
        **runs.bench.settings("plays", logger=OFFLINE), sources=["films", "books"], name="plays-adapterfusion"
    )

    def leaves(value: Any, key: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for name, inner in value.items() for k, v in leaves(inner, f"{key}/{name}").items()}
        return {} if value is None else {key[1:]: value}

    expected = leaves(dataclasses.asdict(expected_config)) | {"trainer/log_every_n_steps": 3}
    assert {key: value for key, value in config.items() if key != "_wandb"} == expected


def test_history_equals_the_history_file(runs: Runs) -> None:
    """One row per step, bit-equal to history.jsonl."""
    for directory in (runs.films, runs.interrupted, runs.resumed):
        header, *lines = written(directory, "history.jsonl")
        assert set(header) == {"run", "name", "command", "started"}
        rows = {row["_step"]: row for row in history(directory)}
        assert len(rows) == len(history(directory))
        assert set(rows) == {line["step"] for line in lines} and len(rows) > 2
        for line in lines:
            row = rows[line["step"]]
            assert row["epoch"] == line["epoch"] and row["trainer/global_step"] == line["step"]
            assert {key: row[key] for key in line if key not in ("step", "epoch")} == {
                key: value for key, value in line.items() if key not in ("step", "epoch")
            }
    steps = [line for line in written(runs.resumed, "history.jsonl")[1:] if "train/loss" in line]
    losses = {"train/loss", "train/task_loss", "train/value_penalty_loss"}
    assert all(set(line) == {"step", "epoch", *losses, "train/lr", "train/grad_norm"} for line in steps)


def test_summary_has_best_scores_and_cost(runs: Runs) -> None:
    found = summary(runs.resumed)["summary"]
    result = runs.result
    metrics = result["metrics"]["validation"]
    assert {key: value for key, value in found.items() if key.startswith("best/")} == {
        "best/epoch": result["best_epoch"],
        **{f"best/validation/{name}": value for name, value in metrics.items()},
    }
    for group in ("parameters", "speed"):
        assert {k: v for k, v in found.items() if k.startswith(f"{group}/")} == {
            f"{group}/{key}": value for key, value in result[group].items() if value is not None
        }
    assert found["parameters/stored_bytes"] == sum(
        file.stat().st_size for file in Path(result["artifact"]).glob("*.safetensors")
    )
    assert found["speed/tokens_per_second"] > 0 and found["speed/peak_memory_bytes"] > 2**20
    assert found["epochs"] == 2
    rows = history(runs.films)
    films = summary(runs.films)["summary"]
    scores = [row["validation/accuracy"] for row in rows if "validation/accuracy" in row]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(scores) == 2 and films["validation/accuracy"] == {"max": max(scores)}
    assert len(losses) > 2 and films["train/loss"] == {"min": min(losses)}
    evaluated = summary(runs.evaluate)["summary"]
    assert evaluated["validation/accuracy"] == metrics["accuracy"] and evaluated["rows"] == 16


def test_attention_image_table_and_curves(runs: Runs) -> None:
    for directory, epoch in ((runs.interrupted, 1), (runs.resumed, 2)):
        (line,) = written(directory, "attention.jsonl")
        assert line["epoch"] == epoch and line["sources"] == ["films", "books"]
        (row,) = [row for row in history(directory) if "attention/picture.path" in row]
        assert row["_step"] == line["step"] and "validation/accuracy" in row
        for slot, values in line["slots"].items():
            assert row[f"attention/entropy/{slot}"] == values["entropy"]
            assert row[f"attention/value_distance/{slot}"] == values["value_distance"]
        (folder,) = (directory / "wandb").glob("offline-run-*")
        with Image.open(folder / "files" / row["attention/picture.path"]) as picture:
            assert picture.size == (row["attention/picture.width"], row["attention/picture.height"])
            colours = picture.convert("RGB").getcolors(1 << 16)
            assert colours is None or len(colours) > 10  # something is drawn
        table = json.loads((folder / "files" / row["attention/table.path"]).read_text())
        assert table["columns"] == ["slot", "source", "mean", "entropy", "value_distance"]
        assert table["data"] == [
            [slot, source, values["mean"][n], values["entropy"], values["value_distance"]]
            for slot, values in line["slots"].items()
            for n, source in enumerate(line["sources"])
        ]
        # A table is an artifact too: its file has to be there when the run is uploaded.
        for artifact in records(directory, "artifact"):
            for entry in artifact["manifest"]["contents"]:
                place = Path(entry["local_path"])
                assert place.is_file() and place.is_relative_to(folder)


def test_no_files_in_the_home_folder(runs: Runs) -> None:
    found = [path.relative_to(runs.home) for path in runs.home.rglob("*") if path.is_file()]
    assert all(path.parts[:2] == ("cache", "wandb") for path in found), found  # the log of W&B's own service


def test_resumed_run_keeps_its_id(runs: Runs) -> None:
    first, second = the_run(runs.interrupted), the_run(runs.resumed)
    assert first["run_id"] == second["run_id"]
    assert len({the_run(d)["run_id"] for d in (runs.films, runs.books, runs.resumed, runs.evaluate)}) == 4
    assert written(runs.interrupted, "history.jsonl")[0]["run"] == (written(runs.resumed, "history.jsonl")[0]["run"])
    before, after = ([row["_step"] for row in history(d)] for d in (runs.interrupted, runs.resumed))
    assert before == sorted(before) and after == sorted(after) and max(before) < min(after)
    identity = runs.manifest("plays-adapterfusion").run.identity
    assert second["run_id"].startswith(f"{identity}-")
    assert not list((runs.bench.folder / "store" / ".runs").glob("*/wandb.json"))  # the next run has a new id


def test_lineage_in_config_and_manifest(runs: Runs) -> None:
    films, books, plays = (runs.manifest(name) for name in ("films", "books", "plays-adapterfusion"))
    for manifest, directory in ((films, runs.films), (plays, runs.resumed)):
        expected = {"id": the_run(directory)["run_id"], "project": "adapter-fusion"}
        assert manifest.run.wandb == expected | {"entity": None, "url": None}
    sources = [
        {"name": source.name, "hash": source.hash, "run": (source.run.wandb or {})["id"]} for source in (films, books)
    ]
    assert summary(runs.resumed)["config"]["artifact"] == {
        "name": plays.name,
        "hash": plays.hash,
        "kind": "fusion",
        "sources": sources,
    }
    assert summary(runs.films)["config"]["artifact"]["sources"] == []
    assert "init_from" not in summary(runs.films)["config"]["artifact"]
    assert summary(runs.books)["config"]["artifact"]["init_from"] == sources[0]
    assert summary(runs.evaluate)["config"]["artifact"] == {
        "name": plays.name,
        "hash": plays.hash,
        "kind": "fusion",
        "run": (plays.run.wandb or {})["id"],
    }


def test_csv_of_an_evaluation(runs: Runs) -> None:
    from fusion.config.training import CsvConfig

    result = runs.bench.evaluate("plays-adapterfusion", logger=LoggerConfig(csv=CsvConfig()))
    with open(runs.bench.folder / "runs" / str(runs.bench.runs) / "csv" / "metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["validation/accuracy"]) == result["metrics"]["validation"]["accuracy"]


# --- uploading ----------------------------------------------------------------------------------------


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> Path:
    """A copy of the run folders, which `fusion.sync` marks as uploaded."""
    wandb.teardown()  # W&B caches the key and the server of the previous test
    return Path(shutil.copytree(runs.bench.folder / "runs", tmp_path / "runs", symlinks=True))


def test_runs_are_uploaded_and_linked_once(
    runs: Runs, copy: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = {name: the_run(getattr(runs, name))["run_id"] for name in ("films", "books", "resumed", "evaluate")}
    marks = {name: f"{name}:{runs.manifest(name).hash[:12]}" for name in ("films", "books", "plays-adapterfusion")}
    assert list(dict.fromkeys(run.name[28:] for run in find_offline(copy))) == list(ids.values())
    assert sync.main([f"runs={copy}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[1] for line in lines] == [
        f"uploaded; linked to {marks['films']}",
        f"uploaded; linked to {marks['films']}, {marks['books']}",
        "uploaded",
        f"uploaded; linked to {', '.join(marks.values())}",
        f"uploaded; linked to {marks['plays-adapterfusion']}",
    ]
    # The parts of the resumed run are one history: every step of both, in order.
    sent = server.history[ids["resumed"]]
    expected = [row["_step"] for d in (runs.interrupted, runs.resumed) for row in history(d)]
    assert [sent[place]["_step"] for place in sorted(sent)] == expected
    assert set(server.history) == set(ids.values())
    fusion = ids["resumed"]
    assert server.uses == [
        (ids["books"], marks["films"]),  # init_from
        (fusion, marks["films"]),
        (fusion, marks["books"]),
        (ids["evaluate"], marks["plays-adapterfusion"]),
    ]
    models = [made for made in server.artifacts if made["artifactTypeName"] != "run_table"]
    assert [(made["artifactCollectionName"], made["artifactTypeName"], made["runName"]) for made in models] == [
        ("films", "adapter", ids["films"]),
        ("books", "adapter", ids["books"]),
        ("plays-adapterfusion", "fusion", fusion),
    ]
    metadata = json.loads(models[-1]["metadata"])
    manifest = runs.manifest("plays-adapterfusion")
    assert metadata["hash"] == manifest.hash and metadata["composition"] == manifest.content["composition"]
    assert metadata["sources"] == manifest.content["sources"] and metadata["metrics"] == manifest.metrics
    assert metadata["task"] == "plays" and metadata["identity"] == manifest.run.identity

    operations = len(server.operations)
    assert sync.main([f"runs={copy}"]) == 0
    assert len(server.operations) == operations
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.endswith(": already uploaded") for line in lines)


def test_damaged_run_does_not_stop_the_others(
    runs: Runs, copy: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    for job in ("3", "4", "6"):
        shutil.rmtree(copy / job)
    (damaged,) = (copy / "1").rglob("*.wandb")
    damaged.write_bytes(b"damaged")
    assert sync.main([f"runs={copy}"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "runs/1/" in first and "uploaded" not in first.split(": ", 1)[1].split(";")[0]
    books, films = (f"{name}:{runs.manifest(name).hash[:12]}" for name in ("books", "films"))
    assert second.endswith(f"uploaded; linked to {books}; not linked to {films}, which W&B does not have")


@pytest.mark.slow
def test_source_missing_in_wandb_is_linked_later(
    runs: Runs, copy: Path, server: WandbServer, capsys: pytest.CaptureFixture[str]
) -> None:
    films = f"films:{runs.manifest('films').hash[:12]}"
    assert sync.main([f"runs={copy / '2'}"]) == 0
    fusion = copy / "4"
    capsys.readouterr()
    assert sync.main([f"runs={fusion}"]) == 0
    assert f"not linked to {films}, which W&B does not have" in capsys.readouterr().out
    assert json.loads((fusion / "wandb" / LINKS).read_text())["drawn"][0].startswith("books:")
    assert sync.main([f"runs={copy / '1'}"]) == 0
    capsys.readouterr()
    made = len(server.artifacts)
    assert sync.main([f"runs={fusion}"]) == 0
    assert capsys.readouterr().out.endswith(f": linked to {films}\n")
    assert len(server.artifacts) == made  # what is linked already is not linked again


def test_without_a_key_or_a_server(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY")
    assert sync.main([f"runs={copy}"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("nothing can be uploaded: no API key is set")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    assert sync.main([f"runs={copy}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nothing can be uploaded: cannot connect to http://127.0.0.1:9")


@pytest.mark.parametrize("status", ["silent", 500])
def test_server_that_does_not_respond(
    status: str | int, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and a single line, however many runs there are."""
    monkeypatch.setattr(offline, "CHECK_SECONDS", 1)
    with wandb_server(status) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb.teardown()
        started = time.monotonic()
        assert sync.main([f"runs={copy}"]) == 1
        assert time.monotonic() - started < 10
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"nothing can be uploaded: {server.url} ")


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", ""])
def test_invalid_seconds(seconds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main([f"runs={tmp_path}", f"seconds={seconds}"]) == 2
    assert "seconds=" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["outputs"], ["runs="], ["run=x"], ["runs=nowhere"], ["runs=.", "runs=."], ["--force"]]
)
def test_invalid_arguments(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sync.main(words) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "runs=DIR" in error


def test_nothing_to_upload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync.main([f"runs={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no offline runs\n"
    assert sync.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("python -m fusion.sync [runs=DIR]")


def test_active_run_is_skipped(runs: Runs, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fusion.locks import run_lock

    for job in ("2", "3", "4", "6"):
        shutil.rmtree(copy / job)
    store = copy / "store"
    (copy / "1" / "status.json").write_text('{"status": "running"}')
    (copy / "1" / "config.yaml").write_text(f"store: {store}\nname: films\nresume: true\n")
    with run_lock(store, "films"):
        assert sync.main([f"runs={copy}"]) == 0
    assert capsys.readouterr().out.endswith(": skipped, still being written\n")
    assert sync._alive(find_offline(copy)[0]) is False  # the lock was released
