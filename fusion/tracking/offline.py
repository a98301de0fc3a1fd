"""Upload offline W&B runs with `wandb sync`, and link them to the artifacts that they made and used.

An interrupted and resumed run has multiple folders with one id, one per job: W&B appends each to the same run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fusion.config.training import WandbConfig
from fusion.errors import UserError, first_line
from fusion.files import write_json
from fusion.tracking.lineage import FILE, link, not_linked, read_links, staged_in
from fusion.tracking.wandb_run import FINISH_SECONDS, disable_error_reports, missing_key

CHECK_SECONDS = 5.0  # for the server to respond


class SyncError(Exception):
    """A run could not be uploaded or linked; the others may still be."""


class ServerError(Exception):
    """The server accepts connections, but does not respond or fails: no run can be uploaded."""


def find_offline(folder: Path) -> list[Path]:
    """All offline runs in `folder` and below, `.../wandb/offline-run-TIME-ID`, in order of time: sources first."""
    found = {path.parent for path in folder.rglob("*.wandb") if path.parent.name.startswith("offline-run-")}
    return sorted(found, key=lambda path: (path.name.split("-")[2], path))  # of one second: by folder


def is_uploaded(run: Path) -> bool:
    return bool(list(run.glob("*.wandb.synced")))


def open_links(run: Path) -> dict[str, Any] | None:
    """The links of a run that has something left to link.

    Raises:
        SyncError: they cannot be read.
    """
    file = run.parent / FILE
    if not file.is_file():
        return None
    try:
        links = read_links(file)
    except (OSError, ValueError) as error:
        raise SyncError(f"cannot read {file} ({first_line(error)})") from error
    return links if run.name.endswith(f"-{links['run']['id']}") and not_linked(links) else None


def check_connection() -> None:
    """
    Raises:
        UserError: no API key is set, or no server can be connected to.
        ServerError: the server does not respond in time, or responds with an error.
    """
    import wandb

    os.environ.pop("WANDB_MODE", None)  # may be offline for the trainings
    os.environ["WANDB_SILENT"] = "true"
    disable_error_reports()
    if (problem := missing_key()) is not None:
        raise UserError(f"nothing can be uploaded: {problem}")
    url = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(url, timeout=CHECK_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise ServerError(f"nothing can be uploaded: {url} responds with error {error.code}") from error
    except urllib.error.URLError as error:
        raise UserError(f"nothing can be uploaded: cannot connect to {url} ({error.reason})") from error
    except (OSError, HTTPException) as error:
        raise ServerError(f"nothing can be uploaded: {url} does not respond ({first_line(error)})") from error


def upload(run: Path, seconds: float) -> None:
    """
    Raises:
        SyncError: with W&B's message.
    """
    command = [sys.executable, "-m", "wandb", "sync", str(run.absolute())]
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_SILENT")}
    options: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL, "timeout": seconds}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    with tempfile.TemporaryDirectory() as here:  # W&B leaves a log there
        try:
            done = subprocess.run(command, cwd=here, **options)
        except subprocess.TimeoutExpired as error:
            raise SyncError(f"not uploaded within {seconds:g} s; increase seconds=") from error
    if done.returncode != 0 or not is_uploaded(run):
        lines = [line.removeprefix("wandb: ").strip() for line in done.stdout.splitlines() if line.strip()]
        raise SyncError((lines or [f"wandb sync exited with {done.returncode}"])[-1])


def link_uploaded(run: Path) -> tuple[list[str], list[str]]:
    """Link what is open of an uploaded run; nothing else is logged to it.

    Returns:
        What is linked now and what is still open, as `NAME:HASH`.

    Raises:
        SyncError: with W&B's message.
    """
    import wandb

    if (links := open_links(run)) is None:
        return [], []
    options = dict.fromkeys(("silent", "x_disable_stats", "x_disable_meta", "disable_git"), True)
    settings = wandb.Settings(
        **dict[str, Any](options),
        console="off",
        x_save_requirements=False,
        init_timeout=WandbConfig().init_timeout,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    known = {key: links["run"].get(key) for key in ("id", "project", "entity")}
    try:
        with tempfile.TemporaryDirectory() as here, staged_in(here):
            resumed = wandb.init(**known, resume="must", mode="online", dir=here, settings=settings)
            try:
                after = link(resumed, links)
            finally:
                resumed.finish()
        write_json(run.parent / FILE, after)
    except Exception as error:
        raise SyncError(f"could not be linked ({first_line(error)})") from error
    return [one for one in after["drawn"] if one not in links["drawn"]], not_linked(after)
