"""The comparison of all methods: its commands, its settings, its results, resuming, and failures."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion import stage1, stage2
from fusion.config.data import Fold
from fusion.errors import UserError
from fusion.store.lookup import read_manifest
from pipelines.commands import Outcome
from pipelines.compare import config as config_module
from pipelines.compare import inference, table, workflow
from pipelines.compare.__main__ import main
from pipelines.compare.config import CompareConfig, Comparison, read_comparison
from pipelines.compare.inference import ratios
from pipelines.compare.rows import COMPOSITIONS, IDS, MULTITASK, ROWS, SINGLE, Row, chosen
from pipelines.compare.table import draw, notes, terminal_table
from pipelines.compare.trainings import RowResult, row_result, row_training, source_trainings, target_scores
from pipelines.compare.workflow import Workflow, reason_of
from pipelines.timing import MIN_ROUNDS, rounds
from tests.bench import LABELS, write_task
from tests.pipelines.manifests import files, save_manifest

TIMING = "timing"
VALUES = {
    "half": "3",
    "keep": "2",
    "sources": "mrpc,cb",
    "others": "mrpc",
    "pfeiffer": "cb-pfeiffer-lr-0.0005",
    "dropped": "mrpc-dropped,cb-dropped",
    "tasks": "mrpc,cb",
    "adapterfusion": "cb-adapterfusion-lr-0.0005",
    "multitask_adapter": "cb-multitask_adapter-lr-5e-05",
}
# Rows with another budget than five epochs.
BUDGETS = {
    "multitask_adapter": ["data.limit.train=1000", "trainer.max_epochs=2"],
    "multitask_full": ["data.limit.train=1000", "trainer.max_epochs=2"],
    "pruned_trained": [],
}


def compare_of(*arguments: str) -> Comparison:
    return read_comparison(["+task=cb", "sources=[mrpc,cb]", "output=out", *arguments])


# --- rows and their commands ----------------------------------------------------------------------


def test_rows_come_after_those_they_are_made_from() -> None:
    assert len(set(IDS)) == len(IDS) == 45
    for position, row in enumerate(ROWS):
        assert all(IDS.index(needed) < position for needed in row.needs), row.id
        assert row.placeholders <= {"half", "keep", "sources", "others", "dropped", "tasks", *IDS}, row.id
    assert [row.id for row in ROWS if row.needs] == [
        *("fusion_prior", "fusion_source_dropout", "fusion_cross_fit"),
        *("fusion_with_multitask", "pruned", "pruned_trained"),
    ]
    assert [row.id for row in ROWS if not row.trains] == ["pruned"]
    assert [row.id for row in chosen([])] == list(IDS)
    assert [row.id for row in chosen(["mean", "head"])] == ["head", "mean"]
    assert [row.id for row in chosen(["pruned"])] == ["adapterfusion", "pruned"]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_the_command_of_every_row(row: Row) -> None:
    given = ["backbone=minilm", "data.dir=../data", "logger=none"]
    training = row_training(compare_of(*given, "rates=[5e-5,5e-4]"), row, VALUES)
    words = [*([] if row.group == MULTITASK else ["+task=cb"]), *row.words.format_map(VALUES).split()]
    budget, rate, name = [], [], f"name=cb-{row.id}"
    if row.id != "pruned":
        batch = [] if row.group == MULTITASK else ["data.batch_size=16"]
        budget = [*BUDGETS.get(row.id, ["trainer.max_epochs=5"]), *batch, "optim.patience=3"]
        rate, name = ["optim.lr=5e-05,0.0005"], name + "-lr-${optim.lr}"
    assert training.module == ("fusion.stage2" if row.group == COMPOSITIONS else "fusion.stage1")
    assert list(training.overrides) == [
        "-m", *words, *given, *budget, *rate, "seed=0", name, "store=out/store", f"hydra.sweep.dir=out/runs/{row.id}",
    ]  # fmt: skip
    suffixes = ["-lr-5e-05", "-lr-0.0005"] if rate else [""]
    assert training.names == [f"cb-{row.id}{suffix}" for suffix in suffixes]


@pytest.mark.parametrize(
    ("id", "command"),
    [
        (
            "lora",
            "python -m fusion.stage1 -m +task=cb method=lora trainer.max_epochs=5 data.batch_size=16 optim.patience=3 "
            "optim.lr=5e-05,0.0005,0.005 seed=0 'name=cb-lora-lr-${optim.lr}' logger=csv store=out/store "
            "hydra.sweep.dir=out/runs/lora",
        ),
        (
            "pruned_trained",
            "python -m fusion.stage2 -m +task=cb composition=pruned composition.fusion=cb-adapterfusion-lr-0.0005 "
            "composition.keep=2 composition.train=true trainer.max_epochs=2 data.batch_size=16 optim.patience=3 "
            "optim.lr=5e-05,0.0005,0.005 seed=0 'name=cb-pruned_trained-lr-${optim.lr}' logger=csv store=out/store "
            "hydra.sweep.dir=out/runs/pruned_trained",
        ),
        (
            "multitask_full",
            "python -m fusion.stage1 -m 'tasks=[mrpc,cb]' method=multitask_full data.limit.train=1000 "
            "trainer.max_epochs=2 optim.patience=3 optim.lr=5e-05,0.0005,0.005 seed=0 "
            "'name=cb-multitask_full-lr-${optim.lr}' logger=csv store=out/store hydra.sweep.dir=out/runs/multitask_full",
        ),
    ],
)
def test_whole_commands(id: str, command: str) -> None:
    training = row_training(compare_of(), chosen([id])[-1], VALUES)
    assert str(training) == command and training.folder == Path(f"out/runs/{id}")


def test_names_contain_the_seeds() -> None:
    training = row_training(compare_of("seeds=[1,2]", "rates=[1e-3,1e-4]"), chosen(["head"])[0], {})
    assert {"seed=1,2", "name=cb-head-lr-${optim.lr}-seed-${seed}"} <= set(training.overrides)
    assert training.artifacts == {
        0.001: ["cb-head-lr-0.001-seed-1", "cb-head-lr-0.001-seed-2"],
        0.0001: ["cb-head-lr-0.0001-seed-1", "cb-head-lr-0.0001-seed-2"],
    }
    assert row_training(compare_of("seeds=[1]"), chosen(["head"])[0], {}).names[0].endswith("-seed-1")


def test_without_equal_budget_commands_keep_their_defaults() -> None:
    settings = compare_of("equal_budget=false", "trainer.max_epochs=4")
    alone = row_training(settings, chosen(["lora"])[0], VALUES)
    assert alone.overrides == (
        "-m", "+task=cb", "method=lora", "trainer.max_epochs=4", "seed=0", "name=cb-lora", "logger=csv",
        "store=out/store", "hydra.sweep.dir=out/runs/lora",
    )  # fmt: skip
    assert alone.artifacts == {None: ["cb-lora"]}
    several = row_training(settings, chosen(["multitask_full"])[0], VALUES)
    assert "trainer.max_epochs=2" in several.overrides and "trainer.max_epochs=4" not in several.overrides
    assert not any(word.startswith(("optim.", "+task")) for word in several.overrides)


def test_sources_have_one_learning_rate_and_a_limit() -> None:
    settings = compare_of("backbone=minilm", "data.limit.validation=50", "source_rows=100", "source_epochs=2")
    (training,) = source_trainings(settings, ["mrpc", "cb"])
    assert (training.module, training.overrides) == (
        "fusion.stage1",
        (
            "-m", "+task=mrpc,cb", "backbone=minilm", "data.limit.validation=50", "data.limit.train=100",
            "trainer.max_epochs=2", "optim.lr=0.0005", "logger=csv", "store=out/store",
            "hydra.sweep.dir=out/runs/sources",
        ),
    )  # fmt: skip
    assert training.names == ["mrpc", "cb"]
    (dropped,) = source_trainings(settings, ["mrpc", "cb"], drop=3)
    assert dropped.overrides == (
        "-m", "+task=mrpc,cb", "adapter.drop=specialized:3", "backbone=minilm", "data.limit.validation=50",
        "data.limit.train=100", "trainer.max_epochs=2", "optim.lr=0.0005", "name=${task.name}-dropped",
        "logger=csv", "store=out/store", "hydra.sweep.dir=out/runs/sources-dropped",
    )  # fmt: skip
    assert dropped.names == ["mrpc-dropped", "cb-dropped"]
    assert source_trainings(settings, []) == []


def test_the_target_has_no_more_examples_as_a_source() -> None:
    others, own = source_trainings(compare_of("data.limit.train=20"), ["mrpc", "cb"])
    assert {"+task=mrpc", "data.limit.train=1000"} <= set(others.overrides)
    assert {"+task=cb", "data.limit.train=20"} <= set(own.overrides)
    assert others.folder != own.folder
    (own,) = source_trainings(compare_of("data.limit.train=5000"), ["cb"])
    assert "data.limit.train=1000" in own.overrides and "data.limit.train=5000" not in own.overrides
    row = row_training(compare_of("data.limit.train=20"), chosen(["head"])[0], {})
    assert "data.limit.train=20" in row.overrides


# --- settings -------------------------------------------------------------------------------------


def test_own_keys_and_overrides_of_both_stages() -> None:
    settings = compare_of("backbone=minilm", "methods=[head]", "patience=null", "data.max_length=64")
    assert settings.config == CompareConfig(sources=["mrpc", "cb"], methods=["head"], patience=None, output="out")
    assert (settings.target, settings.words) == ("cb", ("backbone=minilm", "data.max_length=64"))
    assert settings.word("data.max_length") == "64" and settings.word("data.dir") is None
    assert read_comparison(["+task=rte", "methods=[head]"]).store == Path("outputs/compare/rte/store")
    assert not read_comparison(["+task=rte", "methods=[head]"]).need_sources
    assert read_comparison(["+task=rte", "methods=[drop_specialized]", "sources=[cb]"]).need_sources


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("sources=[cb]", "no task: expected exactly one target +task=NAME out of"),
        ("+task=cb +task=rte sources=[cb]", "cb rte: expected exactly one target"),
        ("+task=cb,rte sources=[cb]", "cb,rte: expected exactly one target"),
        ("+task=[cb] sources=[cb]", "[cb]: expected exactly one target"),
        ("task=cb sources=[cb]", "task=cb: expected exactly one target"),
        ("+task=snil sources=[cb]", "did you mean snli"),
        ("+task=cb", "sources=[]: "),
        ("+task=cb methods=[multitask_full]", "sources=[]: "),
        ("+task=cb sources=[nothing]", "sources: nothing is neither"),
        ("+task=cb methods=[hed]", "methods=[hed]: expected some of head, full, bitfit"),
        ("+task=cb methods=[head,head]", "methods=[head,head]: expected"),
        ("+task=cb sources=[a,a]", "sources=[a,a]: expected"),
        ("+task=cb sources=[cb] rates=[]", "rates=[]: expected"),
        ("+task=cb sources=[cb] rates=[0]", "rates=[0.0]: expected numbers above 0"),
        ("+task=cb sources=[cb] rates=[fast]", "rates[0]: Value 'fast'"),
        ("+task=cb sources=[cb] seeds=[-1]", "seeds=[-1]: expected"),
        ("+task=cb sources=[cb] epochs=0", "epochs=0: expected a whole number >= 1"),
        ("+task=cb sources=[cb] patience=0", "patience=0: expected a whole number >= 1"),
        ("+task=cb sources=[cb] source_rows=0", "source_rows=0: expected a whole number >= 1"),
        ("+task=cb sources=[cb] output=a,b", "expected a path without"),
        ("+task=cb sources=[cb] epoch=3", "did you mean epochs"),
        ("+task=cb sources=[cb] data.limit.trian=3", "did you mean data.limit.train"),
        ("+task=cb sources=[cb] optim.lr=1e-3", "optim.lr=1e-3: the comparison sets optim.lr; expected rates"),
        ("+task=cb sources=[cb] seed=1", "seed=1: the comparison sets seed; expected seeds"),
        ("+task=cb sources=[cb] store=s", "store=s: the comparison sets store"),
        ("+task=cb sources=[cb] overwrite=true", "overwrite=true: the comparison sets overwrite"),
        ("+task=cb sources=[cb] trainer.max_epochs=3", "expected epochs=5, or equal_budget=false"),
        ("+task=cb sources=[cb] adapter.dropout=0.1", "adapter.dropout=0.1: expected KEY=VALUE with a key of both"),
        ("+task=cb sources=[cb] composition=mean", "composition=mean: expected KEY=VALUE with a key of both"),
        ("+task=cb sources=[cb] -m", "-m: expected KEY=VALUE"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(arguments: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    assert expected in capsys.readouterr().err


def test_help_names_every_key_and_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for key in CompareConfig.__dataclass_fields__:
        assert f"{key}=" in shown
    for row in ROWS:
        assert re.search(rf"^  {row.id} +{re.escape(row.words)}$", shown, re.MULTILINE)


# --- results of a row --------------------------------------------------------------------------


def save_scores(store: Path, name: str, accuracy: float | None, macro_f1: float = 0.1) -> None:
    save_manifest(store, name, metrics={"validation": {"accuracy": accuracy, "macro_f1": macro_f1}})


def test_the_best_rate_has_the_best_mean_over_the_seeds(tmp_path: Path) -> None:
    settings = compare_of("seeds=[1,2]", "rates=[1e-4,1e-3,1e-2]")
    row = chosen(["head"])[0]
    training = row_training(settings, row, {})
    scores = {(1e-4, 1): 0.9, (1e-4, 2): 0.2, (1e-3, 1): 0.6, (1e-3, 2): 0.7, (1e-2, 1): 1.0}
    for (rate, seed), accuracy in scores.items():
        save_scores(tmp_path, f"cb-head-lr-{rate}-seed-{seed}", accuracy, macro_f1=seed / 10)
    result = row_result(row, training, tmp_path, "cb")
    assert result is not None
    assert result.rate == 1e-3, "the rate with a seed missing does not count, nor does a single lucky seed"
    assert result.artifacts == ["cb-head-lr-0.001-seed-1", "cb-head-lr-0.001-seed-2"]
    assert result.scores == {"accuracy": [0.6, 0.7], "macro_f1": [0.1, 0.2]}
    assert result.main_metric == "accuracy" and result.score == pytest.approx(0.65)
    assert set(result.grid) == {"0.0001", "0.001"} and result.grid["0.0001"]["accuracy"] == pytest.approx(0.55)
    assert (result.trainable, result.stored_bytes, result.seconds_per_step) == (1000, 4800, 0.25)
    assert result.best_epochs == [2, 2] and result.command == str(training)
    again = row_result(row, training, tmp_path, "cb", without=["cb-head-lr-0.001-seed-2"])
    assert again is not None and again.rate == 1e-4, "what failed just now does not count, though it is there"


def test_the_first_of_equal_rates_is_best_and_nan_is_worst(tmp_path: Path) -> None:
    row = chosen(["head"])[0]
    training = row_training(compare_of("rates=[1e-4,1e-3,1e-2]"), row, {})
    for rate, accuracy in ((1e-4, None), (1e-3, 0.5), (1e-2, 0.5)):
        save_scores(tmp_path, f"cb-head-lr-{rate}", accuracy)
    result = row_result(row, training, tmp_path, "cb")
    assert result is not None and result.rate == 1e-3
    assert math.isnan(result.grid["0.0001"]["accuracy"])
    assert row_result(row, training, tmp_path / "empty", "cb") is None


def test_a_multi_task_run_is_scored_on_the_target(tmp_path: Path) -> None:
    metrics = {"mrpc/validation": {"f1": 0.9}, "cb/validation": {"accuracy": 0.6}}
    assert target_scores(save_manifest(tmp_path, "m", metrics=metrics), "cb") == {"accuracy": 0.6}
    several = {"validation_matched": {"accuracy": 0.7}, "validation_mismatched": {"accuracy": 0.8}}
    assert target_scores(save_manifest(tmp_path, "n", metrics=several), "mnli") == {"accuracy": 0.7}
    with pytest.raises(UserError, match="m was not evaluated on rte, only on mrpc/validation, cb/validation"):
        target_scores(save_manifest(tmp_path, "m", metrics=metrics), "rte")


def test_rows_without_training_have_neither_steps_nor_parameters(tmp_path: Path) -> None:
    row = chosen(["pruned"])[-1]
    save_manifest(tmp_path, "cb-pruned", result={"parameters": {"trainable": 5}, "speed": {}})
    result = row_result(row, row_training(compare_of(), row, VALUES), tmp_path, "cb")
    assert result is not None
    assert (result.trainable, result.seconds_per_step, result.best_epochs, result.rate) == (0, None, [], None)


@pytest.mark.parametrize(("sources", "keep"), [("mrpc", 1), ("mrpc,cb", 1), ("mrpc,cb,rte", 2)])
def test_a_pruned_fusion_keeps_two_sources_or_one_less_than_all(sources: str, keep: int) -> None:
    compared = Workflow(compare_of(f"sources=[{sources}]"))
    compared.best_of = lambda id: "fusion"  # type: ignore[method-assign]
    assert compared.values(chosen(["pruned"])[-1]) == {"keep": str(keep), "adapterfusion": "fusion"}


# --- the workflow, with a mock of the commands -------------------------------------------------


class Commands:
    """A mock of the project's commands: writes what they would, as far as the comparison reads it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.calls: list[list[str]] = []
        self.new: list[str] = []  # folders of the sweeps that stored an artifact
        self.errors: dict[str, str] = {}  # by artifact, why its job fails
        self.refused: dict[str, str] = {}  # by folder, why the sweep is refused
        self.accuracy: dict[str, float] = {}

    def __call__(self, module: str, overrides: list[str]) -> Outcome:
        self.calls.append([module, *overrides])
        values = dict(word.lstrip("+").split("=", 1) for word in overrides if word != "-m")
        folder = Path(values["hydra.sweep.dir"])
        if folder.name in self.refused:
            return Outcome(2, 0.1, ("a warning", f"job 0 (+task=cb): {self.refused[folder.name]}"))
        swept = {key: values.get(key, "").split(",") for key in ("task", "optim.lr", "seed", "data.leave_out")}
        codes = [self.job(values, overrides, job) for job in itertools.product(*swept.values())]
        return Outcome(max(codes), 0.1, ("1 of several jobs failed:",) if any(codes) else ())

    def job(self, values: dict[str, str], overrides: list[str], swept: tuple[str, ...]) -> int:
        task, rate, seed, left_out = swept
        values = {key: value.replace("${seed}", seed) for key, value in values.items()}
        name = values.get("name", task)
        for key, value in (("task.name", task), ("optim.lr", rate)):
            name = name.replace(f"${{{key}}}", value)
        name += Fold.parse(left_out).suffix if left_out else ""
        folder = Path(values["hydra.sweep.dir"]) / name
        folder.mkdir(parents=True, exist_ok=True)
        error = self.errors.get(name)
        status = {"status": "failed" if error else "done", "name": name, "error": error}
        (folder / "status.json").write_text(json.dumps(status))
        if error:
            return 1
        store = Path(values["store"])
        if (store / name).is_dir() and "overwrite" not in values:
            return 0
        if folder.parent.name not in self.new:
            self.new.append(folder.parent.name)
        mine = {"task": task, "optim.lr": rate, "seed": seed, "data.leave_out": left_out}
        words = [
            f"{key}={mine[key.lstrip('+')]}" if key.lstrip("+") in mine else f"{key}={value}"
            for key, _, value in (word.partition("=") for word in overrides if word != "-m")
            if not key.startswith("hydra.")
        ]
        fused = values["sources"][1:-1].split(",") if "sources" in values else []
        if "composition.fusion" in values:
            fused = [source.name for source in read_manifest(values["composition.fusion"], store).sources]
        config = {"trainer.max_epochs": 2, "optim.lr": 5e-4, "data.limit.train": 1000}
        splits = ["mrpc/validation", "cb/validation"] if "tasks" in values else ["validation"]
        save_manifest(
            store,
            name,
            kind="fusion" if fused else "adapter",
            task={"name": task or "mrpc"},  # of several tasks, the first one's
            run={"identity": "i", "config": config, "directory": str(folder)}
            | {"overrides": [word.replace("${", "$\\{").replace("}", "\\}") for word in words]},
            sources=[{"name": source, "hash": read_manifest(source, store).hash} for source in fused],
            metrics={split: {"accuracy": self.accuracy.get(name, 0.5), "macro_f1": 0.25} for split in splits},
        )
        return 0

    def measure(self, target: str, artifacts: list[str], store: Path, accelerator: str, cache: None) -> dict[str, Any]:
        self.calls.append([TIMING])
        if "timing" in self.refused:
            raise RuntimeError(self.refused["timing"])
        times = {"ratio": 1.25, "low": 1.2, "high": 1.3}
        timed: dict[str, Any] = {name: times | {"hash": read_manifest(name, store).hash} for name in artifacts}
        if "inference" in self.errors:
            timed = {name: {"error": self.errors["inference"]} for name in artifacts}
        bare = {"rows": [8, 8], "tokens": [16, 12], "rounds": 7, "threads": 2, "device": "cpu"}
        return {"bare_seconds": 0.1, **bare, "artifacts": timed}

    def compare(self, *words: str) -> int:
        own = ["+task=cb", "sources=[mrpc,cb]", f"output={self.output}", "rates=[1e-4,1e-3]"]
        return main([*own, *words])

    def trained(self) -> list[str]:
        """The folders of the sweeps that stored an artifact since the last call."""
        new, self.new = self.new, []
        return new


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    mock = Commands(tmp_path)
    monkeypatch.setattr(workflow, "attempt", mock)
    monkeypatch.setattr(inference, "measure", mock.measure)
    monkeypatch.setattr(table, "draw", lambda compared: [])
    return mock


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def test_all_rows_run_once_and_a_second_run_trains_nothing(commands: Commands, tmp_path: Path) -> None:
    assert commands.compare() == 0
    crossed, position = IDS.index("fusion_cross_fit"), IDS.index("fusion_of_dropped")
    later = [*IDS[crossed:position], "sources-dropped", *IDS[position:]]
    assert commands.trained() == ["sources", *IDS[:crossed], "folds", *later]
    folds = next(call for call in commands.calls if "data.leave_out=0/4,1/4,2/4,3/4" in call)
    assert folds[:3] == ["fusion.stage1", "-m", "+task=cb"] and sum("optim.lr=" in word for word in folds) == 1
    assert commands.calls[-1][0] == TIMING
    content = results(tmp_path)
    assert [row["id"] for row in content["rows"]] == list(IDS) and content["failures"] == []
    assert {row["group"] for row in content["rows"]} == {"one task alone", "multi-task", "combinations"}
    assert {row["inference"]["ratio"] for row in content["rows"]} == {1.25}
    dropped = next(call for call in commands.calls if "hydra.sweep.dir" in call[-1] and "dropped" in call[-1])
    assert "adapter.drop=specialized:3" in dropped, "half of the manifest's 7 layers"
    first = (tmp_path / "table.md").read_text()
    commands.calls.clear()
    assert commands.compare() == 0
    assert commands.trained() == []
    assert len(commands.calls) == 1 + len(IDS), "neither sources nor timings"
    assert not any("overwrite=true" in call for call in commands.calls)
    assert (tmp_path / "table.md").read_text() == first and results(tmp_path) == content


