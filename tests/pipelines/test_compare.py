"""The comparison of all methods: its command lines, what it reads from the store, and how it goes on and ends."""

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
import torch
import yaml

from fusion import stage1, stage2
from fusion.errors import UserError
from fusion.store.lookup import read_manifest
from fusion.store.manifest import Manifest
from pipelines.commands import Outcome
from pipelines.compare import config as settings_module
from pipelines.compare import inference, journey
from pipelines.compare.__main__ import main
from pipelines.compare.config import CompareConfig, Settings, read_settings
from pipelines.compare.inference import TimingConfig, ratios, rounds, share_tensors
from pipelines.compare.journey import Journey, last_words, one_line
from pipelines.compare.picture import draw, label_box, plot
from pipelines.compare.plan import row_training, source_trainings
from pipelines.compare.rows import COMPOSITIONS, GROUPS, IDS, MULTITASK, ROWS, SINGLE, Row, chosen
from pipelines.compare.scores import RowResult, row_result, target_scores
from pipelines.compare.table import bytes_text, notes, score_text, terminal_table
from tests.bench import LABELS, write_task

FILLED = {
    "half": "3",
    "keep": "2",
    "sources": "mrpc,cb",
    "dropped": "mrpc-dropped,cb-dropped",
    "tasks": "mrpc,cb",
    "adapterfusion": "cb-adapterfusion-lr-0.0005",
    "multitask_adapter": "cb-multitask_adapter-lr-5e-05",
}
# What stands between "-m" and the words that are handed on.
OWN = {
    "head": "stage1 +task=cb method=head",
    "full": "stage1 +task=cb method=full",
    "bitfit": "stage1 +task=cb method=bitfit",
    "lora": "stage1 +task=cb method=lora",
    "pfeiffer": "stage1 +task=cb adapter=pfeiffer",
    "houlsby": "stage1 +task=cb adapter=houlsby",
    "houlsby_ffn_only": "stage1 +task=cb adapter=houlsby_ffn_only",
    "parallel": "stage1 +task=cb adapter=parallel",
    "parallel_learned": "stage1 +task=cb adapter=parallel adapter.scaling=learned",
    "before_attention": "stage1 +task=cb adapter=before_attention",
    "shared": "stage1 +task=cb adapter.shared=true",
    "drop_specialized": "stage1 +task=cb adapter.drop=specialized:3",
    "drop_robust": "stage1 +task=cb adapter.drop=robust",
    "multitask_adapter": "stage1 tasks=[mrpc,cb] method=multitask_adapter",
    "multitask_full": "stage1 tasks=[mrpc,cb] method=multitask_full",
    "adapterfusion": "stage2 +task=cb sources=[mrpc,cb] composition=adapterfusion",
    "fusion_no_value": (
        "stage2 +task=cb sources=[mrpc,cb] composition=adapterfusion composition.value_matrix=false"
    ),
    "fusion_rank_32": "stage2 +task=cb sources=[mrpc,cb] composition=adapterfusion composition.rank=32",
    "static": "stage2 +task=cb sources=[mrpc,cb] composition=static",
    "mean": "stage2 +task=cb sources=[mrpc,cb] composition=mean",
    "scalearn": "stage2 +task=cb sources=[mrpc,cb] composition=scalearn",
    "scalearn_uniform": "stage2 +task=cb sources=[mrpc,cb] composition=scalearn_uniform",
    "scalearn_pp": "stage2 +task=cb sources=[mrpc,cb] composition=scalearn_pp",
    "scalearn_uniform_pp": "stage2 +task=cb sources=[mrpc,cb] composition=scalearn_uniform_pp",
    "sequence": "stage2 +task=cb sources=[mrpc,cb] composition=sequence",
    "average": "stage2 +task=cb sources=[mrpc,cb] composition=average composition.train=false",
    "average_trained": "stage2 +task=cb sources=[mrpc,cb] composition=average composition.train=true",
    "fusion_target_adapter": (
        "stage2 +task=cb sources=[mrpc,cb] composition=adapterfusion composition.target_adapter=true"
    ),
    "continued": "stage2 +task=cb sources=[mrpc,cb] composition=continued",
    "fusion_drop_specialized": (
        "stage2 +task=cb sources=[mrpc,cb] composition=adapterfusion composition.drop=specialized:3"
    ),
    "fusion_drop_robust": (
        "stage2 +task=cb sources=[mrpc,cb] composition=adapterfusion composition.drop=robust"
    ),
    "fusion_of_dropped": "stage2 +task=cb sources=[mrpc-dropped,cb-dropped] composition=adapterfusion",
    "fusion_with_multitask": (
        "stage2 +task=cb sources=[mrpc,cb,cb-multitask_adapter-lr-5e-05] composition=adapterfusion"
    ),
    "pruned": (
        "stage2 +task=cb composition=pruned composition.fusion=cb-adapterfusion-lr-0.0005 composition.keep=2 "
        "composition.train=false"
    ),
    "pruned_trained": (
        "stage2 +task=cb composition=pruned composition.fusion=cb-adapterfusion-lr-0.0005 composition.keep=2 "
        "composition.train=true trainer.max_epochs=2"
    ),
}
# How long it trains: five epochs but for these.
BUDGETS = {
    "multitask_adapter": ["data.limit.train=1000", "trainer.max_epochs=2"],
    "multitask_full": ["data.limit.train=1000", "trainer.max_epochs=2"],
    "pruned_trained": [],
}


def settings_of(*arguments: str) -> Settings:
    return read_settings(["+task=cb", "sources=[mrpc,cb]", "output=out", *arguments])


# --- rows and their commands ----------------------------------------------------------------------


