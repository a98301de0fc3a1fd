"""Inspect a stored fusion: source attention, token-level attention and source ablation."""

from __future__ import annotations

from typing import Any

from fusion.cli.app import command
from fusion.cli.console import say
from fusion.config.commands import InspectConfig
from fusion.files import write_json
from fusion.runs.inputs import read_used
from fusion.runs.run import INSPECTION, Run
from fusion.store.compatibility import check_attends


def check(config: InspectConfig, run: Run) -> None:
    check_attends(read_used(config), f"artifact={config.artifact}", "set artifact= to a fusion")


@command("inspect", InspectConfig, check=check)
def main(config: InspectConfig, run: Run) -> dict[str, Any]:
    from fusion.analysis.inspection import inspect
    from fusion.reporting.records import ablation

    seen = inspect(config)
    write_json(run.directory / INSPECTION, seen)
    metric, full = next(iter(seen["metrics"].items()))
    say(f"{seen['name']} on {seen['task']} {seen['split']} ({seen['rows']} examples): {metric} {full:.4f}")
    slots = list(seen["attention"].values())
    by_source = zip(*(slot["mean"] for slot in slots), strict=True)
    keys = ("artifact", "name", "hash", "task", "split", "rows", "sources", "drop", "speed")
    return {key: seen[key] for key in keys} | {
        "metrics": {seen["split"]: seen["metrics"]},
        "attention": {
            source: sum(means) / len(slots) for source, means in zip(seen["sources"], by_source, strict=True)
        },
        "masked": {source: one["metrics"][metric] for source, one in seen["masked"].items()},
        "intervals": {source: [change.low, change.high] for source, change in ablation(seen, metric).items()},
        "inspection": str(run.directory / INSPECTION),
    }


if __name__ == "__main__":
    main()
