"""Upload the W&B runs that were tracked offline, and draw which artifact came from which run.

python -m fusion.sync
python -m fusion.sync runs=outputs/stage2
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from fusion.cli.console import say
from fusion.cli.program import run_program
from fusion.errors import UserError
from fusion.files import resolve_path
from fusion.runs.run import CONFIG, STATUS

USAGE = """\
python -m fusion.sync [runs=DIR] [seconds=N]

    runs=DIR      where to look for offline runs, also in the folders below (default: outputs)
    seconds=N     how long to wait for the upload of each run (default: 120)

Each run that is not uploaded yet is, by W&B's own `wandb sync`; the pieces of one that was interrupted and taken up
again become one run. Then the artifacts that it made and used are linked to it. What is done is not done again, and
a run that is still being trained waits for the next call.

Exit codes: 0 done, 1 a run could not be uploaded or linked, 2 no key, no server or a wrong command, 130 interrupted.
"""
DEFAULT_RUNS = "outputs"
ALIVE_SECONDS = 120.0  # a run of which nothing else is known and that was written to so lately still goes on


def main(words: Sequence[str] | None = None) -> int:
    """The program; gives the exit code."""
    return run_program(words, USAGE, lambda words: sync(*read_words(words)))


def read_words(words: Sequence[str]) -> tuple[Path, float | None]:
    """The folder to look in, and the seconds to wait for each upload where they are given.

    Raises:
        UserError: another word than `runs=DIR` and `seconds=N`, or no such folder.
    """
    runs: str | None = None
    seconds: float | None = None
    for word in words:
        key, equals, value = word.partition("=")
        if key == "seconds" and seconds is None:
            if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", value) or float(value) <= 0:
                raise UserError(f"seconds={value}: expected a number above 0, such as seconds=600")
            seconds = float(value)
            continue
        if key != "runs" or not equals or not value or runs is not None:
            raise UserError(f"{word}: expected runs=DIR, once (--help says more)")
        runs = value
    folder = resolve_path(runs or DEFAULT_RUNS, "runs")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; runs=DIR names where runs have left theirs")
    return folder, seconds


def sync(folder: Path, seconds: float | None = None) -> int:
    """Uploads and links all that is open below `folder`, with a line a run; gives the exit code.

    Raises:
        UserError: there is something to do, and no key or no server to do it with.
    """
    from fusion.tracking.offline import UPLOAD_SECONDS, SyncError, draw, find_offline, upload, why_not
    from fusion.tracking.tracking import no_answer

    runs = find_offline(folder)
    failed = 0
    asked = False
    seconds = UPLOAD_SECONDS if seconds is None else seconds
    for number, run in enumerate(runs, 1):
        where = _shown(run.pieces[-1])
        if any(_alive(piece) for piece in run.pieces):
            say(f"{where}: is still being written, left for the next call")
            continue
        try:
            pieces = len(run.not_uploaded)
            if not pieces and not run.links:
                say(f"{where}: nothing left to do")
                continue
            if not asked and (reason := why_not()) is not None:
                raise UserError(f"nothing can be uploaded: {reason}")
            if (not asked or failed) and (reason := no_answer()) is not None:
                say(f"nothing {'more ' if asked else ''}can be uploaded: {reason}", flush=True)
                return 1
            asked = True
            done = []
            if pieces:
                say(
                    f"{where}: uploading, run {number} of {len(runs)} (at most {seconds:g} s)",
                    sys.stderr,
                    flush=True,
                )
                upload(run, seconds)
                done.append(
                    "uploaded" if len(run.pieces) == 1 else f"uploaded, {pieces} of {len(run.pieces)} pieces"
                )
            drawn, still = draw(run)
            done += [f"linked to {', '.join(drawn)}"] if drawn else []
            done += [f"not linked to {', '.join(still)}, which W&B does not have"] if still else []
            say(f"{where}: {'; '.join(done)}", flush=True)
        except SyncError as error:
            failed += 1
            say(f"{where}: {error}", flush=True)
    if not runs:
        say(f"{folder}: no offline runs")
    return 1 if failed else 0


def _shown(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_absolute() and path.is_relative_to(here) else path


def _alive(piece: Path) -> bool:
    """Whether a job still writes to its run: what is uploaded of such a one would count as all of it."""
    import yaml

    from fusion.locks import is_locked, run_lock_file

    job = piece.parent.parent
    try:
        status = json.loads((job / STATUS).read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        status = None
    if status != "running":
        return False
    try:
        config = yaml.safe_load((job / CONFIG).read_text(encoding="utf-8"))
        store = Path(config["store"])  # where it was started, which may be another folder than here
        if "resume" in config and store.is_dir():
            return is_locked(
                run_lock_file(store, str(config["name"]))
            )  # for as long as it runs; a killed one has lost it
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        pass
    written = max((file.stat().st_mtime for file in piece.glob("*.wandb")), default=0.0)
    return time.time() - written < ALIVE_SECONDS


if __name__ == "__main__":
    sys.exit(main())