def test_ids_are_unique_and_whatever_a_row_needs_stands_before_it() -> None:
    assert len(set(IDS)) == len(IDS) == 35
    assert list(OWN) == list(IDS)
    for position, row in enumerate(ROWS):
        assert all(IDS.index(needed) < position for needed in row.needs), row.id
        assert row.blanks <= {"half", "keep", "sources", "dropped", "tasks", *IDS}, row.id
    assert [row.id for row in ROWS if row.needs] == ["fusion_with_multitask", "pruned", "pruned_trained"]
    assert [row.id for row in ROWS if not row.trains] == ["pruned"]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_the_command_line_of_every_row(row: Row) -> None:
    handed_on = ["backbone=minilm", "data.dir=../data", "logger=none"]
    training = row_training(settings_of(*handed_on, "rates=[5e-5,5e-4]"), row, FILLED)
    stage, *words = OWN[row.id].split()
    budget, rate, name = [], [], f"name=cb-{row.id}"
    if row.id != "pruned":
        batch = [] if row.group == MULTITASK else ["data.batch_size=16"]
        budget = [*BUDGETS.get(row.id, ["trainer.max_epochs=5"]), *batch, "optim.patience=3"]
        rate, name = ["optim.lr=5e-05,0.0005"], name + "-lr-${optim.lr}"
    assert training.module == f"fusion.{stage}"
    assert list(training.overrides) == [
        "-m", *words, *handed_on, *budget, *rate, "seed=0", name,
        "store=out/store", f"hydra.sweep.dir=out/runs/{row.id}",
    ]  # fmt: skip
    suffixes = ["-lr-5e-05", "-lr-0.0005"] if rate else [""]
    assert [member.name for member in training.members] == [f"cb-{row.id}{suffix}" for suffix in suffixes]


def test_a_whole_line_as_it_is_typed() -> None:
    training = row_training(settings_of(), chosen(["lora"])[0], {})
    assert str(training) == (
        "python -m fusion.stage1 -m +task=cb method=lora trainer.max_epochs=5 data.batch_size=16 optim.patience=3 "
        "optim.lr=5e-05,0.0005,0.005 seed=0 'name=cb-lora-lr-${optim.lr}' logger=csv store=out/store "
        "hydra.sweep.dir=out/runs/lora"
    )
    assert training.folder == Path("out/runs/lora")


def test_several_seeds_are_in_the_names() -> None:
    training = row_training(settings_of("seeds=[1,2]", "rates=[1e-3,1e-4]"), chosen(["head"])[0], {})
    assert {"seed=1,2", "name=cb-head-lr-${optim.lr}-seed-${seed}"} <= set(training.overrides)
    assert [(m.name, m.rate, m.seed) for m in training.members] == [
        ("cb-head-lr-0.001-seed-1", 0.001, 1),
        ("cb-head-lr-0.001-seed-2", 0.001, 2),
        ("cb-head-lr-0.0001-seed-1", 0.0001, 1),
        ("cb-head-lr-0.0001-seed-2", 0.0001, 2),
    ]
    assert row_training(settings_of("seeds=[1]"), chosen(["head"])[0], {}).members[0].name.endswith("-seed-1")


def test_without_an_equal_budget_the_commands_have_their_own_defaults() -> None:
    settings = settings_of("equal_budget=false", "trainer.max_epochs=4")
    alone = row_training(settings, chosen(["lora"])[0], FILLED)
    assert alone.overrides == (
        "-m", "+task=cb", "method=lora", "trainer.max_epochs=4", "seed=0", "name=cb-lora", "logger=csv",
        "store=out/store", "hydra.sweep.dir=out/runs/lora",
    )  # fmt: skip
    assert [(m.name, m.rate) for m in alone.members] == [("cb-lora", None)]
    several = row_training(settings, chosen(["multitask_full"])[0], FILLED)
    assert "trainer.max_epochs=2" in several.overrides and "trainer.max_epochs=4" not in several.overrides
    assert not any(word.startswith(("optim.", "+task")) for word in several.overrides)


def test_the_sources_have_one_rate_and_few_rows() -> None:
    settings = settings_of(
        "backbone=minilm", "data.limit.validation=50", "source_rows=100", "source_epochs=2"
    )
    (training,) = source_trainings(settings, ["mrpc", "cb"])
    assert (training.module, training.overrides) == (
        "fusion.stage1",
        (
            "-m", "+task=mrpc,cb", "backbone=minilm", "data.limit.validation=50", "data.limit.train=100",
            "trainer.max_epochs=2", "optim.lr=0.0005", "logger=csv", "store=out/store",
            "hydra.sweep.dir=out/runs/sources",
        ),
    )  # fmt: skip
    assert [member.name for member in training.members] == ["mrpc", "cb"]
    (dropped,) = source_trainings(settings, ["mrpc", "cb"], drop=3)
    assert dropped.overrides == (
        "-m", "+task=mrpc,cb", "adapter.drop=specialized:3", "backbone=minilm", "data.limit.validation=50",
        "data.limit.train=100", "trainer.max_epochs=2", "optim.lr=0.0005", "name=${task.name}-dropped",
        "logger=csv", "store=out/store", "hydra.sweep.dir=out/runs/sources-dropped",
    )  # fmt: skip
    assert [member.name for member in dropped.members] == ["mrpc-dropped", "cb-dropped"]
    assert source_trainings(settings, []) == []


def test_the_targets_own_source_sees_no_more_of_its_rows_than_the_target() -> None:
    others, own = source_trainings(settings_of("data.limit.train=20"), ["mrpc", "cb"])
    assert {"+task=mrpc", "data.limit.train=1000"} <= set(others.overrides)
    assert {"+task=cb", "data.limit.train=20"} <= set(own.overrides)
    assert others.folder != own.folder
    (own,) = source_trainings(settings_of("data.limit.train=5000"), ["cb"])
    assert "data.limit.train=1000" in own.overrides and "data.limit.train=5000" not in own.overrides
    row = row_training(settings_of("data.limit.train=20"), chosen(["head"])[0], {})
    assert "data.limit.train=20" in row.overrides


