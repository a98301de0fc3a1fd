"""Upload the W&B runs that were tracked offline, and link the artifacts that they made and used.

python -m fusion.sync
python -m fusion.sync runs=outputs/stage2
"""

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
from fusion.runs.run import CONFIG, STATUS
from fusion.tracking import offline
from fusion.tracking.wandb_run import relative

USAGE = """\
python -m fusion.sync [runs=DIR] [seconds=N]

    runs=DIR      folder to search recursively for offline runs (default: outputs)
    seconds=N     how long to wait for the upload of each run (default: 120)

Uploads each run that is not uploaded yet with W&B's own `wandb sync`; the pieces of a run that was interrupted and
resumed become one run. Then the artifacts that it made and used are linked to it. What is done is not done again, and
a run that is still being trained is left for the next call.

Exit codes: 0 done, 1 a run could not be uploaded or linked, 2 no key, no server or a wrong command, 130 interrupted.
"""
ALIVE_SECONDS = 120.0  # a run without a lock that was written to within this time counts as running


def main(words: Sequence[str] | None = None) -> int:
    """The program; returns the exit code."""
    return run_program(words, USAGE, work)


def work(words: Sequence[str]) -> int:
    _, values = read_arguments(words, {"runs": "DIR", "seconds": "600"}, (0, 0), "runs=DIR, seconds=N")
    seconds = values.get("seconds", "120")
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", seconds) or float(seconds) <= 0:
        raise UserError(f"seconds={seconds}: expected a number above 0, such as seconds=600")
    folder = resolve_path(values.get("runs", "outputs"), "runs")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected runs=DIR, the folder of runs")
    return sync(folder, float(seconds))


def sync(folder: Path, seconds: float) -> int:
    """Upload and link all offline runs below `folder`, with a line for each; returns the exit code, 1 if one failed."""
    runs = offline.find_offline(folder)
    failed = checked = False
    for number, run in enumerate(runs, 1):
        where, done = relative(run), []
        try:
            if _alive(run):
                say(f"{where}: still being written, skipped until the next call")
                continue
            if offline.is_uploaded(run) and offline.open_links(run) is None:
                say(f"{where}: already uploaded")
                continue
            if failed or not checked:  # after a failure the server may be gone
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
    """Whether a job still writes to its run: what is uploaded of such a run would count as all of it."""
    import yaml

    job = piece.parent.parent
    if read_json(job / STATUS).get("status") != "running":
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        config = yaml.safe_load((job / CONFIG).read_text(encoding="utf-8"))
        store = Path(config["store"])  # relative to where the job was started, which may be another folder
        if "resume" in config and store.is_dir():
            return is_locked(run_lock_file(store, str(config["name"])))  # released when the process dies
    written = max((file.stat().st_mtime for file in piece.glob("*.wandb")), default=0.0)
    return time.time() - written < ALIVE_SECONDS


if __name__ == "__main__":
    sys.exit(main())
