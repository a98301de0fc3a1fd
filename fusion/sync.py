"""Upload offline W&B runs and link them to their input and output artifacts."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fusion.cli.console import read_arguments, run_program, say
from fusion.errors import UserError
from fusion.files import read_json, resolve_path
from fusion.locks import is_locked, run_lock_file
from fusion.reporting.reading import read_mapping
from fusion.runs.run import CONFIG, STATUS
from fusion.tracking import offline
from fusion.tracking.wandb_run import relative

USAGE = """\
python -m fusion.sync [runs=DIR] [seconds=N]

    runs=DIR      directory to search recursively for offline runs (default: outputs)
    seconds=N     timeout for the upload of each run (default: 120)

Uploads each offline run with `wandb sync` and links it to its input and output artifacts. The parts of an interrupted
and resumed run become one run. Runs that are already uploaded or still being trained are skipped.

Exit codes: 0 done, 1 a run could not be uploaded or linked, 2 no key, no server or an invalid command, 130 interrupted.
"""
ALIVE_SECONDS = 120.0  # a run without a lock is active if it was written within this time


def main(words: Sequence[str] | None = None) -> int:
    return run_program(words, USAGE, work)


def work(words: Sequence[str]) -> int:
    _, values = read_arguments(words, {"runs": "DIR", "seconds": "600"}, (0, 0), "runs=DIR, seconds=N")
    seconds = values.get("seconds", "120")
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", seconds) or float(seconds) <= 0:
        raise UserError(f"seconds={seconds}: expected a number above 0, such as seconds=600")
    folder = resolve_path(values.get("runs", "outputs"), "runs")
    if not folder.is_dir():
        raise UserError(f"{folder}: directory not found; expected runs=DIR with a directory of runs")
    return sync(folder, float(seconds))


def sync(folder: Path, seconds: float) -> int:
    """Upload and link all offline runs below `folder`, printing a line for each. Returns 1 if one failed, else 0."""
    runs = offline.find_offline(folder)
    failed = checked = False
    for number, run in enumerate(runs, 1):
        where, done = relative(run), []
        try:
            if _alive(run):
                say(f"{where}: skipped, still being written")
                continue
            if offline.is_uploaded(run) and offline.open_links(run) is None:
                say(f"{where}: already uploaded")
                continue
            if failed or not checked:  # after a failure, check that the server is still reachable
                offline.check_connection()
                checked = True
            if not offline.is_uploaded(run):
                limit = f"run {number} of {len(runs)} (at most {seconds:g} s)"
                say(f"{where}: uploading, {limit}", sys.stderr, flush=True)
                offline.upload(run, seconds)
                done.append("uploaded")
            linked, missing = offline.link_uploaded(run)
            done += [f"linked to {', '.join(linked)}"] if linked else []
            done += [f"not linked to {', '.join(missing)}, which W&B does not have"] if missing else []
            say(f"{where}: {'; '.join(done)}", flush=True)
        except offline.SyncError as error:
            failed = True
            say(f"{where}: {error}", flush=True)
        except (offline.ServerError, UserError) as error:
            if isinstance(error, UserError) and not checked:
                raise
            say(str(error), flush=True)
            return 1
    if not runs:
        say(f"{folder}: no offline runs")
    return int(failed)


def _alive(piece: Path) -> bool:
    """Return whether a job is still writing to its run; a partially uploaded run would be treated as complete."""
    job = piece.parent.parent
    if read_json(job / STATUS).get("status") != "running":
        return False
    with contextlib.suppress(UserError):
        config = read_mapping(job / CONFIG)
        store = Path(config["store"])  # relative to the working directory of the job
        if "resume" in config and store.is_dir():
            return is_locked(run_lock_file(store, str(config["name"])))  # released when the process exits
    written = max((file.stat().st_mtime for file in piece.glob("*.wandb")), default=0.0)
    return time.time() - written < ALIVE_SECONDS


if __name__ == "__main__":
    sys.exit(main())
