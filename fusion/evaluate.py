"""Scores of a stored adapter or fusion on a split of its own task, or of another with the same labels.

python -m fusion.evaluate artifact=rte-adapterfusion split=validation
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusion.app import command
from fusion.config import EvaluateConfig, TaskConfig
from fusion.errors import UserError
from fusion.run import Run
from fusion.store.manifest import Manifest, check_drop, find, read_folder


def task_of(config: EvaluateConfig, manifest: Manifest) -> TaskConfig:
    """The task to evaluate on: the config's, if the artifact's head can answer it, else the artifact's own."""
    own = TaskConfig.from_dict(manifest.task, where=f"manifest of {manifest.name}")
    asked = config.task or own
    if (asked.kind, asked.labels) != (own.kind, own.labels):
        raise UserError(
            f"{manifest.name} answers {own.kind} with labels {own.labels}, and task {asked.name} asks for "
            f"{asked.kind} with labels {asked.labels}.\nTrain for it with stage 1 or 2, or leave +task= out"
        )
    return asked


def check(config: EvaluateConfig, run: Run) -> None:
    """What can be said before a model is loaded."""
    from fusion.data.rows import check_source

    manifest = read_folder(find(config.artifact, Path(config.store)))
    check_drop(manifest, config.drop)
    check_source(task_of(config, manifest), config.data, [config.split])


@command("evaluate", EvaluateConfig, check=check)
def main(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    from fusion.backbones.load import load_backbone, locate
    from fusion.build import backbone_of, stored_model
    from fusion.data.encode import encode, load_tokenizer
    from fusion.data.rows import evaluation_splits, load_rows
    from fusion.inference import device_of, predict
    from fusion.store.artifacts import load
    from fusion.training.metrics import score

    device = device_of(config.accelerator)
    artifact = load(config.artifact, Path(config.store))
    manifest, task = artifact.manifest, task_of(config, artifact.manifest)
    name, revision = backbone_of(manifest, config.backbone)
    tokenizer = load_tokenizer(locate(name), revision)
    model = stored_model(artifact, artifact.path.parent, load_backbone(name, revision), config.drop)
    metrics: dict[str, dict[str, float]] = {}
    rows_seen, seconds, tokens = 0, 0.0, 0
    for split in evaluation_splits(task, config.split, config.data):
        rows = load_rows(task, config.data, split)
        if rows.labels is None:
            raise UserError(f"split={split}: its rows have no labels to score against; use fusion.predict")
        encoded = encode(
            rows, tokenizer, config.data.max_length or manifest.data["max_length"], config.data.cache_dir
        )
        predictions = predict(
            model, encoded, config.data.batch_size, device, tokens_per_batch=config.data.tokens_per_batch
        )
        metrics[split] = score(task, predictions.scores, encoded.labels)
        rows_seen, seconds, tokens = (
            rows_seen + len(rows),
            seconds + predictions.seconds,
            tokens + predictions.tokens,
        )
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics[split].items())
        print(f"{manifest.name} on {task.name} {split} ({len(rows)} rows): {shown}")
    return {
        "artifact": str(artifact.path),
        "name": manifest.name,
        "hash": manifest.hash,
        "kind": manifest.kind,
        "task": task.name,
        "metrics": metrics,
        "rows": rows_seen,
        "speed": {
            "seconds": seconds,
            "examples_per_second": rows_seen / seconds,
            "tokens_per_second": tokens / seconds,
        },
    }


if __name__ == "__main__":
    main()
