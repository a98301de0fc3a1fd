"""Look into a stored fusion: whom it listens to, word by word, and what it loses without each source.

python -m fusion.inspect artifact=rte-adapterfusion
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusion.app import command
from fusion.config import InspectConfig
from fusion.run import Run, write_json
from fusion.store.manifest import check_attends, check_drop, check_trust, find, read_folder

INSPECTION = "inspection.json"


def check(config: InspectConfig, run: Run) -> None:
    """What can be said before a model is loaded."""
    manifest = read_folder(find(config.artifact, Path(config.store)))
    check_drop(manifest, config.drop)
    check_trust(manifest, config.backbone.trust_remote_code)
    check_attends(manifest, f"artifact={config.artifact}", "name a fusion")


@command("inspect", InspectConfig, check=check)
def main(config: InspectConfig, run: Run) -> dict[str, Any]:
    from fusion.inspection import inspect

    seen = inspect(config)
    write_json(run.directory / INSPECTION, seen)
    for line in summary(seen):
        print(line)
    return {
        **{
            key: seen[key] for key in ("artifact", "name", "hash", "task", "split", "rows", "sources", "drop")
        },
        "metrics": {seen["split"]: seen["metrics"]},
        "inspection": str(run.directory / INSPECTION),
        "speed": seen["speed"],
    }


def summary(seen: dict[str, Any]) -> list[str]:
    """For a terminal: of each source its share of the attention, and the score without it."""
    metric, full = next(iter(seen["metrics"].items()))
    rows = [("source", "attention", f"{metric} without it", "change")]
    slots = list(seen["attention"].values())
    for number, source in enumerate(seen["sources"]):
        share = sum(slot["mean"][number] for slot in slots) / len(slots)
        without = seen["masked"].get(source, {}).get("metrics", {}).get(metric)
        change = ("-", "-") if without is None else (f"{without:.4f}", f"{without - full:+.4f}")
        rows.append((source, f"{share:.3f}", *change))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{seen['name']} on {seen['task']} {seen['split']} ({seen['rows']} rows): {metric} {full:.4f}"]
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


if __name__ == "__main__":
    main()
