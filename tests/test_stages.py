"""Both stages, evaluation and prediction on a tiny backbone and tiny tasks, in this process."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from safetensors.torch import load_file

from fusion import evaluate, predict
from fusion.config.commands import EvaluateConfig
from fusion.config.compositions import CompositionConfig
from fusion.config.data import LimitConfig
from fusion.config.methods import MethodConfig
from fusion.config.model import AdapterConfig, BackboneConfig, HeadConfig, SameBackboneConfig
from fusion.config.stages import Stage1Config
from fusion.config.training import CsvConfig, LoggerConfig, OptimConfig, TrainerConfig
from fusion.errors import TrainingError, UserError
from fusion.runs.output import find_output
from fusion.store.artifacts import load
from fusion.tasks.table import kind_of
from fusion.tasks.task import HubConfig
from tests.bench import (
    LABELS,
    Bench,
    add_callback,
    quiz_row,
    rating_row,
    same,
    trainer_config,
    write_manifest,
    write_task,
)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """Three sources and a fusion of them, for tests that do not change them."""
    bench = Bench(tmp_path_factory.mktemp("fused") / "a folder", tiny_backbone)
    longer = TrainerConfig(accelerator="cpu", max_epochs=15, enable_progress_bar=False)
    bench.stage1("films", trainer=longer, optim=OptimConfig(lr=1e-2, patience=None))
    bench.stage1("books", adapter=AdapterConfig(bottleneck_size=5, nonlinearity="gelu", layers=[0, 1]))
    bench.stage1("plays", adapter=AdapterConfig(bottleneck_size=3, scaling=2.0))
    bench.stage2("films", ["films", "books", "plays"], logger=LoggerConfig(csv=CsvConfig()))
    return bench


def test_an_adapter_is_stored_with_exactly_these_keys(fused: Bench) -> None:
    assert set(fused.weights("films")) == {
        f"{layer}.feedforward.{part}.{kind}"
        for layer in range(3)
        for part in ("down", "up")
        for kind in ("weight", "bias")
    }
    assert set(load_file(fused.folder / "store" / "films" / "head.safetensors")) == {"output.weight", "output.bias"}
    assert {name.split(".")[0] for name in fused.weights("books")} == {"0", "1"}
    assert sorted(p.name for p in (fused.folder / "store" / "films").iterdir()) == [
        "head.safetensors",
        "manifest.json",
        "weights.safetensors",
    ]


def test_a_fusion_is_stored_with_exactly_these_keys_and_its_sources_by_hash(fused: Bench) -> None:
    assert set(fused.weights("films-adapterfusion")) == {
        f"{layer}.feedforward.{part}"
        for layer in range(3)
        for part in ("query.weight", "query.bias", "key.weight", "key.bias", "value.weight")
    }
    store = fused.folder / "store"
    manifest = load("films-adapterfusion", store).manifest
    assert manifest.content["sources"] == [
        {"name": name, "hash": load(name, store).manifest.hash} for name in ("films", "books", "plays")
    ]
    assert not list((store / ".runs").glob("*"))


def test_the_result_has_the_documented_fields(bench: Bench) -> None:
    result = bench.stage1("films")
    assert set(result) == {
        "stage", "task", "name", "seed", "backbone", "metrics", "best_epoch", "epochs",
        "parameters", "speed", "sources", "artifact",
    }  # fmt: skip
    assert (result["stage"], result["task"], result["name"], result["seed"]) == (1, "films", "films", 42)
    assert set(result["metrics"]) == {"validation"}
    assert set(result["metrics"]["validation"]) == {"accuracy", "macro_f1"}
    assert result["parameters"]["trainable"] == 3 * (2 * 32 * 2 + 2 + 32) + (2 * 32 + 2)
    files = (bench.folder / "store" / "films").glob("*.safetensors")
    assert result["parameters"]["stored_bytes"] == sum(file.stat().st_size for file in files)
    assert set(result["speed"]) == {
        "seconds", "seconds_per_step", "examples_per_second", "tokens_per_second", "peak_memory_bytes",
        "expected_memory_bytes",
    }  # fmt: skip
    assert result["epochs"] == 2 and 1 <= result["best_epoch"] <= 2
    assert bench.stage2("books", ["films"])["sources"] == ["films"]


def test_evaluation_reproduces_the_scores_of_the_training(fused: Bench) -> None:
    for name in ("films", "films-adapterfusion"):
        stored = load(name, fused.folder / "store").manifest.metrics["validation"]
        assert fused.evaluate(name)["metrics"]["validation"] == pytest.approx(stored, abs=1e-6)


def test_the_task_is_learned(fused: Bench) -> None:
    assert fused.evaluate("films", split="test")["metrics"]["test"]["accuracy"] >= 0.75


def test_an_adapter_is_evaluated_on_tasks_with_the_same_labels_only(fused: Bench) -> None:
    result = fused.evaluate("films", task=fused.tasks["plays"], split="test")
    assert result["task"] == "plays" and 0 <= result["metrics"]["test"]["accuracy"] <= 1
    other = dataclasses.replace(fused.tasks["plays"], labels=["no", "yes"])
    with pytest.raises(UserError, match=r"\['no', 'yes'\].*\['bad', 'good'\]"):
        fused.evaluate("films", task=other)


def test_by_path_from_anywhere(fused: Bench) -> None:
    path = fused.folder / "store" / "films-adapterfusion"
    config = EvaluateConfig(artifact=str(path), store="elsewhere", data=fused.data, accelerator="cpu")
    result = evaluate.main.__wrapped__(config, fused.run("evaluate", config))  # type: ignore[attr-defined]
    assert result["metrics"] == fused.evaluate("films-adapterfusion")["metrics"]


def test_predictions_name_labels_and_do_not_depend_on_the_batch(fused: Bench) -> None:
    rows = [{"text": "a good film"}, {"text": "a very very bad film that he saw"}, {"text": "good"}]
    together = fused.predict("films", rows)
    assert all(set(line) == {"label", "scores"} and set(line["scores"]) == set(LABELS) for line in together)
    for row, line in zip(rows, together, strict=True):
        assert sum(line["scores"].values()) == pytest.approx(1)
        assert line["label"] == max(line["scores"], key=line["scores"].__getitem__)
        assert fused.predict("films", [row])[0]["scores"] == pytest.approx(line["scores"], abs=1e-5)


def test_a_long_file_is_predicted_in_parts_with_the_same_lines(fused: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": " ".join(["good", "bad", "film", "he", "saw"][: 1 + number % 5])} for number in range(11)]
    once = fused.predict("films-adapterfusion", rows, attention=True)
    monkeypatch.setattr(predict, "PART", 4)
    parts = fused.predict("films-adapterfusion", rows, attention=True)
    assert [line["label"] for line in parts] == [line["label"] for line in once]
    for part, line in zip(parts, once, strict=True):
        assert part["scores"] == pytest.approx(line["scores"], abs=1e-5)
        for layer, weights in line["attention"].items():
            assert part["attention"][layer] == pytest.approx(weights, abs=1e-5)


def test_attention_is_a_distribution_over_the_sources_of_each_layer(fused: Bench) -> None:
    (line,) = fused.predict("films-adapterfusion", [{"text": "a good film"}], attention=True)
    assert list(line["attention"]) == ["0", "1", "2"]
    for layer, weights in line["attention"].items():
        assert list(weights) == ["films", "books", "plays"]
        assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
        assert (weights["books"] == 0) == (layer == "2")  # that source has no adapter there
    with pytest.raises(UserError, match="only a fusion"):
        fused.predict("films", [{"text": "a good film"}], attention=True)


def test_the_penalty_is_logged_by_its_name(fused: Bench) -> None:
    (file,) = (fused.folder / "runs").glob("*/csv/metrics.csv")
    header = set(file.read_text().splitlines()[0].split(","))
    assert {"train/task_loss", "train/value_penalty_loss", "train/loss", "validation/accuracy"} <= header


def test_a_new_process_gives_bit_equal_logits(fused: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import sys, torch
from pathlib import Path
from fusion.backbones.load import load_backbone
from fusion.model.build import stored_model
from fusion.store.artifacts import load
store = Path(sys.argv[1])
ids = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0]])
with torch.no_grad():
    artifact = load("films-adapterfusion", store)
    backbone = load_backbone(artifact.manifest.backbone.name_or_path)
    torch.save(stored_model(artifact, store, backbone)(ids, (ids != 0).long()), sys.argv[2])
"""
    store, here, there = (str(path) for path in (fused.folder / "store", tmp_path / "here", tmp_path / "there"))
    monkeypatch.setattr(sys, "argv", ["-c", store, here])
    exec(code, {})
    subprocess.run([sys.executable, "-c", code, store, there], check=True, cwd=Path(__file__).parents[1])
    logits = [torch.load(path, weights_only=True) for path in (here, there)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("composition", ["static", "mean"])
def test_a_slot_accepts_other_compositions(fused: Bench, composition: str) -> None:
    result = fused.stage2("plays", ["films", "plays"], composition=CompositionConfig(name=composition))
    expected = {f"{n}.feedforward.weight" for n in range(3)} if composition == "static" else set()
    assert set(fused.weights(f"plays-{composition}")) == expected
    assert fused.evaluate(f"plays-{composition}")["metrics"]["validation"] == pytest.approx(
        result["metrics"]["validation"], abs=1e-6
    )
    (line,) = fused.predict(f"plays-{composition}", [{"text": "good"}], attention=True)
    assert list(line["attention"]["0"]) == ["films", "plays"]


def test_houlsby_and_a_head_of_two_layers(bench: Bench) -> None:
    placement = AdapterConfig(name="houlsby", sites=["attention", "feedforward"], reads="output", layers="last:2")
    bench.stage1("films", adapter=placement, head=HeadConfig(layers=2, pooling="cls"))
    bench.stage2("books", ["films"], composition=CompositionConfig(layers=[2], value_matrix=False))
    slots = {name.rsplit(".", 2)[0] for name in bench.weights("books-adapterfusion")}
    assert slots == {"2.attention", "2.feedforward"}
    (line,) = bench.predict("books-adapterfusion", [{"text": "good"}], attention=True)
    assert set(line["attention"]) == {"2.attention", "2.feedforward"}
    assert 0 <= bench.evaluate("films")["metrics"]["validation"]["accuracy"] <= 1


def test_a_head_alone(bench: Bench) -> None:
    result = bench.stage1("films", method=MethodConfig("head"))
    assert result["name"] == "films-head" and result["parameters"]["trainable"] == 2 * 32 + 2
    assert bench.weights("films-head") == {}
    assert bench.evaluate("films-head")["metrics"] == {
        "validation": pytest.approx(result["metrics"]["validation"], abs=1e-6)
    }
    with pytest.raises(UserError, match="stored head"):
        bench.stage2("books", ["films-head"])


def test_the_same_run_gives_the_same_bits(bench: Bench) -> None:
    for store in ("one", "two"):
        bench.stage1("films", store=str(bench.folder / store), head=HeadConfig(dropout=0.3))
    assert same(bench.weights("films", "one"), bench.weights("films", "two"))
    bench.stage1("films", store=str(bench.folder / "three"), head=HeadConfig(dropout=0.3), seed=43)
    assert not same(bench.weights("films", "one"), bench.weights("films", "three"))


def test_mixed_precision_trains(bench: Bench) -> None:
    trainer = TrainerConfig(accelerator="cpu", max_epochs=1, enable_progress_bar=False, precision="bf16-mixed")
    assert bench.stage1("films", trainer=trainer)["epochs"] == 1


def test_batches_by_tokens_train_evaluate_and_predict(bench: Bench) -> None:
    bench.data = dataclasses.replace(bench.data, tokens_per_batch=64)
    result = bench.stage1("films")
    assert result["epochs"] == 2
    assert bench.evaluate("films")["metrics"]["validation"] == pytest.approx(result["metrics"]["validation"], abs=1e-6)
    rows = [{"text": " ".join(["good"] * count)} for count in range(1, 12)]
    by_tokens = [line["scores"]["good"] for line in bench.predict("films", rows)]
    bench.data = dataclasses.replace(bench.data, tokens_per_batch=None)
    by_rows = [line["scores"]["good"] for line in bench.predict("films", rows)]
    assert by_tokens == pytest.approx(by_rows, abs=1e-5)


def test_gradient_checkpointing_stores_the_same_bits(bench: Bench) -> None:
    for store, checkpointing in (("plain", False), ("again", True)):
        backbone = BackboneConfig(
            name_or_path=str(bench.backbone), pooling="mean", gradient_checkpointing=checkpointing
        )
        place = str(bench.folder / store)
        bench.stage1("films", backbone=backbone, store=place, adapter=AdapterConfig(dropout=0.2))
        bench.stage2("books", ["films"], backbone=backbone, store=place)
    for name in ("films", "books-adapterfusion"):
        assert same(bench.weights(name, "plain"), bench.weights(name, "again"))


def test_a_finished_run_is_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.stage1("films")
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert bench.stage1("films") == first


def test_another_run_of_the_same_name_is_refused_with_the_keys(bench: Bench) -> None:
    bench.stage1("films")
    changed = {"optim": OptimConfig(lr=1e-3, patience=None)}
    with pytest.raises(UserError, match=r"optim\.lr: 0\.005 stored, 0\.001 now[\s\S]*overwrite=true"):
        bench.stage1("films", **changed)
    before = bench.weights("films")
    bench.stage1("films", **changed, overwrite=True)
    assert not same(bench.weights("films"), before)


def test_a_retrained_source_changes_the_identity_of_a_fusion(bench: Bench) -> None:
    bench.stage1("films")
    bench.stage2("books", ["films"])
    before = bench.evaluate("books-adapterfusion")["metrics"]
    bench.stage1("films", seed=7, overwrite=True)
    assert bench.evaluate("books-adapterfusion")["metrics"] == before  # it keeps its own sources
    changed = r"sources: films has changed \(\w{8} stored, \w{8} now\)\nSet name=NAME to keep both"
    with pytest.raises(UserError, match=changed):
        bench.stage2("books", ["films"])


def test_a_fusion_cannot_have_the_name_of_an_adapter(bench: Bench) -> None:
    bench.stage1("films")
    with pytest.raises(UserError, match="adapter"):
        bench.stage2("books", ["films"], name="films", overwrite=True)


class StopAfter(lightning.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("the power went")


@pytest.mark.parametrize("command", ["stage1", "stage2"])
def test_an_interrupted_run_is_bit_equal(bench: Bench, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.stage1("plays")

    def train(store: str) -> dict[str, Any]:
        settings = {"store": store, "head": HeadConfig(dropout=0.3), "trainer": trainer_config(max_epochs=3)}
        if command == "stage1":
            return bench.stage1("films", **settings, adapter=AdapterConfig(dropout=0.2), name="x")
        source = str(bench.folder / "store" / "plays")
        return bench.stage2("films", [source], **settings, name="x")

    whole, broken = str(bench.folder / "whole"), str(bench.folder / "broken")
    expected = train(whole)
    with monkeypatch.context() as patch:
        add_callback(patch, StopAfter(2))
        with pytest.raises(RuntimeError, match="power"):
            train(broken)
    assert not (bench.folder / "broken" / "x").exists()
    (last,) = (bench.folder / "broken" / ".runs").glob("x-*/last.ckpt")
    assert torch.load(last, weights_only=True)["epoch"] == 1  # the last epoch, be it the best or not
    resumed = train(broken)
    assert same(bench.weights("x", "whole"), bench.weights("x", "broken"))
    assert resumed["metrics"] == expected["metrics"] and resumed["best_epoch"] == expected["best_epoch"]


def test_incompatible_sources_are_refused(bench: Bench, make_backbone: Callable[..., Path]) -> None:
    bench.stage1("films")
    bench.stage1("books", adapter=AdapterConfig(name="houlsby", sites=["attention"], reads="output"))
    with pytest.raises(UserError, match=r"adapter\.sites \[attention\], expected \[feedforward\]"):
        bench.stage2("plays", ["films", "books"])
    bench.backbone = make_backbone("bert", seed=1)
    with pytest.raises(UserError, match=r"films was trained on .* a different backbone: fingerprint"):
        bench.stage2("plays", ["films"])
    bench.stage1("plays")
    with pytest.raises(UserError, match="backbone"):
        bench.stage2("plays", ["films", "plays"])
    with pytest.raises(UserError, match="no artifact 'filns'"):
        bench.stage2("plays", ["filns"])


def test_another_backbone_than_the_sources_is_refused_before_it_is_loaded(bench: Bench) -> None:
    bench.stage1("films")
    manifest = bench.folder / "store" / "films" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["backbone"]["name_or_path"] = "somebody/tiny"
    write_manifest(manifest, content)
    other = BackboneConfig(name_or_path="google-bert/bert-base-uncased")
    with pytest.raises(
        UserError, match=r"films was trained on somebody/tiny[\s\S]*backbone\.name_or_path=somebody/tiny"
    ):
        bench.stage2("plays", ["films"], backbone=other)


def test_evaluation_accepts_another_path_of_the_same_backbone(bench: Bench, make_backbone: Callable[..., Path]) -> None:
    bench.stage1("films")
    copy = shutil.copytree(bench.backbone, bench.folder / "copy of it")
    expected = bench.evaluate("films")["metrics"]
    assert bench.evaluate("films", backbone=SameBackboneConfig(name_or_path=str(copy)))["metrics"] == expected
    other = make_backbone("bert", seed=1)
    with pytest.raises(UserError, match="films was trained on"):
        bench.evaluate("films", backbone=SameBackboneConfig(name_or_path=str(other)))


def test_layers_that_do_not_exist_are_refused(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"adapter\.layers=\[2, 3\]: layer 3 .* 0 to 2"):
        bench.stage1("films", adapter=AdapterConfig(layers=[2, 3]))
    with pytest.raises(UserError, match=r"adapter\.layers=last:4: the backbone has 3 layers"):
        bench.stage1("films", adapter=AdapterConfig(layers="last:4"))
    bench.stage1("films", adapter=AdapterConfig(layers=[0]))
    with pytest.raises(UserError, match=r"composition\.layers=\[1\]: no source"):
        bench.stage2("books", ["films"], composition=CompositionConfig(layers=[1]))


def test_the_best_epoch_is_kept_and_patience_ends_the_run(bench: Bench) -> None:
    result = bench.stage1(
        "films",
        optim=OptimConfig(lr=5e-3, patience=1),
        trainer=TrainerConfig(accelerator="cpu", max_epochs=30, enable_progress_bar=False),
    )
    assert result["epochs"] <= result["best_epoch"] + 1 < 30
    assert bench.evaluate("films")["metrics"]["validation"] == pytest.approx(result["metrics"]["validation"], abs=1e-6)


def test_an_identity_depends_on_the_content_of_named_files(bench: Bench) -> None:
    config = Stage1Config(**bench.settings("films"), name="films")
    run = bench.run("stage1", config)
    entries = [find_output(config, run, "adapter", {"sources": [hash_]}) for hash_ in ("a", "b")]
    assert entries[0].identity != entries[1].identity
    assert entries[0].checkpoints.parent == bench.folder / "store" / ".runs"


def test_choices_of_any_number_from_training_to_prediction(bench: Bench) -> None:
    bench.add_quiz()
    bench.stage1("quiz")
    result = bench.stage2("quiz", ["quiz"])
    assert 0 <= result["metrics"]["validation"]["accuracy"] <= 1
    draw = random.Random(1)
    rows = [quiz_row(draw) for _ in range(5)]
    for given, line in zip(rows, bench.predict("quiz-adapterfusion", rows, attention=True), strict=True):
        assert list(line["scores"]) == [str(number) for number in range(len(given["choices"]))]
        assert sum(line["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert line["attention"]["0"] == {"quiz": pytest.approx(1)}


def test_a_regression_from_training_to_prediction(bench: Bench) -> None:
    bench.add_rating()
    result = bench.stage1("rating")
    assert set(result["metrics"]["validation"]) == {"pearson", "spearman"}
    (line,) = bench.predict("rating", [rating_row(random.Random(1))])
    assert set(line) == {"score"} and isinstance(line["score"], float)


def test_two_validation_splits_are_scored_and_the_first_selects_the_epoch(bench: Bench) -> None:
    write_task(bench.folder / "data", "nli")
    folder = bench.folder / "data" / "nli"
    (folder / "validation_matched.jsonl").write_text((folder / "validation.jsonl").read_text())
    (folder / "validation.jsonl").rename(folder / "validation_mismatched.jsonl")
    hub = HubConfig("x", splits={"train": "train", "validation": ["validation_matched", "validation_mismatched"]})
    bench.tasks["nli"] = dataclasses.replace(bench.tasks["films"], name="nli", hub=hub)
    result = bench.stage1("nli")
    assert list(result["metrics"]) == ["validation_matched", "validation_mismatched"]
    both = bench.evaluate("nli")["metrics"]
    assert both == {split: pytest.approx(values, abs=1e-6) for split, values in result["metrics"].items()}
    assert list(bench.evaluate("nli", split="validation_mismatched")["metrics"]) == ["validation_mismatched"]


def test_precision_accumulation_and_warm_up_reach_the_trainer(bench: Bench) -> None:
    trainer = TrainerConfig(
        accelerator="cpu",
        max_epochs=2,
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    bench.stage1("films", trainer=trainer)
    bench.stage2("books", ["films"], trainer=trainer)
    assert {t.dtype for t in bench.weights("books-adapterfusion").values()} == {torch.float32}


def test_backbone_dropout_changes_the_training_and_is_repeatable(bench: Bench) -> None:
    dropout = BackboneConfig(name_or_path=str(bench.backbone), pooling="mean", dropout=True)
    for store in ("one", "two"):
        bench.stage1("films", store=str(bench.folder / store), backbone=dropout)
    bench.stage1("films", store=str(bench.folder / "three"))
    assert same(bench.weights("films", "one"), bench.weights("films", "two"))
    assert not same(bench.weights("films", "one"), bench.weights("films", "three"))


@pytest.mark.parametrize("patience", [None, 3])
@pytest.mark.parametrize(
    ("how", "best_epochs"),
    [
        ({"max_steps": 3}, {1}),  # stops within the first epoch, which is evaluated then
        ({"check_val_every_n_epoch": 2, "max_epochs": 3}, {2}),
        ({"val_check_interval": 0.5}, {1, 2}),
        ({"enable_checkpointing": False}, {1, 2}),
    ],
)
def test_the_trainers_own_settings_leave_a_scored_artifact(
    bench: Bench, how: dict[str, Any], best_epochs: set[int], patience: int | None
) -> None:
    settings: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 2, "enable_progress_bar": False} | how
    optim = OptimConfig(lr=5e-3, patience=patience)
    result = bench.stage1("films", trainer=TrainerConfig(**settings), optim=optim)
    assert result["best_epoch"] in best_epochs
    assert set(result["metrics"]["validation"]) == {"accuracy", "macro_f1"}


def test_a_development_run_stores_nothing(bench: Bench) -> None:
    quick = TrainerConfig(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False)
    assert bench.stage1("films", trainer=quick)["metrics"]["validation"]
    assert not (bench.folder / "store" / "films").exists()


def test_weights_that_are_not_finite_are_never_stored(bench: Bench) -> None:
    with pytest.raises(TrainingError, match=r"[\s\S]*Lower optim\.lr"):
        bench.stage1("films", optim=OptimConfig(lr=999.0, warmup=0.0, patience=None), head=HeadConfig(layers=2))
        bench.stage1(
            "books", optim=OptimConfig(lr=999.0, warmup=0.0, patience=None), adapter=AdapterConfig(scaling=1e30)
        )
    assert not (bench.folder / "store" / "books").exists()


def test_what_lightning_refuses_is_a_user_error(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"trainer: .*gradient_clip_algorithm"):
        bench.stage1("films", trainer=TrainerConfig(accelerator="cpu", gradient_clip_algorithm="half-way"))
    with pytest.raises(UserError, match=r"an epoch has only 8 batches"):
        bench.stage1("films", trainer=TrainerConfig(accelerator="cpu", val_check_interval=50))
    for nothing in ({"overfit_batches": 2}, {"max_steps": 0}, {"limit_val_batches": 0}, {"fast_dev_run": "foo"}):
        with pytest.raises(UserError, match="trainer"):
            TrainerConfig(**nothing)


def test_upper_layers_alone_use_the_feature_cache(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    upper = {"adapter": AdapterConfig(layers=[1, 2])}
    off = BackboneConfig(name_or_path=str(bench.backbone), pooling="mean", cache="off")
    kept = bench.stage1("films", name="kept", **upper)
    assert caplog.text.count("computing the frozen features") == 2  # of the training and the validation rows
    assert len(list((bench.folder / "cache" / "prefix").glob("*.states"))) == 2
    bench.stage1("films", name="again", seed=7, **upper)  # another seed starts from the same states
    whole = bench.stage1("films", name="whole", backbone=off, **upper)
    assert caplog.text.count("computing the frozen features") == 2
    torch.testing.assert_close(bench.weights("kept"), bench.weights("whole"), rtol=1e-4, atol=1e-6)
    assert kept["metrics"] == whole["metrics"]
    scores = bench.evaluate("kept")["metrics"]
    assert scores["validation"] == pytest.approx(kept["metrics"]["validation"])


def test_a_run_resumes_with_the_same_feature_cache_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    upper = {"adapter": AdapterConfig(layers=[2])}
    bench.stage1("films", name="whole", **upper)

    def stop(self: Any, trainer: lightning.Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("fusion.training.callbacks.EpochLine.on_train_epoch_start", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            bench.stage1("films", name="cut", **upper)
    with monkeypatch.context() as patched:
        patched.setattr("fusion.training.stage.cache_features", lambda *_: None)
        with pytest.raises(UserError, match=r"started with backbone\.cache=float32 and would resume with off"):
            bench.stage1("films", name="cut", **upper)
    shutil.rmtree(bench.folder / "cache" / "prefix")  # computed again, with the same bits
    bench.stage1("films", name="cut", **upper)
    assert bench.weights("cut").keys() == bench.weights("whole").keys()
    assert all(torch.equal(bench.weights("cut")[k], v) for k, v in bench.weights("whole").items())


# --- multi-task training ------------------------------------------------------------------------------

MT = "films-quiz-rating-multitask_adapter"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """One adapter for a classification, a choice and a regression, for tests that do not change it."""
    bench = Bench(tmp_path_factory.mktemp("mixed") / "a folder", tiny_backbone)
    bench.add_rating()
    bench.add_quiz()
    longer = TrainerConfig(accelerator="cpu", max_epochs=12, enable_progress_bar=False, log_every_n_steps=1)
    logger = LoggerConfig(csv=CsvConfig())
    optim = OptimConfig(lr=1e-2, patience=None)
    bench.result = bench.multitask("films", "quiz", "rating", trainer=longer, optim=optim, logger=logger)
    bench.stage1("books")
    return bench


def test_multiple_tasks_store_one_adapter_and_one_head_per_task(mixed: Bench) -> None:
    assert set(mixed.weights(MT)) == set(mixed.weights("books"))
    head = load_file(mixed.folder / "store" / MT / "head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in head.items()} == {
        "films.output.weight": (2, 32), "films.output.bias": (2,),
        "quiz.output.weight": (1, 32), "quiz.output.bias": (1,),
        "rating.output.weight": (1, 32), "rating.output.bias": (1,),
    }  # fmt: skip
    manifest = load(MT, mixed.folder / "store").manifest
    assert manifest.kind == "adapter" and manifest.task.name == "films"
    assert manifest.multitask is not None and list(manifest.multitask) == ["films", "quiz", "rating"]
    for name, outputs in (("films", 2), ("quiz", 1), ("rating", 1)):
        assert manifest.content["multitask"][name] == {
            "task": dataclasses.asdict(mixed.tasks[name]),
            "head": {"pooling": "mean", "layers": 1, "outputs": outputs, "dropout": 0.1},
        }
    assert manifest.head == manifest.multitask["films"].head
    assert set(manifest.data.fingerprints) == {
        f"{task}/{split}" for task in manifest.multitask for split in ("train", "validation")
    }
    assert load("books", mixed.folder / "store").manifest.multitask is None


def test_the_result_of_multiple_tasks(mixed: Bench) -> None:
    result = mixed.result
    assert set(result) == {
        "stage", "task", "name", "seed", "backbone", "metrics", "best_epoch", "epochs",
        "parameters", "speed", "sources", "artifact",
    }  # fmt: skip
    assert (result["stage"], result["task"], result["name"]) == (1, "films+quiz+rating", MT)
    assert {split: set(metrics) for split, metrics in result["metrics"].items()} == {
        "films/validation": {"accuracy", "macro_f1"},
        "quiz/validation": {"accuracy"},
        "rating/validation": {"pearson", "spearman"},
    }
    assert result["parameters"]["trainable"] == 3 * (2 * 32 * 2 + 2 + 32) + (2 + 1 + 1) * (32 + 1)
    (file,) = (mixed.folder / "runs").glob("*/csv/metrics.csv")
    with open(file, newline="") as lines:
        logged = list(csv.DictReader(lines))
    assert all(sum(bool(row[f"{task}/train/loss"]) for row in logged) == 12 for task in ("films", "quiz"))
    assert set(logged[0]) - {"epoch", "step"} == {
        "train/loss", "train/task_loss", "train/lr", "train/grad_norm",
        "films/train/loss", "quiz/train/loss", "rating/train/loss", "mean",
        "films/validation/accuracy", "films/validation/macro_f1", "quiz/validation/accuracy",
        "rating/validation/pearson", "rating/validation/spearman",
    }  # fmt: skip


def test_multiple_tasks_are_learned_together(mixed: Bench) -> None:
    metrics = mixed.evaluate(MT, split="test")["metrics"]
    assert metrics["films/test"]["accuracy"] >= 0.75
    assert metrics["rating/test"]["pearson"] >= 0.5
    assert metrics["quiz/test"]["accuracy"] >= 0.5


def test_multi_task_evaluation_reproduces_the_scores_of_the_training(mixed: Bench) -> None:
    stored = load(MT, mixed.folder / "store").manifest.metrics
    result = mixed.evaluate(MT)
    assert result["task"] == "films+quiz+rating" and result["rows"] == 16 + 12 + 12
    assert result["metrics"] == {split: pytest.approx(values, abs=1e-6) for split, values in stored.items()}
    for name in ("films", "quiz", "rating"):
        one = mixed.evaluate(MT, task=mixed.tasks[name])
        assert one["task"] == name
        assert one["metrics"] == {"validation": pytest.approx(stored[f"{name}/validation"], abs=1e-6)}


def test_a_task_with_the_same_labels_uses_their_head(mixed: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 <= mixed.evaluate(MT, task=mixed.tasks["books"])["metrics"]["validation"]["accuracy"] <= 1
    assert "head of films" in capsys.readouterr().out
    other = dataclasses.replace(mixed.tasks["books"], labels=["no", "yes"])
    with pytest.raises(UserError, match=r"no head for task books .* found films: .*; quiz: .*; rating: "):
        mixed.evaluate(MT, task=other)


def test_multi_task_prediction_needs_a_task(mixed: Bench) -> None:
    with pytest.raises(UserError, match=r"set \+task= .*one of films, quiz, rating"):
        mixed.predict(MT, [{"text": "good"}])
    (line,) = mixed.predict(MT, [{"text": "good"}], task=mixed.tasks["films"])
    assert set(line["scores"]) == set(LABELS)
    row = {"question": "which", "choices": ["a good film", "a bad film", "it is bad"]}
    (line,) = mixed.predict(MT, [row], task=mixed.tasks["quiz"])
    assert set(line["scores"]) == {"0", "1", "2"}
    (line,) = mixed.predict(MT, [{"one": "good good", "two": "film"}], task=mixed.tasks["rating"])
    assert set(line) == {"score"}
    # For an artifact with one task, another task with the same labels may specify the text columns.
    elsewhere = dataclasses.replace(mixed.tasks["books"], name="reviews", text="review")
    (moved,) = mixed.predict("books", [{"review": "good"}], task=elsewhere)
    assert moved == mixed.predict("books", [{"text": "good"}])[0]


def test_a_multi_task_adapter_can_be_a_source(mixed: Bench) -> None:
    before = mixed.weights(MT)
    result = mixed.stage2("films", ["books", MT])
    assert result["sources"] == ["books", MT]
    assert mixed.evaluate("films-adapterfusion")["metrics"]["validation"] == pytest.approx(
        result["metrics"]["validation"], abs=1e-6
    )
    (line,) = mixed.predict("films-adapterfusion", [{"text": "good"}], attention=True)
    assert list(line["attention"]["0"]) == ["books", MT]
    assert same(mixed.weights(MT), before)
    head = load_file(mixed.folder / "store" / "films-adapterfusion" / "head.safetensors")
    assert set(head) == {"output.weight", "output.bias"}


def test_the_mean_over_the_tasks_selects_the_best_epoch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first task alone would choose epoch 3, the mean chooses 2; patience ends the run after 4.
    scores = {"films": [0.1, 0.2, 0.5, 0.1, 0.1, 0.1], "books": [0.2, 0.9, 0.3, 0.3, 0.3, 0.3]}
    remaining = {name: iter(values) for name, values in scores.items()}
    scripted = lambda kind, task, *_: {"accuracy": next(remaining[task.name]), "macro_f1": 0.0}  # noqa: E731
    monkeypatch.setattr(type(kind_of(bench.tasks["films"])), "metrics", scripted)
    trainer = trainer_config(max_epochs=6)
    result = bench.multitask("films", "books", trainer=trainer, optim=OptimConfig(lr=5e-3, patience=2))
    assert (result["best_epoch"], result["epochs"]) == (2, 4)
    assert result["metrics"]["books/validation"]["accuracy"] == 0.9


def test_a_finished_multi_task_run_is_skipped_and_a_different_one_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.multitask("films", "books")
    with pytest.raises(UserError, match=r"method\.temperature: 2\.0 stored, 1\.0 now"):
        bench.multitask("films", "books", method=MethodConfig("multitask_adapter", temperature=1.0))
    with pytest.raises(UserError, match=r'tasks\.1\.name: "books" stored, "plays" now'):
        bench.multitask("films", "plays", name=first["name"])
    monkeypatch.setattr(lightning.Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert bench.multitask("films", "books") == first


def test_an_interrupted_multi_task_run_is_bit_equal(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add_quiz()

    def train(store: str) -> dict[str, Any]:
        return bench.multitask(
            "films",
            "quiz",
            store=str(bench.folder / store),
            head=HeadConfig(dropout=0.3),
            adapter=AdapterConfig(dropout=0.2),
            trainer=trainer_config(max_epochs=3),
            name="x",
        )

    expected = train("whole")
    with monkeypatch.context() as patch:
        add_callback(patch, StopAfter(2))
        with pytest.raises(RuntimeError, match="power"):
            train("broken")
    assert not (bench.folder / "broken" / "x").exists()
    resumed = train("broken")
    assert same(bench.weights("x", "whole"), bench.weights("x", "broken"))
    heads = [load_file(bench.folder / store / "x" / "head.safetensors") for store in ("whole", "broken")]
    assert same(*heads)
    assert resumed["metrics"] == expected["metrics"] and resumed["best_epoch"] == expected["best_epoch"]


def test_multi_task_training_uses_the_feature_cache(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bench.add_quiz()
    bench.add_rating()
    upper = {"adapter": AdapterConfig(layers="last:1")}
    off = BackboneConfig(name_or_path=str(bench.backbone), pooling="mean", cache="off")
    kept = bench.multitask("films", "quiz", "rating", name="kept", **upper)
    assert caplog.text.count("computing the frozen features") == 6  # training and validation rows of three tasks
    whole = bench.multitask("films", "quiz", "rating", name="whole", backbone=off, **upper)
    assert caplog.text.count("computing the frozen features") == 6
    torch.testing.assert_close(bench.weights("kept"), bench.weights("whole"), rtol=1e-4, atol=1e-6)
    for split, metrics in whole["metrics"].items():
        assert kept["metrics"][split] == pytest.approx(metrics, abs=1e-4)


def test_multiple_tasks_by_tokens(bench: Bench) -> None:
    bench.add_quiz()
    bench.data = dataclasses.replace(bench.data, tokens_per_batch=64)
    result = bench.multitask("films", "quiz")
    assert bench.evaluate(result["name"])["metrics"] == {
        split: pytest.approx(values, abs=1e-6) for split, values in result["metrics"].items()
    }


def test_limits_are_per_task(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bench.add_rating()
    bench.data = dataclasses.replace(bench.data, limit=LimitConfig(train=16, validation=5))
    bench.multitask("films", "rating")
    for task in ("films", "rating"):
        assert f"{task} train: 16 examples" in caplog.text and f"{task} validation: 5 examples" in caplog.text
    assert "4 batches per epoch, each from one task: films 50.0%, rating 50.0%" in caplog.text


def test_the_whole_model_is_trained_on_multiple_tasks(bench: Bench) -> None:
    result = bench.multitask("films", "books", method=MethodConfig("multitask_full"))
    name = "films-books-multitask_full"
    assert set(result["metrics"]) == {"films/validation", "books/validation"}
    assert load(name, bench.folder / "store").manifest.kind == "full"
    again = bench.evaluate(name)["metrics"]
    assert {split: pytest.approx(values, abs=1e-6) for split, values in again.items()} == result["metrics"]
    with pytest.raises(UserError, match=f"{name} is a stored full, expected an adapter"):
        bench.stage2("films", [name])
