"""AdapterDrop (Rücklé et al. 2021): what is lost and what is gained where the first layers go without adapters.

    python -m pipelines.adapterdrop tasks=[sst2,mr,subj] seeds=[1,2,3] backbone=minilm data_dir=../shared/data

For each task and seed two adapters learn from the same rows in the same order and number of steps: a plain one,
and one with `adapter.drop=robust`, where each batch leaves out a random number of the first layers. Both are
then scored with 0, 1, 2 … layers dropped. Then inference is timed, the first half of the layers dropped against
none, for one task and for several at once (`fusion.model.multi_task`). What is stored already is not trained again.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.runs.signals import exit_code
from pipelines.commands import call, read_config, say

if TYPE_CHECKING:
    from fusion.backbones.load import Backbone
    from fusion.config.task import TaskConfig
    from fusion.data.encode import EncodedRows
    from fusion.store.artifacts import Artifact

KINDS = {"plain": None, "robust": "robust"}


@dataclass
class DropConfig:
    tasks: list[str] = field(default_factory=lambda: ["sst2", "mr", "subj"])
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    backbone: str = "minilm"
    data_dir: str | None = None
    rows: int = 2000  # of each task's training rows
    epochs: int = 3
    rate: float = 5e-4
    at_once: int = 8  # tasks whose adapters are run in one pass
    rounds: int = 7  # how often each is timed, in turn
    batch_size: int = 32
    output: str = "outputs/adapterdrop"

    def __post_init__(self) -> None:
        for key in ("tasks", "seeds"):
            values = getattr(self, key)
            if not values or len(set(values)) != len(values):
                raise UserError(f"{key}={values}: expected one or more, each once")
        for key in ("rows", "epochs", "at_once", "rounds", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: expected at least 1")

    @property
    def store(self) -> Path:
        return Path(self.output) / "store"


def name_of(task: str, kind: str, seed: int) -> str:
    return f"{task}-{kind}-seed-{seed}"


def train(config: DropConfig) -> None:
    """All trainings, as the project's own command; what is stored already is skipped."""
    seeds = ",".join(map(str, config.seeds))
    for kind, drop in KINDS.items():
        say(f"\n{kind} adapters of {', '.join(config.tasks)}, seeds {seeds}")
        for task in config.tasks:
            overrides = [
                "-m",
                f"+task={task}",
                f"seed={seeds}",
                f"adapter.drop={drop or 'null'}",
                f"backbone={config.backbone}",
                f"data.limit.train={config.rows}",
                f"optim.lr={config.rate}",
                "optim.patience=null",
                f"trainer.max_epochs={config.epochs}",
                f"store={config.store}",
                "logger=csv",
                f"name={task}-{kind}-seed-${{seed}}",
                f"hydra.sweep.dir={config.output}/runs/{task}-{kind}",
            ]
            if config.data_dir:
                overrides.append(f"data.dir={config.data_dir}")
            call("fusion.stage1", overrides)


def scores_by_drop(config: DropConfig, name: str) -> list[float]:
    """The task's first metric on its validation rows, with 0, 1, … all layers dropped."""
    from fusion.model.build import stored_model
    from fusion.model.inference import device_of, predict
    from fusion.store.artifacts import load
    from fusion.training.metrics import score

    artifact = load(name, config.store)
    task, rows = _validation(config, artifact)
    backbone = _backbone(artifact)
    model = stored_model(artifact, config.store, backbone)
    found = []
    for first_layer in range(backbone.layers + 1):
        predictions = predict(model, rows, config.batch_size, device_of("auto"), first_layer=first_layer)
        found.append(score(task, predictions.scores, rows.labels)[task.metrics[0]])
    return found


def _backbone(artifact: Artifact) -> Backbone:
    """One of its own, without slots: a model changes it in place."""
    from fusion.backbones.load import load_backbone

    return load_backbone(artifact.manifest.backbone.name_or_path)


def _validation(config: DropConfig, artifact: Artifact) -> tuple[TaskConfig, EncodedRows]:
    """The artifact's task, and the rows of its first validation split."""
    from fusion.backbones.files import locate
    from fusion.config.data import DataConfig
    from fusion.data.encode import encode
    from fusion.data.rows import load_rows
    from fusion.data.splits import evaluation_splits
    from fusion.hub.tokenizer import load_tokenizer
    from fusion.store.trained_data import as_trained

    manifest = artifact.manifest
    task = manifest.task.as_config(manifest.name)
    data = as_trained(manifest, DataConfig(dir=config.data_dir), task.name)
    rows = load_rows(task, data, evaluation_splits(task, "validation", data)[0])
    tokenizer = load_tokenizer(locate(manifest.backbone.name_or_path))
    return task, encode(rows, tokenizer, manifest.data.max_length, None)


