"""`kind: multi_label` through all commands on a tiny backbone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest

from fusion import stage1, stage2
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.runs.run import OUTCOMES, record
from fusion.store.lookup import read_manifest
from tests.bench import Bench, write_rows
from tests.tiny_backbone import WORDS

NAMES = ["good", "bad", "great"]


def moods_row(draw: random.Random) -> dict[str, Any]:
    own = [name for name in NAMES if draw.random() < 0.4]
    words = [*draw.choices(WORDS[:8], k=4), *own]
    draw.shuffle(words)
    return {"text": " ".join(words), "moods": own}


def moods_task() -> TaskConfig:
    metrics = ["micro_f1", "macro_f1", "subset_accuracy"]
    return TaskConfig(name="moods", kind="multi_label", text="text", label="moods", labels=NAMES, metrics=metrics)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("moods") / "a folder", tiny_backbone)
    draw = random.Random(0)
    counts = {"train": 48, "validation": 24, "test": 12}
    rows = {split: [moods_row(draw) for _ in range(count)] for split, count in counts.items()}
    write_rows(bench.folder / "data" / "moods", rows)
    bench.tasks["moods"] = moods_task()
    bench.stage1("films")
    for command, kind, changes in ((stage1, Stage1Config, {}), (stage2, Stage2Config, {"sources": ["moods", "films"]})):
        config: Any = kind(**bench.settings("moods", **changes))
        config.name = config.default_name()
        run = bench.run(str(command.__name__).rpartition(".")[2], config)
        bench.result = record(run, lambda: command.main.__wrapped__(config, run))  # noqa: B023
        bench.result["directory"] = run.directory
    return bench


FUSED = "moods-adapterfusion"


def test_the_threshold_is_stored_and_used(trained: Bench) -> None:
    manifest = read_manifest(FUSED, trained.folder / "store")
    assert set(manifest.content["head"]) == {"pooling", "layers", "outputs", "dropout", "decision"}
    assert manifest.head.outputs == 3 and 0 < manifest.head.decision["threshold"] < 1
    assert (manifest.metrics["validation"]["micro_f1"] or 0.0) > 0.5
    found = trained.evaluate(FUSED, split="validation")["metrics"]["validation"]
    assert found == pytest.approx(manifest.metrics["validation"])
    assert set(trained.evaluate(FUSED, split="test")["metrics"]["test"]) == set(found)

    path = trained.folder / "store" / FUSED / "manifest.json"
    text = path.read_text()
    from fusion.store.manifest import checksum_of

    values = json.loads(text)
    values["head"]["decision"]["threshold"] = 0.0
    try:
        path.write_text(json.dumps(values | {"checksum": checksum_of(values)}))
        (line,) = trained.predict(FUSED, [{"text": "a film"}])
        assert line["labels"] == NAMES, "with a threshold of 0 every label is predicted"
        for wrong in ({"threshold": "high"}, [0.5], {"threshold": True}):
            values["head"]["decision"] = wrong
            path.write_text(json.dumps(values | {"checksum": checksum_of(values)}))
            with pytest.raises(UserError, match=r"head\.decision"):
                read_manifest(FUSED, trained.folder / "store")
    finally:
        path.write_text(text)


def test_predictions_are_ids_per_example(trained: Bench) -> None:
    seen = json.loads((trained.result["directory"] / OUTCOMES).read_text())["validation"]
    rows = (trained.folder / "data" / "moods" / "validation.jsonl").read_text().splitlines()
    assert seen["labels"] == [[NAMES.index(name) for name in json.loads(row)["moods"]] for row in rows]
    assert len(seen["predicted"]) == 24 and all(set(ids) <= {0, 1, 2} for ids in seen["predicted"])


def test_predictions_are_names_and_probabilities(trained: Bench) -> None:
    threshold = read_manifest(FUSED, trained.folder / "store").head.decision["threshold"]
    lines = trained.predict(FUSED, [{"text": "a good great film"}, {"text": "a dog"}], attention=True)
    for line in lines:
        assert set(line) == {"labels", "scores", "attention"} and list(line["scores"]) == NAMES
        assert line["labels"] == [name for name, p in line["scores"].items() if p >= threshold]


def test_it_is_inspected_ranked_and_reported(trained: Bench) -> None:
    _, seen = trained.inspect(FUSED, words=4)
    assert seen["metrics"] == pytest.approx(trained.result["metrics"]["validation"])
    assert set(seen["masked"]["films"]) == {"metrics", "loss", "predicted"} and len(seen["words"]) == 4
    assert all(isinstance(word["right"], bool) for word in seen["words"])

    ranked = trained.rank("moods", sources=["moods", "films"], methods=["logme", "probe"])
    assert all(isinstance(one["scores"][method], float) for one in ranked["sources"] for method in ("logme", "probe"))

    made, page = trained.report(files=True)
    assert made["targets"] == ["moods"] and made["notes"] == []
    assert "micro_f1" in page


def test_with_another_kind_each_head_has_its_own_threshold(trained: Bench) -> None:
    result = trained.multitask("films", "moods")
    assert result["metrics"]["moods/validation"].keys() == {"micro_f1", "macro_f1", "subset_accuracy"}
    manifest = read_manifest(result["name"], trained.folder / "store")
    assert manifest.multitask is not None
    heads = {name: one.head.decision for name, one in manifest.multitask.items()}
    assert heads["films"] == {} and heads["moods"].keys() == {"threshold"}
    found = trained.evaluate(result["name"], task=trained.tasks["moods"], split="validation")
    assert found["metrics"]["validation"] == pytest.approx(result["metrics"]["moods/validation"])


def test_a_checkpoint_keeps_the_threshold_of_the_best_epoch(tmp_path: Path) -> None:
    import torch

    from fusion.training.callbacks import Best
    from fusion.training.predictions import RowPredictions

    best, nothing = Best("validation/micro_f1", None), cast(Any, None)
    best.weights = {"w": torch.ones(2)}
    best.predicted = {"validation": RowPredictions([0, 1], [[0, 2], []], [[0], []])}
    best.decisions = {"moods": {"threshold": 0.25}}
    checkpoint: dict[str, Any] = {}
    best.on_save_checkpoint(nothing, nothing, checkpoint)
    torch.save(checkpoint, tmp_path / "c.pt")
    resumed = Best("validation/micro_f1", None)
    resumed.on_load_checkpoint(nothing, nothing, torch.load(tmp_path / "c.pt", weights_only=True))
    assert (resumed.predicted, resumed.decisions) == (best.predicted, best.decisions)
