"""The commands as a user types them, on a tiny backbone: processes, sweeps, exit codes."""

from __future__ import annotations

import csv
import importlib
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.backbones import tiny_models
from tests.bench import LABELS, rating_row, rows_of, write_rows, write_task

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    """A working folder (with a space in its name) that has its own tasks, as files."""
    folder = tmp_path_factory.mktemp("commands") / "my work"
    (folder / "conf" / "task").mkdir(parents=True)
    for name in ("films", "books"):
        write_task(folder / "data", name)
        task = {"kind": "classification", "text": "text", "labels": LABELS, "metrics": ["accuracy"]}
        (folder / "conf" / "task" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    write_rows(folder / "data" / "rating", rows_of(rating_row))
    rating = {"kind": "regression", "text": ["one", "two"], "label": "score", "metrics": ["pearson"]}
    (folder / "conf" / "task" / "rating.yaml").write_text(yaml.safe_dump(rating))
    return folder


def words_of(backbone: Path, module: str, overrides: tuple[str, ...]) -> list[str]:
    shared = ["data.dir=data", "data.cache_dir=cache"]
    if module in ("stage1", "stage2"):
        shared += [
            f"backbone.name_or_path={backbone}",
            "backbone.pooling=mean",
            "optim.lr=5e-3",
            "trainer.max_epochs=2",
            "trainer.accelerator=cpu",
            "data.max_length=16",
        ]
    return [*overrides[:1], *shared, *overrides[1:]]


def run(place: Path, backbone: Path, module: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A command as a separate program that starts multiple processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("FUSION_DATA_DIR", None)
    return subprocess.run(
        [sys.executable, "-m", f"fusion.{module}", *words_of(backbone, module, overrides)],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def here(
    place: Path, tiny_backbone: Path, in_process: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """A command in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(place)

    def run_here(module: str, *overrides: str) -> tuple[int, str, str]:
        main = importlib.import_module(f"fusion.{module}").main
        return in_process(main, *words_of(tiny_backbone, module, overrides))

    return run_here


def trained(place: Path, backbone: Path, here: Callable[..., tuple[int, str, str]], devices: int, *words: str) -> None:
    """Train with 8 rows per step, in one or more processes."""
    if devices == 1:
        code, _, err = here(*words, "trainer.devices=1", "data.batch_size=8")
    else:
        how = (f"trainer.devices={devices}", "trainer.strategy=ddp", f"data.batch_size={8 // devices}")
        done = run(place, backbone, *words, *how)
        code, err = done.returncode, done.stderr
    assert code == 0, err[-2000:]


def losses(folder: Path) -> list[float]:
    """The loss of each step, from the metrics of a run."""
    with open(folder / "csv" / "metrics.csv", newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def recorded(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def outcomes(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "outcomes.json").read_text())["validation"]


ATTENTION = ["composition.null_source=true", "composition.prior=uniform", "composition.prior_penalty=0.1"]


def test_two_processes_match_one(place: Path, tiny_backbone: Path, here: Callable[..., tuple[int, str, str]]) -> None:
    """Two of 4 rows against one of 8: the same order, the same loss at each step, the same weights.

    The last of the 9 validation rows leaves the second process without one.
    """
    same = ["logger=csv", "trainer.log_every_n_steps=1", "head.dropout=0", "data.limit.validation=9"]
    results = {}
    for stage, more in (("stage1", []), ("stage2", ["sources=[films]", *ATTENTION])):
        for name, devices in (("one", 1), ("two", 2)):
            directory = place / f"{stage}-{name}"
            task = "films" if stage == "stage1" else "books"
            # Stage 2 takes the source that one process made, both times.
            store = "store" if stage == "stage2" or name == "one" else "store-ddp"
            trained(
                place, tiny_backbone, here, devices, stage, f"+task={task}", *more, *same,
                f"store={store}", f"hydra.run.dir={directory}",
                *([] if stage == "stage1" else [f"name={name}"]),
            )  # fmt: skip
            results[name] = losses(directory)
            status = json.loads((directory / "status.json").read_text())
            assert status["status"] == "done"
        assert len(results["one"]) == 2 * 8
        assert results["two"] == pytest.approx(results["one"], abs=1e-5)
        # The first process records for all of them: a file, and the numbers of one process.
        lines, others = (recorded(place / f"{stage}-{name}", "history.jsonl")[1:] for name in ("one", "two"))
        assert [(line["step"], set(line)) for line in lines] == [(line["step"], set(line)) for line in others]
        for line, other in zip(lines, others, strict=True):
            assert other == {key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in line.items()}
        one, two = (outcomes(place / f"{stage}-{name}") for name in ("one", "two"))
        assert one == two and len(one["predicted"]) == len(one["labels"]) == 9
    lines, others = (recorded(place / f"stage2-{name}", "attention.jsonl") for name in ("one", "two"))
    assert len(lines) == len(others) == 2
    for line, other in zip(lines, others, strict=True):
        assert line["slots"].keys() == other["slots"].keys() and len(line["slots"]) == 3
        for slot, values in line["slots"].items():
            assert other["slots"][slot] == {key: pytest.approx(v, abs=1e-5) for key, v in values.items()}
    one, two = (load_file(place / store / "films" / "weights.safetensors") for store in ("store", "store-ddp"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "data.tokens_per_batch=16"])
def test_fewer_examples_than_processes(place: Path, tiny_backbone: Path, more: str) -> None:
    """Two rows to train on and one to validate on, for three processes."""
    words = ["logger=none", "head.dropout=0", "backbone.cache=float32", "data.limit.train=2", "data.limit.validation=1", *more.split()]  # fmt: skip
    found = []
    for name, devices in (("one", ["trainer.devices=1"]), ("three", ["trainer.devices=3", "trainer.strategy=ddp"])):
        directory = place / f"few-{name}-{bool(more)}"
        done = run(
            place, tiny_backbone, "stage1", "+task=films", *words, *devices, "trainer.max_epochs=2", "name=few",
            f"store={directory}/store", f"hydra.run.dir={directory}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        weights = load_file(directory / "store" / "few" / "weights.safetensors")
        found.append((outcomes(directory), json.loads((directory / "result.json").read_text())["metrics"], weights))
    (one, one_metrics, weights), (three, three_metrics, others) = found
    assert one == three and len(one["predicted"]) == 1
    assert one_metrics == three_metrics
    for key, tensor in weights.items():
        torch.testing.assert_close(others[key], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        "adapter.drop=robust adapter.shared=true loss.class_weights=[0.5,2.5] loss.label_smoothing=0.1",
        pytest.param("method=lora", marks=pytest.mark.slow),
        pytest.param("method=full", marks=pytest.mark.slow),
    ],
)
def test_other_ways_to_train_match_one_process(
    place: Path, tiny_backbone: Path, here: Callable[..., tuple[int, str, str]], how: str
) -> None:
    """A dropped layer, shared weights, what trains inside the backbone: DDP needs a gradient of each in every step."""
    words = ["logger=csv", "trainer.log_every_n_steps=1", "head.dropout=0", "backbone.dropout=false", *how.split()]
    found = []
    for name, devices in (("one", 1), ("two", 2)):
        directory = place / f"{how.split('=')[1]}-{name}"
        trained(
            place, tiny_backbone, here, devices, "stage1", "+task=films", *words, "name=trained", "trainer.max_epochs=1",
            f"store={directory}/store", f"hydra.run.dir={directory}/run",
        )  # fmt: skip
        found.append((losses(directory / "run"), load_file(directory / "store" / "trained" / "weights.safetensors")))
    (one, weights), (two, others) = found
    assert len(one) == 8 and two == pytest.approx(one, abs=1e-5)
    assert weights.keys() == others.keys()
    for name, values in weights.items():
        torch.testing.assert_close(others[name], values, rtol=0, atol=2e-4)


@pytest.mark.slow
def test_multiple_tasks_in_two_processes_match_one(
    place: Path, tiny_backbone: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    """Each head has a gradient in each step, or DDP would wait for ever; both processes take the same task."""
    same = ["method=multitask_adapter", "logger=csv", "trainer.log_every_n_steps=1", "head.dropout=0"]
    found = {}
    for name, devices in (("one", 1), ("two", 2)):
        directory = place / f"several-{name}"
        trained(
            place, tiny_backbone, here, devices, "stage1", "tasks=[films,rating]", *same,
            f"store=several-{name}-store", f"hydra.run.dir={directory}",
        )  # fmt: skip
        found[name] = losses(directory)
        result = json.loads((directory / "result.json").read_text())
        assert set(result["metrics"]) == {"films/validation", "rating/validation"}
    assert len(found["one"]) == 2 * (8 + 5)
    assert found["two"] == pytest.approx(found["one"], abs=1e-5)
    for part in ("weights", "head"):
        one, two = (
            load_file(place / f"several-{name}-store" / "films-rating-multitask_adapter" / f"{part}.safetensors")
            for name in ("one", "two")
        )
        assert one.keys() == two.keys()
        for key, weights in one.items():
            torch.testing.assert_close(two[key], weights, rtol=0, atol=1e-4)


def test_two_processes_report_a_non_finite_loss_once(place: Path, tiny_backbone: Path) -> None:
    done = run(
        place, tiny_backbone, "stage1", "+task=films", "name=wild", "logger=none", "optim.warmup=0", "head.layers=2",
        "optim.lr=900", "adapter.scaling=1e30", "trainer.devices=2", "trainer.strategy=ddp", "data.batch_size=4",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    errors = done.stderr.strip().splitlines()
    assert "the loss is nan at step " in done.stderr or "the loss is inf at step " in done.stderr
    assert "of train, zero-based): training stopped." in done.stderr and "Lower optim.lr" in done.stderr
    assert len(errors) <= 3 and "Traceback" not in done.stderr
    assert not (place / "outputs" / "store" / "wild").exists()


def test_a_sweep_stores_one_artifact_per_task_and_survives_a_failed_job(
    place: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    broken = place / "data" / "plays"
    write_task(place / "data", "plays")
    task = {"kind": "classification", "text": "text", "labels": ["bad", "fine"], "metrics": ["accuracy"]}
    (place / "conf" / "task" / "plays.yaml").write_text(yaml.safe_dump(task))
    rows = (broken / "train.jsonl").read_text().splitlines()
    (broken / "train.jsonl").write_text("\n".join([*rows[:3], '{"text": "no label here", "label": 7}', *rows[4:]]))
    words = ("-m", "+task=films,plays,books", "logger=csv", "store=sweep-store", "hydra.sweep.dir=sweep")
    code, _, err = here("stage1", *words)
    assert code == 1
    assert "plays" in err and "train.jsonl" in err
    folders = {f.name.rsplit("-", 1)[-1]: f for f in (place / "sweep").iterdir() if f.is_dir()}
    assert set(folders) == {"films", "plays", "books"}
    states = {name: json.loads((f / "status.json").read_text()) for name, f in folders.items()}
    assert {name: s["status"] for name, s in states.items()} == {"films": "done", "plays": "failed", "books": "done"}
    assert "label" in states["plays"]["error"]
    assert "Traceback" in (folders["plays"] / "run.log").read_text()
    stored = {f.name for f in (place / "sweep-store").iterdir() if not f.name.startswith(".")}
    assert stored == {"films", "books"}


@pytest.mark.parametrize(
    ("module", "overrides", "message"),
    [
        ("stage1", ["+task=films", "optim.learning_rate=1"], "optim has lr, head_lr"),
        ("stage1", ["+task=films", "adapter.bottleneck_size=0"], "adapter.bottleneck_size=0"),
        ("stage1", ["+task=films", "data.dir=nowhere"], "nowhere"),
        ("stage1", ["tasks=[films,rte]", "method=multitask_adapter"], "no folder rte"),
        ("stage1", ["tasks=[films,books]", "method=lora"], "need method=multitask_adapter or method=multitask_full"),
        ("stage2", ["+task=films", "sources=[nobody]"], "nobody"),
        ("stage2", ["+task=films"], "sources"),
        ("stage2", ["tasks=[films,books]", "sources=[films]"], "unknown key tasks"),
        ("inspect", ["artifact=nobody", "+task=films"], "+task= is not an override of this command"),
        ("stage1", ["+task=films", "trainer.strategy=fsdp", "method=full"], "only frozen weights are sharded"),
        ("stage1", ["+task=films", "trainer.strategy=fsdp", "backbone.cache=float32"], "features cannot be cached"),
        ("evaluate", ["artifact=nobody"], "nobody"),
        ("predict", ["artifact=nobody", "input=rows.jsonl", "output=out.jsonl"], "nobody"),
    ],
)
def test_a_wrong_command_is_refused_in_two_lines_with_exit_code_2(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_process: Callable[..., tuple[int, str, str]],
    module: str,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(place)
    main = importlib.import_module(f"fusion.{module}").main
    data = [] if any(word.startswith("data.dir") for word in overrides) else ["data.dir=data"]
    code, _, err = in_process(main, *overrides, *data, "store=empty-store")
    assert code == 2 and len(err.strip().splitlines()) <= 2 and message in err, err
    assert not (place / "empty-store").exists()


@pytest.fixture
def limited(here: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
    """Stage 1 where no file may grow beyond `limit` bytes: a full disk, at a size that a test can choose."""

    def run_limited(limit: int, *overrides: str) -> tuple[int, str, str]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return here("stage1", "+task=films", "data.batch_size=8", "logger=none", *overrides)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return run_limited


def test_without_space_for_a_checkpoint_the_artifact_is_still_stored(
    place: Path, limited: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = limited(30_000, "name=roomy")
    assert code == 0, err
    assert out.count("the checkpoint could not be written to") == 1 and "training continues" in out
    weights = place / "outputs" / "store" / "roomy" / "weights.safetensors"
    assert weights.is_file() and weights.stat().st_size < 30_000


def test_a_full_disk_fails_the_run_and_the_same_command_stores_it_later(
    place: Path, limited: Callable[..., tuple[int, str, str]]
) -> None:
    words = ["name=large", "adapter.bottleneck_size=256"]
    code, _, err = limited(60_000, *words)
    assert code == 1, err
    first, second = err.strip().splitlines()
    assert "large cannot be written (File too large)." in first and second.startswith("Free disk space")
    store = place / "outputs" / "store"
    assert not (store / "large").exists() and not list((store / ".staging").glob("*"))
    code, out, err = limited(10_000_000, *words)
    assert code == 0, err
    assert "large failed before: rerunning" in out
    assert (store / "large" / "manifest.json").is_file() and not list((store / ".runs").glob("large-*"))


def assert_close(artifact: Path, expected: Path) -> None:
    """The tensors of two stored artifacts are equal up to the rounding of a training run."""
    for part in ("weights", "head"):
        found, wanted = (load_file(folder / f"{part}.safetensors") for folder in (artifact, expected))
        assert found.keys() == wanted.keys()
        for key, weights in wanted.items():
            torch.testing.assert_close(found[key], weights, rtol=0, atol=1e-4)


def torchrun(place: Path, program: str, nodes: int, words: list[str]) -> list[subprocess.Popen[str]]:
    """One launcher of torchrun per node; all nodes are this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON_EXEC": program}
    environment.pop("FUSION_DATA_DIR", None)
    shared = [f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", *shared, f"--node-rank={node}"),
                *("-m", "fusion.stage1", *words),
            ],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(nodes)
    ]


@pytest.mark.parametrize("how", ["one node", "two nodes", "sweep"])
def test_torchrun(how: str, place: Path, tiny_backbone: Path, warm_python: str) -> None:
    """Two processes that torchrun starts train as one does, alone and under -m, on one node and on two."""
    store, nodes = f"torchrun-{how.replace(' ', '-')}", 2 if how == "two nodes" else 1
    own = ["+task=films", "logger=csv", f"store={store}", "data.batch_size=4", "trainer.strategy=ddp"]
    own.append("head.dropout=0")  # draws differ
    own += [f"trainer.num_nodes={nodes}", f"trainer.devices={2 // nodes}"]
    own += ["-m", "seed=42,43", "name=films-${seed}"] if how == "sweep" else ["name=films-42"]
    started = torchrun(place, warm_python, nodes, words_of(tiny_backbone, "stage1", tuple(own)))
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * nodes, outputs
    seeds = (42, 43) if how == "sweep" else (42,)
    assert {path.name for path in (place / store).glob("[!.]*")} == {f"films-{seed}" for seed in seeds}
    assert "failed" not in outputs[0].replace("0 failed", "")
    assert outputs[0].count(f"stored {store}/films-") == len(seeds)
    whole = ("+task=films", "logger=none", f"store={store}-alone", "data.batch_size=8", "head.dropout=0")
    alone = run(place, tiny_backbone, "stage1", *whole)
    assert alone.returncode == 0, alone.stderr
    assert_close(place / store / "films-42", place / f"{store}-alone" / "films")


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("name", ["albert", "llama", "gemma3_text", "gptj", "t5"])
def test_two_processes_with_sharded_weights_train_as_one(
    name: str,
    place: Path,
    tmp_path: Path,
    in_process: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model of each block layout; the guard compares the frozen weights of all shards before and after training."""
    folder = tiny_models.save(tmp_path / "backbone", name)
    shared = ("+task=films", "logger=none", "head.dropout=0", f"store={tmp_path / 'store'}")
    sharded = ("name=two", "trainer.devices=2", "trainer.strategy=fsdp", "data.batch_size=4")
    done = run(place, folder, "stage1", *shared, *sharded)
    assert done.returncode == 0 and "backbone sharded over 2 processes: " in done.stdout, done.stderr
    monkeypatch.chdir(place)
    whole = words_of(folder, "stage1", (*shared, "name=one", "trainer.devices=1", "data.batch_size=8"))
    code, _, err = in_process(importlib.import_module("fusion.stage1").main, *whole)
    assert code == 0, err
    assert_close(tmp_path / "store" / "two", tmp_path / "store" / "one")