def timings(config: DropConfig) -> dict[str, Any]:
    """Seconds of a batch in turn, round by round: the first half dropped and none dropped, one task and several."""
    import torch

    from fusion.backbones.slots import SlotAddress
    from fusion.data.loaders import evaluation_loader
    from fusion.layers.heads import TaskHead
    from fusion.model.build import stored_adapters, stored_model
    from fusion.model.multi_task import MultiTaskModel
    from fusion.runs.memory import keep_freed_memory
    from fusion.store.artifacts import load

    keep_freed_memory()
    names = [name_of(task, "plain", seed) for seed in config.seeds for task in config.tasks]
    chosen = [load(names[number % len(names)], config.store) for number in range(config.at_once)]
    _, rows = _validation(config, chosen[0])
    backbone = _backbone(chosen[0])
    half = backbone.layers // 2
    batches = list(evaluation_loader(rows, config.batch_size))[:8]

    def several(first_layer: int) -> Callable[..., Any]:
        own = [
            {s: a for s, a in stored_adapters(artifact).items() if SlotAddress.parse(s).layer >= first_layer}
            for artifact in chosen
        ]
        heads = [TaskHead(backbone.hidden_size, **artifact.manifest.head.shape) for artifact in chosen]
        return MultiTaskModel(_backbone(chosen[0]), own, chosen[0].manifest.placement["adapter.reads"], heads)

    plain = backbone.model.eval()
    measured: dict[str, Callable[..., Any]] = {
        "backbone": lambda ids, mask, types: plain(ids, attention_mask=mask, token_type_ids=types),
        "one, none dropped": stored_model(chosen[0], config.store, _backbone(chosen[0])),
        "one, half dropped": stored_model(chosen[0], config.store, _backbone(chosen[0]), half),
        "several, none dropped": several(0),
        "several, half dropped": several(half),
    }
    seconds: dict[str, list[float]] = {what: [] for what in measured}
    with torch.inference_mode():
        for number in range(config.rounds + 1):  # the first warms up
            for what, run in measured.items():
                started = time.perf_counter()
                for batch in batches:
                    run(batch.input_ids, batch.attention_mask, batch.token_type_ids)
                if number:
                    seconds[what].append((time.perf_counter() - started) / len(batches))
    gain = {
        count: [
            n / h
            for n, h in zip(seconds[f"{count}, none dropped"], seconds[f"{count}, half dropped"], strict=True)
        ]
        for count in ("one", "several")
    }
    return {
        "half": half,
        "layers": backbone.layers,
        "tasks": config.at_once,
        "seconds": seconds,
        "gain": gain,
    }


def summary(scores: dict[str, dict[str, list[float]]], config: DropConfig) -> dict[str, Any]:
    """For each kind and number of dropped layers: mean score over tasks and seeds, and what is kept of it.

    Args:
        scores: by kind and artifact, a score for each number of dropped layers.

    Returns:
        `score`: kind -> means; `kept`: kind -> mean share of the artifact's own score without dropping;
        `difference`: of the kept shares, robust - plain, by number of dropped layers, with its standard error.
    """
    kept = {
        kind: {
            name: [value / own[0] if own[0] else math.nan for value in own] for name, own in artifacts.items()
        }
        for kind, artifacts in scores.items()
    }
    pairs = [(name_of(t, "plain", s), name_of(t, "robust", s)) for t in config.tasks for s in config.seeds]
    levels = range(len(next(iter(scores["plain"].values()))))
    differences = [[kept["robust"][r][n] - kept["plain"][p][n] for p, r in pairs] for n in levels]
    return {
        "score": {
            k: [statistics.fmean(column) for column in zip(*v.values(), strict=True)]
            for k, v in scores.items()
        },
        "kept": {
            k: [statistics.fmean(column) for column in zip(*v.values(), strict=True)] for k, v in kept.items()
        },
        "difference": [statistics.fmean(values) for values in differences],
        "standard_error": [
            statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            for values in differences
        ],
    }


def report(found: dict[str, Any], timed: dict[str, Any]) -> None:
    say("\nlayers dropped     plain: score   kept     robust: score   kept     kept, robust - plain")
    for level, difference in enumerate(found["difference"]):
        error = found["standard_error"][level]
        say(
            f"{level:>14}            {found['score']['plain'][level]:.3f}  {found['kept']['plain'][level]:6.1%}"
            f"             {found['score']['robust'][level]:.3f}  {found['kept']['robust'][level]:6.1%}"
            f"     {difference:+.3f}{'' if error is None else f' ± {error:.3f}'}"
        )
    for count, title in (("one", "one task"), ("several", f"{timed['tasks']} tasks at once")):
        gains = timed["gain"][count]
        say(
            f"inference, {title}, the first {timed['half']} of {timed['layers']} layers dropped: "
            f"{statistics.median(gains):.2f} times as fast ({min(gains):.2f} to {max(gains):.2f})"
        )


def main(arguments: list[str]) -> int:
    try:
        config = read_config(DropConfig, arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    train(config)
    scores = {
        kind: {
            (name := name_of(task, kind, seed)): scores_by_drop(config, name)
            for task in config.tasks
            for seed in config.seeds
        }
        for kind in KINDS
    }
    found, timed = summary(scores, config), timings(config)
    report(found, timed)
    path = Path(config.output) / "results.json"
    path.write_text(
        json.dumps({"config": asdict(config), "scores": scores, "summary": found, "timings": timed}, indent=2)
        + "\n",
        encoding="utf-8",
    )
    say(f"Results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