def test_chosen_rows_come_with_what_they_are_made_from() -> None:
    assert [row.id for row in chosen([])] == list(IDS)
    assert [row.id for row in chosen(["mean", "head"])] == ["head", "mean"]
    assert [row.id for row in chosen(["pruned"])] == ["adapterfusion", "pruned"]


# --- settings -------------------------------------------------------------------------------------


def test_own_keys_and_words_to_hand_on_are_told_apart() -> None:
    settings = settings_of("backbone=minilm", "methods=[head]", "patience=null", "data.max_length=64")
    assert settings.config == CompareConfig(
        sources=["mrpc", "cb"], methods=["head"], patience=None, output="out"
    )
    assert (settings.target, settings.words) == ("cb", ("backbone=minilm", "data.max_length=64"))
    assert settings.word("data.max_length") == "64" and settings.word("data.dir") is None
    assert read_settings(["+task=rte", "methods=[head]"]).store == Path("outputs/compare/rte/store")
    assert not read_settings(["+task=rte", "methods=[head]"]).need_sources
    assert read_settings(["+task=rte", "methods=[drop_specialized]", "sources=[cb]"]).need_sources


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sources=[cb]"], "no task: expected one target"),
        (["+task=cb", "+task=rte", "sources=[cb]"], "+task=cb +task=rte: expected one target"),
        (["+task=cb,rte", "sources=[cb]"], "+task=cb,rte: expected one target"),
        (["+task=[cb]", "sources=[cb]"], "+task=[cb]: expected one target"),
        (["task=cb", "sources=[cb]"], "task=cb: expected one target, +task=NAME"),
        (["+task=snil", "sources=[cb]"], "unknown task 'snil': did you mean snli"),
        (["+task=cb"], "no sources: say"),
        (["+task=cb", "methods=[multitask_full]"], "no sources: say"),
        (["+task=cb", "methods=[hed]"], "methods: there is no hed: did you mean head"),
        (["+task=cb", "methods=[zzz]"], "methods: there is no zzz. Known: head, full, bitfit"),
        (["+task=cb", "methods=[head,head]"], "methods=[head,head]: expected each once"),
        (["+task=cb", "sources=[a,a]"], "sources=[a,a]: expected each once"),
        (["+task=cb", "sources=[cb]", "rates=[]"], "rates=[]: expected one or more"),
        (["+task=cb", "sources=[cb]", "rates=[0]"], "rates=[0.0]: expected numbers above 0"),
        (["+task=cb", "sources=[cb]", "rates=[fast]"], "rates[0]: Value 'fast'"),
        (["+task=cb", "sources=[cb]", "seeds=[-1]"], "seeds=[-1]: expected numbers from 0"),
        (["+task=cb", "sources=[cb]", "epochs=0"], "epochs=0: expected at least 1"),
        (["+task=cb", "sources=[cb]", "patience=0"], "patience=0: expected at least 1"),
        (["+task=cb", "sources=[cb]", "source_rows=0"], "source_rows=0: expected at least 1"),
        (["+task=cb", "sources=[cb]", "output=a,b"], "output=a,b: expected a path without ,"),
        (["+task=cb", "sources=[cb]", "epoch=3"], "unknown key epoch: did you mean epochs"),
        (["+task=cb", "sources=[cb]", "data.limit.trian=3"], "unknown key data.limit.trian: did you mean data"),
        (["+task=cb", "sources=[cb]", "optim.lr=1e-3"], "optim.lr=1e-3: the comparison says optim.lr itself"),
        (["+task=cb", "sources=[cb]", "seed=1"], "seed=1: the comparison says seed itself; expected seeds"),
        (["+task=cb", "sources=[cb]", "store=s"], "store=s: the comparison says store itself"),
        (["+task=cb", "sources=[cb]", "overwrite=true"], "overwrite=true: the comparison says overwrite"),
        (["+task=cb", "sources=[cb]", "trainer.max_epochs=3"], "expected epochs=5, or equal_budget=false"),
        (["+task=cb", "sources=[cb]", "adapter.dropout=0.1"], "only stage 1 has adapter.dropout"),
        (["+task=cb", "sources=[cb]", "composition=mean"], "only stage 2 has composition"),
        (["+task=cb", "sources=[cb]", "-m"], "-m: expected KEY=VALUE"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        read_settings(arguments)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_help_names_every_key_and_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for key in CompareConfig.__dataclass_fields__:
        assert f"{key}=" in shown
    for row in ROWS:
        assert re.search(rf"^  {row.id} +{re.escape(row.words)}$", shown, re.MULTILINE)


# --- what the store says --------------------------------------------------------------------------


def save_manifest(store: Path, name: str, **changes: Any) -> Manifest:
    """A stored artifact as far as the comparison reads it: a manifest, and no weights."""
    values: dict[str, Any] = {
        "kind": "adapter",
        "name": name,
        "task": {"name": "cb"},
        "backbone": {"name_or_path": "tiny", "revision": None, "fingerprint": "f", "family": "bert"}
        | {"hidden_size": 32, "layers": 7},
        "adapter": {"sites": ["feedforward"], "reads": "normed", "nonlinearity": "relu", "scaling": 1.0}
        | {"dropout": 0.0, "bottleneck_sizes": {"0.feedforward": 2}},
        "composition": None,
        "head": {"pooling": "mean", "layers": 1, "outputs": 3, "dropout": 0.1},
        "sources": [],
        "data": {"max_length": 16, "fingerprints": {}},
        "metrics": {"validation": {"accuracy": 0.5, "macro_f1": 0.25}},
        "seed": 0,
        "run": {"identity": "i", "config": {}, "overrides": [], "directory": "runs"},
        "versions": {},
        "result": {"parameters": {"trainable": 1000}, "speed": {"seconds_per_step": 0.25}, "best_epoch": 2},
        "files": {
            "weights.safetensors": {"bytes": 4000, "sha256": name},
            "head.safetensors": {"bytes": 800, "sha256": "h"},
        },
    }
    manifest = Manifest.of(**(values | changes))
    (store / name).mkdir(parents=True, exist_ok=True)
    (store / name / "manifest.json").write_text(manifest.to_json())
    return manifest


def save_scores(store: Path, name: str, accuracy: float | None, macro_f1: float = 0.1) -> None:
    save_manifest(store, name, metrics={"validation": {"accuracy": accuracy, "macro_f1": macro_f1}})


def test_the_best_rate_is_that_of_the_best_mean_over_the_seeds(tmp_path: Path) -> None:
    settings = settings_of("seeds=[1,2]", "rates=[1e-4,1e-3,1e-2]")
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
    assert set(result.grid) == {"0.0001", "0.001"} and result.grid["0.0001"]["accuracy"] == pytest.approx(
        0.55
    )
    assert (result.trainable, result.stored_bytes, result.seconds_per_step) == (1000, 4800, 0.25)
    assert result.best_epochs == [2, 2] and result.command == str(training)
    again = row_result(row, training, tmp_path, "cb", without=["cb-head-lr-0.001-seed-2"])
    assert again is not None and again.rate == 1e-4, "what failed just now does not count, though it is there"


def test_the_first_of_equal_rates_stands_and_a_score_that_is_no_number_loses(tmp_path: Path) -> None:
    row = chosen(["head"])[0]
    training = row_training(settings_of("rates=[1e-4,1e-3,1e-2]"), row, {})
    for rate, accuracy in ((1e-4, None), (1e-3, 0.5), (1e-2, 0.5)):
        save_scores(tmp_path, f"cb-head-lr-{rate}", accuracy)
    result = row_result(row, training, tmp_path, "cb")
    assert result is not None and result.rate == 1e-3
    assert math.isnan(result.grid["0.0001"]["accuracy"])
    assert row_result(row, training, tmp_path / "empty", "cb") is None


def test_a_multi_task_run_is_scored_on_the_target() -> None:
    metrics = {"mrpc/validation": {"f1": 0.9}, "cb/validation": {"accuracy": 0.6}}
    assert target_scores({"name": "m", "metrics": metrics}, "cb") == {"accuracy": 0.6}
    several = {"validation_matched": {"accuracy": 0.7}, "validation_mismatched": {"accuracy": 0.8}}
    assert target_scores({"name": "m", "metrics": several}, "mnli") == {"accuracy": 0.7}
    with pytest.raises(UserError, match="m has no score on rte, only on mrpc/validation, cb/validation"):
        target_scores({"name": "m", "metrics": metrics}, "rte")


def test_what_trains_nothing_has_neither_steps_nor_parameters(tmp_path: Path) -> None:
    row = chosen(["pruned"])[-1]
    save_manifest(tmp_path, "cb-pruned", result={"parameters": {"trainable": 5}, "speed": {}})
    result = row_result(row, row_training(settings_of(), row, FILLED), tmp_path, "cb")
    assert result is not None
    assert (result.trainable, result.seconds_per_step, result.best_epochs, result.rate) == (0, None, [], None)


@pytest.mark.parametrize(("sources", "keep"), [(["a"], 1), (["a", "b"], 1), (["a", "b", "c"], 2)])
def test_a_pruned_fusion_keeps_two_sources_or_one_less_than_there_are(sources: list[str], keep: int) -> None:
    journey = Journey(settings_of(f"sources=[{','.join(sources)}]"))
    journey.best_of = lambda id: "fusion"  # type: ignore[method-assign]
    assert journey.filled(chosen(["pruned"])[-1]) == {"keep": str(keep), "adapterfusion": "fusion"}


# --- the journey, with stand-ins for the commands -------------------------------------------------


class Commands:
    """Stands in for the project's commands: leaves what they would, as far as the comparison reads it."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.errors: dict[str, str] = {}  # what a job of this name ends with
        self.refused: dict[str, str] = {}  # what a sweep in this folder is refused with
        self.accuracy: dict[str, float] = {}

    def __call__(self, module: str, overrides: list[str]) -> Outcome:
        self.calls.append([module, *overrides])
        values = dict(word.lstrip("+").split("=", 1) for word in overrides if word != "-m")
        if module == journey.TIMING:
            return self.time(values)
        folder = Path(values["hydra.sweep.dir"])
        if folder.name in self.refused:
            return Outcome(2, 0.1, ("a warning", f"job 0 (+task=cb): {self.refused[folder.name]}"))
        swept = {key: values.get(key, "").split(",") for key in ("task", "optim.lr", "seed")}
        codes = [self.job(values, overrides, job) for job in itertools.product(*swept.values())]
        return Outcome(max(codes), 0.1, ("1 of several jobs failed:",) if any(codes) else ())

    def job(self, values: dict[str, str], overrides: list[str], swept: tuple[str, ...]) -> int:
        task, rate, seed = swept
        name = values.get("name", task)
        for key, value in (("task.name", task), ("optim.lr", rate), ("seed", seed)):
            name = name.replace(f"${{{key}}}", value)
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
        mine = {"task": task, "optim.lr": rate, "seed": seed}
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
        made: dict[str, Any] = {"kind": "fusion", "adapter": None, "composition": {"name": "adapterfusion"}}
        save_manifest(
            store,
            name,
            **(made if fused else {}),
            task={"name": task or "mrpc"},  # of several tasks, the first one's
            run={"identity": "i", "config": config, "directory": str(folder)}
            | {"overrides": [word.replace("${", "$\\{").replace("}", "\\}") for word in words]},
            sources=[{"name": source, "hash": read_manifest(source, store).hash} for source in fused],
            metrics={split: {"accuracy": self.accuracy.get(name, 0.5), "macro_f1": 0.25} for split in splits},
        )
        return 0

    def time(self, values: dict[str, str]) -> Outcome:
        artifacts: dict[str, Any] = {}
        for name in values["artifacts"][1:-1].split(","):
            artifacts[name] = {
                "ratio": 1.25,
                "low": 1.2,
                "high": 1.3,
                "hash": read_manifest(name, Path(values["store"])).hash,
            }
            if "inference" in self.errors:
                artifacts[name] = {"error": self.errors["inference"]}
        bare = {"rows": [8, 8], "tokens": [16, 12], "rounds": 7, "threads": 2, "device": "cpu"}
        content = {"bare_seconds": 0.1, **bare, "artifacts": artifacts}
        Path(values["result"]).write_text(json.dumps(content))
        return Outcome(self.refused.get("timing") is not None, 1.0, ())

    def trained(self) -> list[str]:
        """The folders of the sweeps that ran."""
        words = [word for call in self.calls for word in call if word.startswith("hydra.sweep.dir=")]
        return [word.rpartition("/")[2] for word in words]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    stand_in = Commands()
    monkeypatch.setattr(journey, "attempt", stand_in)
    return stand_in


@pytest.fixture
def compare(commands: Commands, tmp_path: Path) -> Callable[..., int]:
    return lambda *words: main(
        ["+task=cb", "sources=[mrpc,cb]", f"output={tmp_path}", "rates=[1e-4,1e-3]", *words]
    )


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def test_all_rows_run_once_and_a_second_start_trains_nothing(
    commands: Commands, compare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare() == 0
    assert commands.trained() == [
        "sources", *IDS[: IDS.index("fusion_of_dropped")], "sources-dropped", *IDS[IDS.index("fusion_of_dropped") :]
    ]  # fmt: skip
    assert commands.calls[-1][0] == journey.TIMING
    content = results(tmp_path)
    assert [row["id"] for row in content["rows"]] == list(IDS) and content["failures"] == []
    assert {row["inference"]["ratio"] for row in content["rows"]} == {1.25}
    dropped = next(call for call in commands.calls if "hydra.sweep.dir" in call[-1] and "dropped" in call[-1])
    assert "adapter.drop=specialized:3" in dropped, "half of the manifest's 7 layers"
    first = (tmp_path / "table.md").read_text()
    commands.calls.clear()
    capsys.readouterr()
    assert compare() == 0
    assert commands.calls == [], "nothing is trained or timed twice"
    assert capsys.readouterr().out.count("nothing to train") == 35
    assert (tmp_path / "table.md").read_text() == first and results(tmp_path) == content


def test_a_broken_run_goes_on_where_it_was(
    commands: Commands, compare: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(module: str, overrides: list[str]) -> Outcome:
        if "composition=static" in overrides:
            raise SystemExit(130)
        return commands(module, overrides)

    monkeypatch.setattr(journey, "attempt", interrupted)
    with pytest.raises(SystemExit) as ended:
        compare("methods=[head,static,mean]")
    assert ended.value.code == 130
    assert commands.trained() == ["sources", "head"], "nothing else starts after an interrupt"
    monkeypatch.setattr(journey, "attempt", commands)
    assert compare("methods=[head,static,mean]") == 0
    assert commands.trained() == ["sources", "head", "static", "mean"]


def test_more_rates_cost_only_themselves_and_other_settings_are_asked_for(
    commands: Commands, compare: Callable[..., int]
) -> None:
    assert compare("methods=[head,mean]") == 0
    commands.calls.clear()
    assert compare("methods=[head,mean]", "rates=[1e-4]") == 0
    assert commands.trained() == [], "a smaller grid is stored already"
    assert compare("methods=[head]", "logger=none") == 0
    assert commands.trained() == [], "how a run is watched does not matter"
    assert compare("methods=[head]", "epochs=4") == 0
    assert commands.trained() == ["head"], "the command itself has to say what it makes of other settings"
    assert "overwrite=true" not in commands.calls[-1]


def test_a_failed_row_is_named_and_the_others_run(
    commands: Commands, compare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.refused["lora"] = "unknown method 'lora'; known: adapter, head"
    for rate in ("0.0001", "0.001"):
        commands.errors[f"cb-adapterfusion-lr-{rate}"] = "TrainingError: the loss is\nnot finite"
    assert compare("methods=[head,lora,adapterfusion,mean,pruned]") == 1
    assert commands.trained() == ["sources", "head", "lora", "adapterfusion", "mean"]
    content = results(tmp_path)
    assert [row["id"] for row in content["rows"]] == ["head", "mean"]
    assert content["failures"] == [
        {"id": "lora", "what": "row", "reason": "unknown method 'lora'; known: adapter, head"},
        {"id": "adapterfusion", "what": "row", "reason": "TrainingError: the loss is not finite"},
        {"id": "pruned", "what": "row", "reason": "made from adapterfusion, which failed"},
    ]  # fmt: skip
    table = (tmp_path / "table.md").read_text()
    assert "`lora` |" not in table and "- `pruned`, row: made from adapterfusion, which failed" in table
    assert "Failed (3):" in capsys.readouterr().out
    commands.errors.clear()
    commands.refused.clear()
    commands.calls.clear()
    assert compare("methods=[head,lora,adapterfusion,mean,pruned]") == 0
    assert commands.trained() == ["lora", "adapterfusion", "pruned"]
    assert results(tmp_path)["failures"] == []


def test_a_rate_that_fails_leaves_the_row_the_others(
    commands: Commands, compare: Callable[..., int], tmp_path: Path
) -> None:
    commands.errors["cb-head-lr-0.001"] = "TrainingError: the loss is not finite"
    assert compare("methods=[head]") == 1
    content = results(tmp_path)
    assert [(row["id"], row["rate"]) for row in content["rows"]] == [("head", 1e-4)]
    assert content["failures"] == [
        {"id": "head", "what": "rate 0.001, seed 0", "reason": "TrainingError: the loss is not finite"}
    ]


def test_a_source_that_fails_takes_its_rows_along(
    commands: Commands, compare: Callable[..., int], tmp_path: Path
) -> None:
    commands.errors["mrpc"] = "OSError: disk full"
    assert compare("methods=[head,mean,drop_specialized]") == 1
    content = results(tmp_path)
    assert [row["id"] for row in content["rows"]] == ["head", "drop_specialized"]
    assert content["failures"] == [
        {"id": "mrpc", "what": "source", "reason": "OSError: disk full"},
        {"id": "mean", "what": "row", "reason": "made from mrpc, which could not be trained"},
    ]


def test_a_refused_first_command_ends_it(
    commands: Commands, compare: Callable[..., int], tmp_path: Path
) -> None:
    """What is wrong with it is wrong with all the others: the words that all of them get."""
    commands.refused["sources"] = "data.dir=x: there is no such folder"
    with pytest.raises(SystemExit) as ended:
        compare()
    assert ended.value.code == 2 and len(commands.calls) == 1
    assert not (tmp_path / "results.json").exists()


def test_a_start_that_gives_nothing_keeps_earlier_results(
    commands: Commands, compare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare("methods=[head]") == 0
    before = (tmp_path / "results.json").read_text()
    commands.refused["head"] = "the store has another cb-head: optim.patience: 3 there, 2 here"
    assert compare("methods=[head]", "patience=2") == 1
    assert (tmp_path / "results.json").read_text() == before
    assert "output=ANOTHER compares anew" in capsys.readouterr().out


def test_stored_sources_are_taken_as_they_are(
    commands: Commands, compare: Callable[..., int], tmp_path: Path
) -> None:
    config = {"trainer.max_epochs": 30, "optim.lr": 5e-4, "data.limit.train": None}
    run = {"identity": "i", "config": config, "overrides": ["+task=mrpc"], "directory": "d"}
    save_manifest(tmp_path / "store", "mrpc", task={"name": "mrpc"}, run=run)
    assert compare("methods=[mean,multitask_adapter]") == 0
    assert "+task=cb" in commands.calls[0] and commands.trained()[0] == "sources"
    content = results(tmp_path)
    assert "Source mrpc is taken as it was: trainer.max_epochs=30, data.limit.train=None." in content["notes"]
    assert content["source_commands"][0] == "python -m fusion.stage1 +task=mrpc"
    assert "tasks=[mrpc,cb]" in commands.calls[1], "the target is one of the tasks anyway"
    assert main(["+task=cb", "sources=[nothing]", f"output={tmp_path}"]) == 2


def test_the_target_is_a_multi_task_runs_task_even_where_it_is_no_source(
    commands: Commands, tmp_path: Path
) -> None:
    assert main(["+task=cb", "sources=[mrpc]", "methods=[multitask_full]", f"output={tmp_path}"]) == 0
    assert commands.trained() == ["multitask_full"], "and no source adapter is needed"
    assert "tasks=[mrpc,cb]" in commands.calls[0]


def test_what_was_made_from_something_else_is_made_again(
    commands: Commands, compare: Callable[..., int], tmp_path: Path
) -> None:
    commands.accuracy["cb-adapterfusion-lr-0.0001"] = 0.9
    assert compare("methods=[head,mean,pruned]") == 0
    assert "composition.fusion=cb-adapterfusion-lr-0.0001" in commands.calls[-2]
    commands.calls.clear()
    commands.accuracy["cb-adapterfusion-lr-0.01"] = 0.95
    assert compare("methods=[head,mean,pruned]", "rates=[1e-4,1e-3,1e-2]") == 0
    assert commands.trained() == ["head", "adapterfusion", "mean", "pruned"]
    assert {"composition.fusion=cb-adapterfusion-lr-0.01", "overwrite=true"} <= set(commands.calls[-2])
    assert all("overwrite=true" not in call for call in commands.calls[:-2])
    commands.calls.clear()
    files = {
        "weights.safetensors": {"bytes": 1, "sha256": "another"},
        "head.safetensors": {"bytes": 1, "sha256": "h"},
    }
    save_manifest(tmp_path / "store", "mrpc", task={"name": "mrpc"}, files=files)
    assert compare("methods=[head,mean,pruned]", "rates=[1e-4,1e-3,1e-2]") == 0
    assert commands.trained() == ["adapterfusion", "mean", "pruned"], "the head is not made from it"
    assert all("overwrite=true" in call for call in commands.calls[:-1])


def test_rows_of_several_seeds_name_the_artifact_of_each_seed(
    commands: Commands, compare: Callable[..., int], tmp_path: Path
) -> None:
    commands.refused["pruned"] = "not asked here"
    assert compare("methods=[pruned,fusion_with_multitask]", "seeds=[1,2]") == 1
    words = [word for call in commands.calls for word in call]
    assert "composition.fusion=cb-adapterfusion-lr-0.0001-seed-${seed}" in words
    commands.refused["fusion_with_multitask"] = ""
    assert "sources=[mrpc,cb,cb-multitask_adapter-lr-0.0001-seed-${seed}]" in words


def test_inference_that_fails_costs_its_figures_alone(
    commands: Commands, compare: Callable[..., int], tmp_path: Path
) -> None:
    commands.errors["inference"] = "RuntimeError: boom"
    assert compare("methods=[head]") == 1
    content = results(tmp_path)
    assert content["rows"][0]["inference"] is None
    assert content["failures"] == [{"id": "head", "what": "inference", "reason": "RuntimeError: boom"}]
    commands.errors.clear()
    commands.refused["timing"] = "crash"
    assert compare("methods=[head]") == 1
    reason = "ended with exit code True and said nothing"
    assert results(tmp_path)["failures"] == [{"id": "inference", "what": "all rows", "reason": reason}]
    commands.refused.clear()
    (tmp_path / "inference.json").unlink()
    assert compare("methods=[head]") == 0
    assert results(tmp_path)["rows"][0]["inference"]["ratio"] == 1.25


def test_reasons_are_one_line() -> None:
    said = ("noise", "job 0 (+task=cb optim.lr=5e-05 name=a): no such thing", "say another", "")
    assert one_line(last_words(Outcome(2, 1.0, said[1:]))) == "no such thing say another"
    assert one_line(last_words(Outcome(2, 1.0, said))) == "no such thing say another"
    assert last_words(Outcome(2, 1.0, ("a", "b", "c"))) == "b c"
    assert last_words(Outcome(1, 1.0, said)) == "say another"
    assert last_words(Outcome(-9, 1.0, ())) == "ended with exit code -9 and said nothing"
    assert len(one_line("x" * 1000)) == 400


# --- table and picture ----------------------------------------------------------------------------


def result(id: str, group: str, *scores: float, **changes: Any) -> RowResult:
    values: dict[str, Any] = {
        "id": id,
        "title": id.title(),
        "group": group,
        "rate": 5e-4,
        "artifacts": [f"cb-{id}"],
        "scores": {"accuracy": list(scores), "macro_f1": [0.5] * len(scores)},
        "grid": {},
        "trainable": 2_659_971,
        "stored_bytes": 10_639_884,
        "sources": [],
        "seconds_per_step": 0.5,
        "best_epochs": [3],
        "command": f"python -m {id}",
        "inference": {"ratio": 1.105},
    }
    return RowResult(**(values | changes))


def test_the_table_is_grouped_and_aligned() -> None:
    rows = [
        result("head", SINGLE, 0.61, 0.65, trainable=1155, stored_bytes=4772),
        result(
            "pruned", COMPOSITIONS, 0.7, 0.7, rate=None, trainable=0, seconds_per_step=None, inference=None
        ),
    ]
    lines = terminal_table(rows).splitlines()
    assert lines[0].split() == ["accuracy", "macro_f1", "rate", "trained", "stored", "s/step", "inference"]
    assert [lines[1], lines[3]] == [SINGLE, COMPOSITIONS], "a group without rows has no heading"
    assert re.split(r" {2,}", lines[2].strip()) == [
        "head", "0.630 ± 0.028", "0.500 ± 0.000", "0.0005", "1,155", "4.8 kB", "0.500", "1.10×",
    ]  # fmt: skip
    assert re.split(r" {2,}", lines[4].strip()) == [
        "pruned", "0.700 ± 0.000", "0.500 ± 0.000", "–", "–", "10.6 MB", "–", "–",
    ]  # fmt: skip
    assert len(lines[0]) == len(lines[2]) == len(lines[4])


def test_numbers_for_a_reader() -> None:
    assert (score_text([0.7234]), score_text([0.7, 0.8])) == ("0.723", "0.750 ± 0.071")
    assert [bytes_text(n) for n in (800, 4772, 459_044, 10_639_884, 2_000_000_000)] == [
        "800 B", "4.8 kB", "459 kB", "10.6 MB", "2.0 GB",
    ]  # fmt: skip


def test_the_notes_say_what_the_scores_are_worth() -> None:
    grid = {"5e-05": {"accuracy": 0.5}, "0.005": {"accuracy": 0.6}}
    rows = [
        result("head", SINGLE, 0.6, rate=0.005, grid=grid),
        result("lora", SINGLE, 0.6, rate=5e-4, grid=grid),
    ]
    compared = journey.Compared(rows=rows, notes=["Mind the gap."])
    said = " ".join(notes(settings_of(), compared))
    for part in (
        "at most 5 epochs in batches of 16, patience 3, the best of the learning rates 5e-05, 0.0005, 0.005 by accuracy",
        "all scores are optimistic",
        "wider one may be better: head.",
        "One seed, 0: small differences may be chance.",
        "Sources mrpc, cb: up to 1000 rows, 2 epochs",
        "Mind the gap.",
    ):
        assert part in said
    assert "Inference" not in said and "Multi-task" not in said
    bare = {
        "rows": [32, 8],
        "tokens": [64, 20],
        "rounds": 7,
        "threads": 2,
        "device": "cpu",
        "bare_seconds": 0.1,
    }
    compared.inference = bare
    for row, spread in zip(compared.rows, (0.1, 0.2), strict=True):
        row.inference = {"ratio": 1.1, "low": 1.0, "high": 1.0 + spread}
    assert notes(settings_of(), compared)[-1] == (
        "Inference: seconds of a batch over the bare backbone's (100 ms, cpu, 2 threads), the median of 7 rounds in turn "
        "over batches of 32 × 64, 8 × 20 rows × tokens; the middle half of a row's rounds spans 0.15×."
    )
    own = " ".join(notes(settings_of("equal_budget=false", "seeds=[1,2]"), compared))
    assert "own defaults: rates and epochs differ" in own and "Seeds 1, 2: mean ± standard deviation." in own


def test_the_picture_is_drawn_and_its_labels_keep_apart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        result(
            f"row_{number}", GROUPS[number % 3], 0.6 + 0.02 * (number % 4), trainable=10 ** (3 + number % 3)
        )
        for number in range(24)
    ]
    assert draw(rows, "cb", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    axes = plot(rows, "cb").axes[0]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "accuracy on the validation rows"
    assert {text.get_text() for text in axes.texts} == {row.id for row in rows}
    boxes = [label_box(text) for text in axes.texts]
    assert not any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))
    nothing = [result("pruned", COMPOSITIONS, 0.5, trainable=0)]
    assert not draw(nothing, "cb", tmp_path / "none.png") and not (tmp_path / "none.png").exists()


# --- inference ------------------------------------------------------------------------------------


def test_rounds_take_one_batch_each_and_everybody_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, Any]] = []
    now = itertools.count()

    def run(name: str) -> Callable[[Any], object]:
        return lambda batch: ran.append((name, batch))

    runs = {name: run(name) for name in ("", "a", "b")}
    seconds = rounds(runs, ["long", "short"], until=0, clock=lambda: float(next(now)))
    assert ran[:3] == [("", "long"), ("a", "long"), ("b", "long")], "a round that does not count comes first"
    assert ran[3:] == [
        ("", "long"), ("a", "long"), ("b", "long"),
        ("a", "short"), ("b", "short"), ("", "short"),
        ("b", "long"), ("", "long"), ("a", "long"),
    ]  # fmt: skip
    assert seconds == {name: [1.0] * inference.SMALLEST_ROUNDS for name in runs}
    endless = rounds(runs, ["one"], until=math.inf, clock=lambda: float(next(now)))
    assert len(endless["a"]) == inference.MOST_ROUNDS


def test_a_ratio_is_that_of_the_same_round() -> None:
    timed = ratios([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])  # the machine was slow in the second round
    assert timed == {"ratio": 2.0, "low": 2.0, "high": 2.5, "seconds": 3.0}
    assert ratios([3.0], [2.0])["ratio"] == 1.5


def test_equal_tensors_are_kept_once_and_different_ones_apart() -> None:
    torch.manual_seed(0)
    one, two, other = (torch.nn.Linear(80, 80) for _ in range(3))
    two.load_state_dict(one.state_dict())
    before = other.weight.detach().clone()
    known: dict[tuple[Any, ...], list[Any]] = {}
    for model in (one, two, other):
        share_tensors(model, known)
    assert two.weight.data_ptr() == one.weight.data_ptr() != other.weight.data_ptr()
    assert torch.equal(other.weight, before)


@pytest.mark.parametrize(
    "argument", ["batches=0", "seconds=0", "artifacts=[]", "artefacts=[a]", "target=nothing"]
)
def test_wrong_timings_are_refused(argument: str, tmp_path: Path) -> None:
    file = tmp_path / "inference.json"
    words = ["target=cb", "artifacts=[a]", f"store={tmp_path}", f"result={file}", argument]
    assert inference.main(words) == 2 and not file.exists()


# --- for real, in small ---------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a blank in its name and two tasks; the commands run in this process there."""
    folder = tmp_path / "my work"
    (folder / "conf" / "task").mkdir(parents=True)
    for name in ("films", "books"):
        write_task(folder / "data", name)
        task = {
            "kind": "classification",
            "text": "text",
            "labels": LABELS,
            "metrics": ["accuracy", "macro_f1"],
        }
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
        if module == journey.TIMING:
            return Outcome(inference.main(overrides), 0.1)
        monkeypatch.setattr(sys, "argv", [module, *overrides])
        with pytest.raises(SystemExit) as ended:
            {"fusion.stage1": stage1, "fusion.stage2": stage2}[module].main()
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, 0.1, tuple(said.err.splitlines()))

    monkeypatch.setattr(journey, "attempt", attempt)
    broken = Row("broken", "a method that there is not", SINGLE, "method=nothing_like_it")
    monkeypatch.setattr(settings_module, "chosen", lambda ids: [broken, *chosen(ids)])
    words = [
        "+task=films", "sources=[books,films]", "methods=[head,pfeiffer,adapterfusion,static]",
        "rates=[5e-3,5e-2]", "epochs=1", "patience=null", "source_rows=16", "source_epochs=1", "output=compared",
        f"backbone.name_or_path={tiny_backbone}", "backbone.pooling=mean", "data.dir=data", "data.cache_dir=cache",
        "batch_size=8", "data.max_length=16", "trainer.accelerator=cpu",
    ]  # fmt: skip
    assert main(words) == 1, "for the broken row"
    assert calls == ["fusion.stage1"] * 4 + ["fusion.stage2"] * 2 + [journey.TIMING]
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
    assert timing["rounds"] >= inference.SMALLEST_ROUNDS and timing["bare_seconds"] > 0
    source = read_manifest("books", place / "compared" / "store").run.config
    assert (source["data.limit.train"], source["trainer.max_epochs"], source["optim.lr"]) == (16, 1, 5e-4)
    table = (place / "compared" / "table.md").read_text()
    assert "| `static` | static weights | " in table and "python -m fusion.stage2 -m +task=films" in table

    calls.clear()
    assert main(words) == 1
    assert calls == ["fusion.stage1"], "nothing but the broken row is tried again"
    assert results(place / "compared") == content


def test_an_artifact_that_cannot_be_loaded_does_not_cost_the_others_their_times(
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
    config = TimingConfig("films", ["adapter", "head", "gone"], "store", seconds=0.01, cache_dir="cache")
    config.accelerator, config.batches = "cpu", 9
    measured = inference.measure(config)
    assert set(measured["artifacts"]["adapter"]) == {"hash", "ratio", "low", "high", "seconds"}
    assert "head.safetensors" in measured["artifacts"]["head"]["error"]
    assert "no artifact 'gone'" in measured["artifacts"]["gone"]["error"]
    assert measured["rounds"] == inference.SMALLEST_ROUNDS
    assert measured["rows"] == [8, 8], "no batch stands for two where there are few"
    assert set(measured) == {
        "backbone", "split", "rows", "tokens", "device", "threads", "rounds", "bare_seconds", "artifacts",
    }  # fmt: skip
