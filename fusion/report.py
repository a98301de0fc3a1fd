"""Create an HTML report of many runs: results by target and method, source attention, training curves and cost."""

from __future__ import annotations

import contextlib
import logging
import shlex
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fusion.cli.app import command
from fusion.cli.console import say
from fusion.config.commands import InspectConfig, ReportConfig
from fusion.config.data import LimitConfig
from fusion.errors import UserError
from fusion.files import check_writable, write_json
from fusion.runs.run import INSPECTION, Run

if TYPE_CHECKING:
    from fusion.reporting.reading import Found
    from fusion.reporting.targets import Target

log = logging.getLogger(__name__)


def check(config: ReportConfig, run: Run) -> None:
    for folder in config.folders:
        if not folder.is_dir():
            raise UserError(f"runs={folder}: no such folder; expected a folder of runs, such as runs=outputs")
    if config.path.is_dir():
        raise UserError(f"output={config.path}: is a folder; expected a file, such as output=report.html")
    check_writable(str(config.path.parent), "output")


@command("report", ReportConfig, check=check)
def main(config: ReportConfig, run: Run) -> dict[str, Any]:
    from fusion.reporting.contents import Contents
    from fusion.reporting.page import write_files, write_page
    from fusion.reporting.reading import read_runs
    from fusion.reporting.targets import targets_of

    found = read_runs(config.folders, without=run.directory)
    targets = targets_of(found, config.split)
    if config.split is not None and not targets:
        raise UserError(
            f"split={config.split}: no run was evaluated on this split; omit split= to select a split automatically"
        )
    notes = inspect_missing(config, found, targets) if config.inspect else []
    contents = Contents(found, targets, notes)
    config.path.parent.mkdir(parents=True, exist_ok=True)
    files = config.path.with_name(f"{config.path.stem}-files") if config.files else None
    written = [] if files is None else write_files(contents, files)
    about = {
        "runs": ", ".join(map(str, config.folders)),
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "command": shlex.join(["python", "-m", "fusion.report", *run.overrides]),
    }
    size = write_page(contents, config.path, about, files)
    for line in found.unread:
        log.warning("omitted: %s", line)
    say(f"{config.path}: {len(targets)} target{'s' * (len(targets) != 1)}, {len(found.done)} runs, {size:,} bytes")
    return {
        "report": str(config.path),
        "bytes": size,
        "files": [str(path) for path in written],
        "runs": len(found.done),
        "unread": found.unread,
        "targets": [target.label for target in targets],
        "notes": notes,
    }


def inspect_missing(config: ReportConfig, found: Found, targets: list[Target]) -> list[str]:
    """Inspect the first run of each fusion without an inspection, store it for later reports, and return the errors."""
    fusions = [[one for one in group.trained if one.attends] for t in targets for group in t.groups.values()]
    unseen = [of[0] for of in fusions if of and not any(one.hash in found.inspections for one in of)]
    notes: list[str] = []
    for number, one in enumerate(unseen, start=1):
        from fusion.analysis.inspection import inspect

        log.info("inspecting %s, %d of %d (disable with inspect=false)", one.name, number, len(unseen))
        settings = InspectConfig(
            artifact=one.artifact,
            data=replace(config.data, limit=LimitConfig(validation=config.inspect_rows, test=config.inspect_rows)),
            accelerator=config.accelerator,
            words=config.words,
        )
        try:
            seen = inspect(settings)
        except Exception as error:  # the report is still written
            if not isinstance(error, UserError):
                log.exception("%s", one.name)
            reason = " ".join(str(error).split()) or type(error).__name__
            notes.append(f"{one.name} could not be inspected: {reason}")
            log.warning("%s", notes[-1])
            continue
        found.inspections[seen["hash"]] = seen
        folder = config.folders[0] / "inspections" / f"{one.name}-{seen['hash'][:8]}"
        with contextlib.suppress(OSError):  # the folder may be read-only
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / INSPECTION, seen)
    return notes


if __name__ == "__main__":
    main()