def test_an_interrupted_comparison_continues(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(module: str, overrides: list[str]) -> Outcome:
        if "composition=static" in overrides:
            raise SystemExit(130)
        return commands(module, overrides)

    monkeypatch.setattr(workflow, "attempt", interrupted)
    with pytest.raises(SystemExit) as ended:
        commands.compare("methods=[head,static,mean]")
    assert ended.value.code == 130
    assert commands.trained() == ["sources", "head"], "nothing else starts after an interrupt"
    monkeypatch.setattr(workflow, "attempt", commands)
    assert commands.compare("methods=[head,static,mean]") == 0
    assert commands.trained() == ["static", "mean"]
    assert commands.compare("methods=[head,mean]", "rates=[1e-4]") == 0 and commands.trained() == []
    assert commands.compare("methods=[head]", "epochs=4") == 0
    assert "overwrite=true" not in commands.calls[-1], "the command decides about other settings"


def test_a_failed_row_is_listed_and_the_others_run(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.refused["lora"] = "unknown method 'lora'; known: adapter, head"
    for rate in ("0.0001", "0.001"):
        commands.errors[f"cb-adapterfusion-lr-{rate}"] = "TrainingError: the loss is\nnot finite"
    assert commands.compare("methods=[head,lora,adapterfusion,mean,pruned]") == 1
    assert commands.trained() == ["sources", "head", "mean"]
    content = results(tmp_path)
    assert [row["id"] for row in content["rows"]] == ["head", "mean"]
    assert content["failures"] == [
        {"id": "lora", "what": "row", "reason": "unknown method 'lora'; known: adapter, head"},
        {"id": "adapterfusion", "what": "row", "reason": "TrainingError: the loss is not finite"},
        {"id": "pruned", "what": "row", "reason": "depends on adapterfusion, which failed"},
    ]  # fmt: skip
    table = (tmp_path / "table.md").read_text()
    assert "`lora` |" not in table and "- `pruned` (row): depends on adapterfusion, which failed" in table
    assert "Failed (3):" in capsys.readouterr().out
    commands.errors.clear()
    commands.refused.clear()
    commands.calls.clear()
    assert commands.compare("methods=[head,lora,adapterfusion,mean,pruned]") == 0
    assert commands.trained() == ["lora", "adapterfusion", "pruned"]
    assert results(tmp_path)["failures"] == []


@pytest.mark.parametrize(
    ("failing", "rows", "failures"),
    [
        (
            "cb-head-lr-0.001",
            ["head", "drop_specialized", "mean"],
            [("head", "rate 0.001, seed 0", "OSError: disk full")],
        ),
        (
            "mrpc",
            ["head", "drop_specialized"],
            [("mrpc", "source", "OSError: disk full"), ("mean", "row", "depends on mrpc, which could not be trained")],
        ),
    ],
)
def test_a_failed_rate_or_source(
    commands: Commands, tmp_path: Path, failing: str, rows: list[str], failures: list[tuple[str, ...]]
) -> None:
    commands.errors[failing] = "OSError: disk full"
    assert commands.compare("methods=[head,mean,drop_specialized]") == 1
    content = results(tmp_path)
    assert [row["id"] for row in content["rows"]] == rows
    assert content["rows"][0]["rate"] == 1e-4
    assert [tuple(failure.values()) for failure in content["failures"]] == failures


def test_a_refused_first_command_ends_the_comparison(commands: Commands, tmp_path: Path) -> None:
    commands.refused["sources"] = "data.dir=x: there is no such folder"
    with pytest.raises(SystemExit) as ended:
        commands.compare()
    assert ended.value.code == 2 and len(commands.calls) == 1
    assert not (tmp_path / "results.json").exists()


def test_a_run_without_results_keeps_earlier_ones(
    commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.compare("methods=[head]") == 0
    before = (tmp_path / "results.json").read_text()
    commands.refused["head"] = "the store already contains a different cb-head: optim.patience: 3 stored, 2 now"
    assert commands.compare("methods=[head]", "patience=2") == 1
    assert (tmp_path / "results.json").read_text() == before
    assert "set output=DIR to keep both" in capsys.readouterr().out


def test_stored_sources_are_used(commands: Commands, tmp_path: Path) -> None:
    config = {"trainer.max_epochs": 30, "optim.lr": 5e-4, "data.limit.train": None}
    run = {"identity": "i", "config": config, "overrides": ["+task=mrpc"], "directory": "d"}
    save_manifest(tmp_path / "store", "mrpc", task={"name": "mrpc"}, run=run)
    assert commands.compare("methods=[mean,multitask_adapter]") == 0
    assert "+task=cb" in commands.calls[0] and commands.trained()[0] == "sources"
    content = results(tmp_path)
    assert (
        "Source mrpc already existed, with different settings: trainer.max_epochs=30, data.limit.train=None."
        in content["notes"]
    )
    assert content["source_commands"][0] == "python -m fusion.stage1 +task=mrpc"
    assert "tasks=[mrpc,cb]" in commands.calls[1], "the target is one of the tasks anyway"
    commands.calls.clear()
    assert commands.compare("methods=[multitask_full]", "sources=[mrpc]") == 0
    assert "tasks=[mrpc,cb]" in commands.calls[0], "the target is a task even if it is not a source"


def test_rows_made_from_other_artifacts_are_trained_again(commands: Commands, tmp_path: Path) -> None:
    commands.accuracy["cb-adapterfusion-lr-0.0001"] = 0.9
    assert commands.compare("methods=[head,mean,pruned]") == 0
    assert "composition.fusion=cb-adapterfusion-lr-0.0001" in commands.calls[-2]
    commands.trained()
    commands.calls.clear()
    commands.accuracy["cb-adapterfusion-lr-0.01"] = 0.95
    assert commands.compare("methods=[head,mean,pruned]", "rates=[1e-4,1e-3,1e-2]") == 0
    assert commands.trained() == ["head", "adapterfusion", "mean", "pruned"]
    assert {"composition.fusion=cb-adapterfusion-lr-0.01", "overwrite=true"} <= set(commands.calls[-2])
    assert all("overwrite=true" not in call for call in commands.calls[:-2])
    save_manifest(tmp_path / "store", "mrpc", task={"name": "mrpc"}, files=files(1, "another"))
    assert commands.compare("methods=[head,mean,pruned]", "rates=[1e-4,1e-3,1e-2]") == 0
    assert commands.trained() == ["adapterfusion", "mean", "pruned"], "the head is not made from it"


def test_rows_of_several_seeds_use_the_artifact_of_each_seed(commands: Commands) -> None:
    arguments = ("methods=[pruned,fusion_with_multitask]", "seeds=[1,2]")
    assert commands.compare(*arguments) == 0
    words = [word for call in commands.calls for word in call]
    assert "composition.fusion=cb-adapterfusion-lr-0.0001-seed-${seed}" in words
    assert "sources=[mrpc,cb,cb-multitask_adapter-lr-0.0001-seed-${seed}]" in words
    commands.trained()
    assert commands.compare(*arguments) == 0 and commands.trained() == []


def test_rows_are_reported_if_timing_fails(commands: Commands, tmp_path: Path) -> None:
    commands.errors["inference"] = "RuntimeError: boom"
    assert commands.compare("methods=[head]") == 1
    content = results(tmp_path)
    assert content["rows"][0]["inference"] is None
    assert content["failures"] == [{"id": "head", "what": "inference", "reason": "RuntimeError: boom"}]
    commands.errors.clear()
    commands.refused["timing"] = "crash"
    assert commands.compare("methods=[head]") == 1
    reason = "RuntimeError: crash"
    assert results(tmp_path)["failures"] == [{"id": "inference", "what": "all rows", "reason": reason}]
    commands.refused.clear()
    assert commands.compare("methods=[head]") == 0
    assert results(tmp_path)["rows"][0]["inference"]["ratio"] == 1.25


def test_reasons_are_one_line() -> None:
    stderr = ("noise", "job 0 (+task=cb optim.lr=5e-05 name=a): no such thing", "say another", "")
    compared = Workflow(compare_of())
    for reason in (reason_of(Outcome(2, 1.0, stderr[1:])), reason_of(Outcome(2, 1.0, stderr)), "x" * 1000):
        compared.fail("a", "row", reason)
    first, second, long = (failure["reason"] for failure in compared.failures)
    assert first == second == "no such thing say another" and len(long) == 400
    assert reason_of(Outcome(2, 1.0, ("a", "b", "c"))) == "b c"
    assert reason_of(Outcome(1, 1.0, stderr)) == "say another"
    assert reason_of(Outcome(-9, 1.0, ())) == "exit code -9 without an error message"


# --- table and picture ----------------------------------------------------------------------------


def result(id: str, group: str, *scores: float, **changes: Any) -> RowResult:
    values: dict[str, Any] = {
        **{"id": id, "title": id.title(), "group": group, "rate": 5e-4, "artifacts": [f"cb-{id}"]},
        **{"scores": {"accuracy": list(scores), "macro_f1": [0.5] * len(scores)}, "grid": {}},
        **{"trainable": 2_659_971, "stored_bytes": 10_639_884, "sources": [], "seconds_per_step": 0.5},
        **{"best_epochs": [3], "command": f"python -m {id}", "inference": {"ratio": 1.105}},
    }
    return RowResult(**(values | changes))


def compared_of(rows: list[RowResult], *arguments: str) -> Workflow:
    compared = Workflow(compare_of(*arguments))
    compared.rows = rows
    return compared


def test_the_table_is_grouped() -> None:
    none = {"rate": None, "trainable": 0, "seconds_per_step": None, "inference": None}
    rows = [
        result("head", SINGLE, 0.61, 0.65, trainable=1155, stored_bytes=4772),
        result("pruned", COMPOSITIONS, 0.7, 0.7, **none),
    ]
    assert terminal_table(rows) == [
        ["", "accuracy", "macro_f1", "lr", "trainable", "stored", "s/step", "inference"],
        [SINGLE, "", "", "", "", "", "", ""],
        ["  head", "0.630 ± 0.028", "0.500 ± 0.000", "0.0005", "1,155", "4.77 kB", "0.500", "1.10×"],
        [COMPOSITIONS, "", "", "", "", "", "", ""],
        ["  pruned", "0.700 ± 0.000", "0.500 ± 0.000", "–", "–", "10.6 MB", "–", "–"],
    ]


def test_notes() -> None:
    grid = {"5e-05": {"accuracy": 0.5}, "0.005": {"accuracy": 0.6}}
    rows = [result("head", SINGLE, 0.6, rate=0.005, grid=grid), result("lora", SINGLE, 0.6, rate=5e-4, grid=grid)]
    compared = compared_of(rows)
    compared.notes = ["Mind the gap."]
    text = " ".join(notes(compared))
    for part in (
        "epochs 5, batch size 16, patience 3, the best of the learning rates 5e-05, 0.0005, 0.005 by accuracy",
        "all scores are optimistic",
        "wider grid may be better: head.",
        "One seed (0): small differences may be due to chance.",
        "Sources mrpc, cb: up to 1000 examples per task, epochs 2",
        "Mind the gap.",
    ):
        assert part in text
    assert "Inference" not in text and "Multi-task" not in text
    bare: dict[str, Any] = {"rows": [32, 8], "tokens": [64, 20], "rounds": 7, "threads": 2, "device": "cpu"}
    compared.inference = bare | {"bare_seconds": 0.1}
    last = notes(compared)[-1]
    assert "(100 ms, cpu, threads: 2), median over at least 7" in last
    assert "32 × 64, 8 × 20 examples × tokens" in last
    own = " ".join(notes(compared_of(rows, "equal_budget=false", "seeds=[1,2]")))
    assert "the defaults of its command" in own and "Seeds 1, 2: mean ± standard deviation." in own


def test_the_figure_is_omitted_if_nothing_was_trained(tmp_path: Path) -> None:
    rows = [result("pruned", COMPOSITIONS, 0.5, trainable=0, inference=None)]
    assert draw(compared_of(rows, f"output={tmp_path}")) == []
    (picture,) = draw(compared_of([result("head", SINGLE, 0.5)], f"output={tmp_path}"))
    assert picture == tmp_path / "picture.png" and picture.read_bytes().startswith(b"\x89PNG")


# --- inference ------------------------------------------------------------------------------------


def test_each_round_times_every_run_on_one_batch() -> None:
    ran: list[tuple[str, Any]] = []
    now = itertools.count()

    def run(name: str) -> Callable[[Any], object]:
        return lambda batch: ran.append((name, batch))

    runs = {name: run(name) for name in ("", "a", "b")}
    seconds = rounds(runs, ["long", "short"], 9, budget=0, clock=lambda: float(next(now)))
    assert ran[:3] == [("", "long"), ("a", "long"), ("b", "long")], "the warm-up"
    assert ran[3:] == [
        ("", "long"), ("a", "long"), ("b", "long"),
        ("a", "short"), ("b", "short"), ("", "short"),
        ("b", "long"), ("", "long"), ("a", "long"),
    ]  # fmt: skip
    assert seconds == {name: [1.0] * MIN_ROUNDS for name in runs}
    assert len(rounds(runs, ["one"], 9, clock=lambda: float(next(now)))["a"]) == 9


def test_a_ratio_is_that_of_the_same_round() -> None:
    timed = ratios([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])  # the machine was slow in the second round
    assert timed == {"ratio": 2.0, "low": 2.0, "high": 2.5, "seconds": 3.0}


# --- for real, in small ---------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a space in its name and two tasks; the commands run in this process there."""
    folder = tmp_path / "my work"
    (folder / "conf" / "task").mkdir(parents=True)
    for name in ("films", "books"):
        write_task(folder / "data", name)
        task = {"kind": "classification", "text": "text", "labels": LABELS}
        task["metrics"] = ["accuracy", "macro_f1"]
        (folder / "conf" / "task" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.chdir(folder)
    for variable in ("FUSION_CONF", "FUSION_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the commands set it; this restores it
    root = logging.getLogger()
    before, level, handler = root.handlers[:], root.level, signal.getsignal(signal.SIGTERM)
    yield folder
    root.handlers[:], root.level = before, level
    signal.signal(signal.SIGTERM, handler)


def test_a_small_comparison_for_real(
    place: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def attempt(module: str, overrides: list[str]) -> Outcome:
        calls.append(module)
        monkeypatch.setattr(sys, "argv", [module, *overrides])
        with pytest.raises(SystemExit) as ended:
            {"fusion.stage1": stage1, "fusion.stage2": stage2}[module].main()
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, 0.1, tuple(shown.err.splitlines()))

    monkeypatch.setattr(workflow, "attempt", attempt)
    monkeypatch.setattr(inference, "SECONDS", 2.0)
    broken = Row("broken", "an unknown method", SINGLE, "method=nothing_like_it")
    monkeypatch.setattr(config_module, "chosen", lambda ids: [broken, *chosen(ids)])
    words = [
        "+task=films", "sources=[books,films]", "methods=[head,pfeiffer,adapterfusion,static]",
        "rates=[5e-3,5e-2]", "epochs=1", "patience=null", "source_rows=16", "source_epochs=1", "output=compared",
        f"backbone.name_or_path={tiny_backbone}", "backbone.pooling=mean", "data.dir=data", "data.cache_dir=cache",
        "batch_size=8", "data.max_length=16", "trainer.accelerator=cpu",
    ]  # fmt: skip
    assert main(words) == 1, "for the broken row"
    assert calls == ["fusion.stage1"] * 4 + ["fusion.stage2"] * 2
    content = results(place / "compared")
    (failure,) = content["failures"]
    assert (failure["id"], failure["what"]) == ("broken", "row")
    assert failure["reason"].startswith("unknown method 'nothing_like_it'")
    rows = {row["id"]: row for row in content["rows"]}
    assert list(rows) == ["head", "pfeiffer", "adapterfusion", "static"]
    for id, row in rows.items():
        assert row["rate"] in (5e-3, 5e-2) and set(row["grid"]) == {"0.005", "0.05"}
        assert row["artifacts"] == [f"films-{id}-lr-{row['rate']}"]
        assert set(row["scores"]) == {"accuracy", "macro_f1"} and 0 <= row["mean"]["accuracy"] <= 1
        assert set(row["inference"]) == {"ratio", "low", "high", "seconds", "hash"}
        assert row["inference"]["ratio"] > 0
        folder = place / "compared" / "store" / row["artifacts"][0]
        assert row["stored_bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    head, fused = rows["head"]["trainable"], rows["adapterfusion"]["trainable"]
    assert head == 2 * 32 + 2
    assert rows["static"]["trainable"] == head + 3 * 2
    assert fused == head + 3 * (3 * 32 * 32 + 2 * 32)
    assert rows["adapterfusion"]["sources"] == ["books", "films"]
    timing = content["inference"]
    assert (timing["split"], timing["rows"], timing["device"]) == ("validation", [8, 8], "cpu")
    assert timing["rounds"] >= MIN_ROUNDS and timing["bare_seconds"] > 0
    source = read_manifest("books", place / "compared" / "store").run.config
    assert (source["data.limit.train"], source["trainer.max_epochs"], source["optim.lr"]) == (16, 1, 5e-4)
    table = (place / "compared" / "table.md").read_text()
    assert "| `static` | static weights | " in table and "python -m fusion.stage2 -m +task=films" in table

    calls.clear()
    assert main(words) == 1
    assert calls == ["fusion.stage1"] * 3 + ["fusion.stage2"] * 2, "sources and timings are stored"
    assert results(place / "compared") == content


def test_artifacts_are_timed_although_others_cannot_be_loaded(
    place: Path, tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "-m", "+task=films", "method=head,adapter", "name=${method.name}", "store=store", "logger=none",
        "trainer.max_epochs=1", "trainer.accelerator=cpu", f"backbone.name_or_path={tiny_backbone}",
        "data.dir=data", "data.cache_dir=cache", "data.batch_size=8", "data.max_length=16",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["stage1", *words])
    with pytest.raises(SystemExit) as ended:
        stage1.main()
    assert ended.value.code == 0
    (place / "store" / "head" / "head.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(inference, "SECONDS", 0.01)
    monkeypatch.setattr(inference, "BATCHES", 9)
    measured = inference.measure("films", ["adapter", "head", "gone"], place / "store", "cpu", "cache")
    assert set(measured["artifacts"]["adapter"]) == {"hash", "ratio", "low", "high", "seconds"}
    assert "head.safetensors" in measured["artifacts"]["head"]["error"]
    assert "no artifact 'gone'" in measured["artifacts"]["gone"]["error"]
    assert measured["rounds"] == MIN_ROUNDS
    assert measured["rows"] == [8, 8], "no batch is used twice"
    assert set(measured) == {
        "backbone", "split", "rows", "tokens", "device", "threads", "rounds", "bare_seconds", "artifacts",
    }  # fmt: skip
