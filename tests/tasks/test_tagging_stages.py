"""`kind: tagging` through all commands on a tiny backbone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion import stage1, stage2
from fusion.config.data import DataConfig, SplitConfig
from fusion.config.model import AdapterConfig, BackboneConfig
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.data.encode import encode
from fusion.data.rows import load_rows
from fusion.errors import UserError
from fusion.hub.tokenizer import load_tokenizer
from fusion.runs.run import OUTCOMES, record
from fusion.store.lookup import read_manifest
from fusion.tasks.table import kind_of
from tests.bench import Bench

TAGS = ["O", "B-PET", "I-PET", "B-ART"]
METRICS = ["entity_f1", "entity_precision", "entity_recall", "token_accuracy"]
FUSED = "nouns-adapterfusion"


def sentence(draw: random.Random) -> tuple[list[str], list[str]]:
    """Pets of one or two words, and art; up to 20 words, more than a sequence of 16 tokens holds."""
    words: list[str] = []
    tags: list[str] = []
    for _ in range(draw.randrange(1, 14)):
        new, own = draw.choice(
            [
                (["The", "cat"], ["B-PET", "I-PET"]),
                (["dog"], ["B-PET"]),
                (["film"], ["B-ART"]),
                (["is"], ["O"]),
                (["very", "bad"], ["O", "O"]),
            ]
        )
        words, tags = words + new, tags + own
    return words, tags


def write(folder: Path) -> TaskConfig:
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for split, count in {"train": 100, "validation": 24, "test": 8}.items():
        lines = ["".join(f"{word} {tag}\n" for word, tag in zip(*sentence(draw), strict=True)) for _ in range(count)]
        (folder / f"{split}.conll").write_text("\n".join(lines))
    return TaskConfig(
        name=folder.name,
        kind="tagging",
        text="tokens",
        label="tags",
        labels=TAGS,
        metrics=METRICS,
        columns={"tokens": "0", "tags": "1"},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("nouns") / "a folder", tiny_backbone)
    bench.tasks["nouns"] = write(bench.folder / "data" / "nouns")
    bench.stage1("films")
    for command, kind, changes in ((stage1, Stage1Config, {}), (stage2, Stage2Config, {"sources": ["nouns", "films"]})):
        trainer = TrainerConfig(accelerator="cpu", max_epochs=5, enable_progress_bar=False)
        optim = OptimConfig(lr=2e-2, patience=None)
        config: Any = kind(**bench.settings("nouns", trainer=trainer, optim=optim, **changes))
        config.name = config.default_name()
        run = bench.run(str(command.__name__).rpartition(".")[2], config)
        bench.result = record(run, lambda: command.main.__wrapped__(config, run))  # noqa: B023
        bench.result["directory"] = run.directory
    return bench


def test_a_trained_tagger_is_stored_and_evaluated(trained: Bench) -> None:
    manifest = read_manifest(FUSED, trained.folder / "store")
    assert manifest.head.pooling == "words" and manifest.head.outputs == 4
    assert set(manifest.metrics["validation"]) == set(METRICS)
    assert (manifest.metrics["validation"]["entity_f1"] or 0.0) > 0.9
    found = trained.evaluate(FUSED, split="validation")
    assert found["metrics"]["validation"] == pytest.approx(manifest.metrics["validation"])
    assert found["rows"] == 24  # sentences, whatever their windows
    assert set(trained.evaluate(FUSED, split="test")["metrics"]["test"]) == set(METRICS)


def test_predictions_are_per_sentence(trained: Bench) -> None:
    seen = json.loads((trained.result["directory"] / OUTCOMES).read_text())["validation"]
    lines = (trained.folder / "data" / "nouns" / "validation.conll").read_text().split("\n\n")
    expected = [[TAGS.index(line.split()[1]) for line in one.splitlines()] for one in lines]
    assert max(map(len, expected)) > 14, "some sentence is in windows"
    assert seen["labels"] == expected
    assert [len(row) for row in seen["predicted"]] == [len(row) for row in expected]


def test_a_prediction_for_each_word(trained: Bench) -> None:
    sentences = [["The", "cat"], [], ["film", "\u200b", "\U0001f600", "dog"], ["is", "dog"] * 300, ["New York"]]
    rows = [{"tokens": words} for words in sentences]
    lines = trained.predict(FUSED, rows, attention=True)
    for line, words in zip(lines, sentences, strict=True):
        assert set(line) == {"labels", "scores", "attention"}
        assert len(line["labels"]) == len(line["scores"]) == len(words)
        assert set(line["labels"]) <= set(TAGS) and all(0 < score <= 1 for score in line["scores"])
    assert lines[0]["labels"] == ["B-PET", "I-PET"]
    assert lines[3]["labels"].count("B-PET") > 290
    # In batches of one sentence each it is the same.
    alone = [trained.predict(FUSED, [row])[0] for row in rows[:3]]
    assert [one["labels"] for one in alone] == [one["labels"] for one in lines[:3]]


def test_it_is_inspected_ranked_and_reported(trained: Bench) -> None:
    _, seen = trained.inspect(FUSED, words=4)
    assert seen["metrics"] == pytest.approx(trained.result["metrics"]["validation"])
    assert set(seen["masked"]["films"]) == {"metrics", "loss", "predicted"} and len(seen["words"]) == 4
    assert all(isinstance(word["right"], bool) for word in seen["words"])
    with pytest.raises(UserError, match="logme and probe need one vector per text"):
        trained.rank("nouns", sources=["nouns", "films"])
    ranked = trained.rank("nouns", sources=["nouns", "films"], methods=["similarity"], rows=16)
    assert all(isinstance(one["scores"]["similarity"], float) for one in ranked["sources"])

    made, page = trained.report(files=False)
    assert made["targets"] == ["nouns"] and made["notes"] == []
    assert "entity_f1" in page


def test_with_another_kind_of_task(trained: Bench) -> None:
    result = trained.multitask("films", "nouns")
    assert result["metrics"]["nouns/validation"].keys() == set(METRICS)
    assert result["metrics"]["nouns/validation"]["token_accuracy"] > 0.5
    manifest = read_manifest(result["name"], trained.folder / "store")
    assert manifest.multitask is not None
    assert {n: one.head.pooling for n, one in manifest.multitask.items()} == {"films": "mean", "nouns": "words"}
    found = trained.evaluate(result["name"], task=trained.tasks["nouns"], split="validation")
    assert found["metrics"]["validation"] == pytest.approx(result["metrics"]["nouns/validation"])


def test_cached_features_train_the_same(trained: Bench) -> None:
    """States of tokens are kept by sequence, also of the windows; so are predictions in padded batches."""
    found = {}
    for cache in ("off", "float32"):
        backbone = BackboneConfig(name_or_path=str(trained.backbone), pooling="mean", cache=cache)
        adapter = AdapterConfig(layers=[2])
        result = trained.stage1("nouns", backbone=backbone, name=f"cached-{cache}", adapter=adapter)
        found[cache] = result["metrics"]["validation"]
    assert found["off"] == pytest.approx(found["float32"])


@pytest.mark.slow
def test_a_validation_split_made_of_the_training_sentences(trained: Bench) -> None:
    source = trained.folder / "data" / "nouns" / "train.conll"
    target = trained.folder / "half" / "nouns" / "train.conll"
    target.parent.mkdir(parents=True)
    target.write_text(source.read_text())
    data = DataConfig(
        dir=str(trained.folder / "half"),
        batch_size=8,
        max_length=16,
        cache_dir=str(trained.folder / "cache"),
        split=SplitConfig(validation=0.2),
    )
    result = trained.stage1("nouns", data=data, name="made")
    assert result["metrics"]["validation"]["token_accuracy"] > 0.5


def test_the_loss_of_two_processes_is_that_of_one(trained: Bench) -> None:
    """Words count alike over all processes, however many of them each one has."""
    task = trained.tasks["nouns"]
    kind, data = kind_of(task), trained.data
    encoded = encode(load_rows(task, data, "train"), load_tokenizer(str(trained.backbone)), 16, trained.data.cache_dir)
    assert encoded.labels is not None
    encoded.loss_weights = kind.loss_weights(encoded.labels, None)
    rows = torch.arange(7).numpy()
    torch.manual_seed(0)
    scores = torch.randn(7, encoded.labels.shape[1], len(TAGS))
    whole = encoded.batch(rows.tolist())
    parts = [encoded.batch(rows[rank::2].tolist(), global_indices=rows) for rank in range(2)]
    assert {part.global_weight for part in parts} == {whole.global_weight}
    assert whole.labels is not None and whole.global_weight == float((whole.labels >= 0).sum())

    def total(batch: Any) -> torch.Tensor:
        own = scores[batch.rows, : batch.labels.shape[1]]
        return kind.loss(own, batch.labels).sum() / batch.global_weight

    torch.testing.assert_close(sum(map(total, parts)), total(whole))
    every = scores[:, : whole.labels.shape[1]]
    torch.testing.assert_close(total(whole), kind.mean_loss(every, whole.labels))
