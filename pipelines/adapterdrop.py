"""AdapterDrop (Rücklé et al. 2021): measure scores and inference speed with the adapters of the first layers dropped.

    python -m pipelines.adapterdrop tasks=[sst2,mr,subj] seeds=[1,2,3] backbone=minilm data_dir=../shared/data

For each task and seed, two adapters are trained on the same examples in the same order for the same number of steps: a
plain one, and one with `adapter.drop=robust`, for which each batch skips a random number of the first layers. Both are
evaluated with 0, 1, 2, … layers dropped. Inference is timed with and without the first half of the layers dropped, for
one task and for multi-task inference (`fusion.model.inference`). Artifacts that already exist are not retrained.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from fusion.cli.console import show_table
from fusion.config.fields import integer, number
from pipelines.commands import SeedsConfig, distinct, run_workflow, say
from pipelines.timing import rounds, validation_rows

KINDS = {"plain": "null", "robust": "robust"}  # values of adapter.drop


@dataclass
class DropConfig(SeedsConfig):
    tasks: list[str] = distinct(["sst2", "mr", "subj"])
    rows: int = integer(2000, 1)  # training examples of each task
    epochs: int = integer(3, 1)
    rate: float = number(5e-4, "> 0")
    at_once: int = integer(8, 1)  # tasks in one multi-task pass
    rounds: int = integer(7, 1)  # timing rounds
    batch_size: int = integer(32, 1)
    output: str = "outputs/adapterdrop"


def name_of(task: str, kind: str, seed: int) -> str:
    return f"{task}-{kind}-seed-{seed}"


def train(config: DropConfig) -> None:
    budget = [f"data.limit.train={config.rows}", f"optim.lr={config.rate}"]
    budget += ["optim.patience=null", f"trainer.max_epochs={config.epochs}"]
    for kind, drop in KINDS.items():
        say(f"\n{kind} adapters of {', '.join(config.tasks)}, seeds {','.join(map(str, config.seeds))}")
        for task in config.tasks:
            folder = f"{task}-{kind}"
            config.sweep("fusion.stage1", folder, [f"+task={task}", f"adapter.drop={drop}", *budget], name=folder)


def scores_by_drop(config: DropConfig, name: str) -> list[float]:
    """Return the task's main metric on its validation split with 0, 1, …, all layers dropped."""
    from fusion.config.data import DataConfig
    from fusion.model.build import backbone_of, stored_model
    from fusion.model.inference import device_of, predict
    from fusion.store.artifacts import load
    from fusion.training.predictions import score

    artifact = load(name, config.store)
    backbone = backbone_of(artifact.manifest)
    data = DataConfig(dir=config.data_dir, batch_size=config.batch_size)
    task, _, rows = validation_rows(artifact.manifest, str(artifact.manifest.task.name), data, backbone)
    model, device = stored_model(artifact, config.store, backbone), device_of("auto")
    found = []
    for first_layer in range(backbone.layers + 1):
        predictions = predict(model, rows, data, device, first_layer=first_layer)
        found.append(score(task, predictions.scores, rows.labels)[task.metrics[0]])
    return found


