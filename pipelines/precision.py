"""Compare training with the frozen backbone in bfloat16 and in float32, over tasks, methods and seeds.

    python -m pipelines.precision backbone=minilm data_dir=../shared/data

In both dtypes and for each seed, a single adapter and a LoRA are trained on each task, and a fusion of the adapters of
all tasks. They differ in the dtype alone: examples, their order, initial values and dropout masks are the same. With
the default of one epoch, no checkpoint is selected. The report contains the difference of the main metric, bfloat16
minus float32, as the mean of the pairs with its 95 % confidence interval (Student's t). Existing artifacts are reused:
an interrupted run continues, and additional seeds or tasks only train the new ones.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from fusion.cli.console import show_table
from pipelines.commands import SeedsConfig, distinct, run_workflow, say
from pipelines.two_stage import compare

DTYPES = ("float32", "bfloat16")
ADAPTER, LORA, FUSION = "adapter", "lora", "fusion"
ROWS = ["data.limit.train=1500", "data.limit.validation=1000", "trainer.max_epochs=1"]


@dataclass
class PrecisionConfig(SeedsConfig):
    tasks: list[str] = distinct(["sst2", "subj", "mrpc", "stsb", "snli", "qnli"], at_least=2)
    output: str = "outputs/precision"
    overrides: list[str] = field(default_factory=ROWS.copy)
    adapter_overrides: list[str] = field(default_factory=lambda: ["optim.lr=1e-3"])
    lora_overrides: list[str] = field(default_factory=lambda: ["optim.lr=1e-3"])
    fusion_overrides: list[str] = field(default_factory=lambda: ["optim.lr=5e-4"])


def train(config: PrecisionConfig) -> None:
    tasks = ",".join(config.tasks)
    for dtype in DTYPES:
        shared = [f"+task={tasks}", *config.overrides, f"backbone.dtype={dtype}"]
        sources = ",".join(f"{task}-{ADAPTER}-{dtype}-seed-${{seed}}" for task in config.tasks)
        trained = {
            ADAPTER: ("fusion.stage1", config.adapter_overrides),
            LORA: ("fusion.stage1", ["method=lora", *config.lora_overrides]),
            FUSION: ("fusion.stage2", [f"sources=[{sources}]", *config.fusion_overrides]),
        }
        for method, (module, overrides) in trained.items():
            say(f"\n{method}, {dtype}")
            name = f"${{task.name}}-{method}-{dtype}"
            config.sweep(module, f"{method}-{dtype}", [*shared, *overrides], name=name)


def report(config: PrecisionConfig) -> dict[str, Any]:
    """Print and return the comparison of each method, by task and over all tasks."""
    found: dict[str, Any] = {}
    table = [["method", "task", *DTYPES, "difference", "95 % interval"]]
    for method in (ADAPTER, LORA, FUSION):
        scores = {
            task: [[next(iter(one.values())) for one in config.scores(f"{task}-{method}-{dtype}")] for dtype in DTYPES]
            for task in config.tasks
        }
        scores["all"] = [[value for task in config.tasks for value in scores[task][of]] for of in range(len(DTYPES))]
        for task, (exact, half) in scores.items():
            c = compare(exact, half)
            found.setdefault(method, {})[task] = {
                **dict(zip(DTYPES, (exact, half), strict=True)),
                **{key: c[key] for key in ("difference", "low", "high")},
            }
            means = [f"{fmean(values):.4f}" for values in (exact, half)]
            table.append([method, task, *means, f"{c['difference']:+.4f}", f"{c['low']:+.4f} to {c['high']:+.4f}"])
    say(f"\n{len(config.seeds)} seeds; bfloat16 minus float32, main metric of each task\n")
    show_table(table)
    return found


def work(config: PrecisionConfig) -> None:
    train(config)
    config.save("precision", methods=report(config))


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(PrecisionConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