def timings(config: DropConfig) -> dict[str, Any]:
    """Time single- and multi-task inference with and without half of the layers dropped: seconds per batch by round."""
    import torch

    from fusion.backbones.forward import last_hidden_states
    from fusion.backbones.slots import SlotAddress
    from fusion.config.data import DataConfig
    from fusion.data.loaders import evaluation_loader
    from fusion.layers.heads import TaskHead
    from fusion.model.build import backbone_of, stored_adapters, stored_model
    from fusion.model.inference import MultiTaskModel
    from fusion.runs.memory import keep_freed_memory
    from fusion.store.artifacts import load

    keep_freed_memory()
    names = [name_of(task, "plain", seed) for seed in config.seeds for task in config.tasks]
    artifacts = [load(names[number % len(names)], config.store) for number in range(config.at_once)]
    one = artifacts[0]
    backbone, data = backbone_of(one.manifest), DataConfig(dir=config.data_dir)
    rows = validation_rows(one.manifest, str(one.manifest.task.name), data, backbone)[2]
    batches = list(evaluation_loader(rows, config.batch_size))[:8]
    half, plain = backbone.layers // 2, backbone.model.eval()

    def multi_task(first_layer: int) -> Callable[..., Any]:
        adapters = [
            {s: a for s, a in stored_adapters(artifact).items() if SlotAddress.parse(s).layer >= first_layer}
            for artifact in artifacts
        ]
        heads = [TaskHead(backbone.hidden_size, **artifact.manifest.head.shape) for artifact in artifacts]
        return MultiTaskModel(backbone.copy(), adapters, one.manifest.placement["adapter.reads"], heads)

    def run(model: Callable[..., Any], batches: Any) -> None:
        for batch in batches:
            model(batch.input_ids, batch.attention_mask, batch.token_type_ids)

    models: dict[str, Callable[..., Any]] = {
        "backbone": partial(last_hidden_states, plain, backbone.family),
        "one, none dropped": stored_model(one, config.store, backbone.copy()),
        "one, half dropped": stored_model(one, config.store, backbone.copy(), half),
        "several, none dropped": multi_task(0),
        "several, half dropped": multi_task(half),
    }
    runs = {name: partial(run, model) for name, model in models.items()}
    with torch.inference_mode():
        timed = rounds(runs, [batches], config.rounds)
    seconds = {name: [value / len(batches) for value in values] for name, values in timed.items()}
    gain = {}
    for count in ("one", "several"):
        whole, dropped = seconds[f"{count}, none dropped"], seconds[f"{count}, half dropped"]
        gain[count] = [n / h for n, h in zip(whole, dropped, strict=True)]
    return {"half": half, "layers": backbone.layers, "tasks": config.at_once, "seconds": seconds, "gain": gain}


def summary(scores: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Average over tasks and seeds for each number of dropped layers: scores, and scores relative to no dropping.

    Also returns the mean difference of the relative scores, robust - plain, and its standard error.

    Args:
        scores: scores by kind, artifact and number of dropped layers; the artifacts of both kinds have the same order.
    """
    values = {kind: np.array(list(of.values())) for kind, of in scores.items()}  # (artifacts, levels)
    kept = {kind: own / np.where(own[:, :1] == 0, math.nan, own[:, :1]) for kind, own in values.items()}
    differences = kept["robust"] - kept["plain"]
    count, levels = differences.shape
    return {
        "score": {kind: own.mean(0).tolist() for kind, own in values.items()},
        "kept": {kind: own.mean(0).tolist() for kind, own in kept.items()},
        "difference": differences.mean(0).tolist(),
        "standard_error": (differences.std(0, ddof=1) / count**0.5).tolist() if count > 1 else [None] * levels,
    }


def report(found: dict[str, Any], timed: dict[str, Any]) -> None:
    say("")
    rows = [["layers dropped", "plain", "relative", "robust", "relative", "relative, robust - plain"]]
    for level, difference in enumerate(found["difference"]):
        row = [str(level)]
        for kind in KINDS:
            row += [f"{found['score'][kind][level]:.3f}", f"{found['kept'][kind][level]:.1%}"]
        error = found["standard_error"][level]
        rows.append([*row, f"{difference:+.3f}{'' if error is None else f' ± {error:.3f}'}"])
    show_table(rows)
    for count, title in (("one", "one task"), ("several", f"{timed['tasks']} tasks in parallel")):
        gains = timed["gain"][count]
        say(
            f"inference, {title}, the first {timed['half']} of {timed['layers']} layers dropped: "
            f"{median(gains):.2f} times as fast ({min(gains):.2f} to {max(gains):.2f})"
        )


def work(config: DropConfig) -> None:
    train(config)
    scores: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        names = [name_of(task, kind, seed) for task in config.tasks for seed in config.seeds]
        scores[kind] = {name: scores_by_drop(config, name) for name in names}
    found, timed = summary(scores), timings(config)
    report(found, timed)
    config.save("results", scores=scores, summary=found, timings=timed)


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(DropConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
