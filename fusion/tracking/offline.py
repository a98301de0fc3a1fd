"""Offline W&B runs, found on disk, uploaded by W&B's own `wandb sync`, and linked to the artifacts they made and used.

A run that was interrupted and taken up again has several pieces, one in each job's folder, with one id: they are
uploaded in the order in which they were written, and W&B joins them.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.config.logger import WandbConfig
from fusion.errors import first_line
from fusion.tracking import lineage
from fusion.tracking.lineage import Links
from fusion.tracking.tracking import FINISH_SECONDS, no_telemetry, why_offline

UPLOAD_SECONDS = 120.0  # for each run, unless seconds= is set; the next call uploads the rest
FOLDER = re.compile(r"offline-run-(?P<when>\d{8}_\d{6})-(?P<id>.+)")


class SyncError(Exception):
    """A run could not be uploaded or linked; the others may still be."""


@dataclass(frozen=True)
class OfflineRun:
    """A run and its pieces, `.../wandb/offline-run-DATE_TIME-ID`, the earliest first."""

    id: str
    pieces: tuple[Path, ...]

    @property
    def not_uploaded(self) -> list[Path]:
        return [piece for piece in self.pieces if not list(piece.glob("*.wandb.synced"))]

    @property
    def links(self) -> list[tuple[Path, Links]]:
        """The files of links beside its pieces that are about this run and have something open.

        Raises:
            SyncError: one cannot be read.
        """
        found = []
        for file in dict.fromkeys(piece.parent / lineage.FILE for piece in self.pieces):
            if file.is_file():
                try:
                    links = Links.read(file)
                except (OSError, ValueError) as error:
                    raise SyncError(f"{file} cannot be read ({first_line(error)})") from error
                if links.run.get("id") == self.id and links.open:
                    found.append((file, links))
        return found


def find_offline(folder: Path) -> list[OfflineRun]:
    """All offline runs in `folder` and below, in the order in which they began: sources before their fusions."""
    pieces: dict[str, list[tuple[str, Path]]] = {}
    for path in {folder, *folder.rglob("offline-run-*")}:
        match = FOLDER.fullmatch(path.absolute().name)
        if match and list(path.glob("*.wandb")):
            pieces.setdefault(match["id"], []).append((match["when"], path))
    runs = [(sorted(of), id) for id, of in pieces.items()]
    return [OfflineRun(id, tuple(path for _, path in of)) for of, id in sorted(runs)]


def why_not() -> str | None:
    """Why nothing can be uploaded now: no key, or no server; None if it can be tried."""
    os.environ.pop(
        "WANDB_MODE", None
    )  # whoever tracks offline may have said so there, and now wants a server
    os.environ["WANDB_SILENT"] = "true"  # else it says where the key came from
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # see `tracking`
    no_telemetry()
    return why_offline(WandbConfig())


def upload(run: OfflineRun, seconds: float = UPLOAD_SECONDS) -> None:
    """Uploads the pieces of a run that are not yet.

    Raises:
        SyncError: says what W&B said.
    """
    pieces = run.not_uploaded
    with tempfile.TemporaryDirectory() as here:  # where W&B leaves a log of its own
        command = [sys.executable, "-m", "wandb", "sync", *(str(piece.absolute()) for piece in pieces)]
        try:
            done = subprocess.run(
                command,
                cwd=here,
                env={k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_SILENT")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise SyncError(f"not uploaded within {seconds:g} s; seconds=N waits longer") from error
    if done.returncode != 0 or run.not_uploaded:
        raise SyncError(_told(done.stdout) or f"wandb sync ended with {done.returncode}")


def _told(output: str) -> str:
    """The line of W&B's that says what went wrong, as far as that can be told."""
    lines = [re.sub(r"^(wandb: )+", "", line).strip() for line in output.splitlines()]
    faults = [line for line in lines if re.search(r"error|fail|denied|cannot|invalid", line, re.IGNORECASE)]
    return (faults or lines or [""])[-1]


def draw(run: OfflineRun) -> tuple[list[str], list[str]]:
    """Draws what is open of an uploaded run's links, through W&B's own server.

    Returns:
        What is drawn now and what is still open, as `NAME:HASH`.

    Raises:
        SyncError: says what W&B said.
    """
    drawn: list[str] = []
    still: list[str] = []
    for file, links in run.links:
        try:
            with _online(links) as live:
                after = lineage.link(live, links)
            after.write(file)
        except Exception as error:
            raise SyncError(f"could not be linked ({first_line(error)})") from error
        drawn += [mark for mark in after.drawn if mark not in links.drawn]
        still += after.open
    return drawn, still


@contextlib.contextmanager
def _online(links: Links) -> Iterator[Any]:
    """The run itself, once more: nothing is logged to it but its links."""
    import wandb

    with tempfile.TemporaryDirectory() as here:
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
            disable_git=True,
            init_timeout=WandbConfig().init_timeout,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        said, os.environ["WANDB_DATA_DIR"] = os.environ.get("WANDB_DATA_DIR"), here
        try:
            run = wandb.init(
                project=links.run.get("project"),
                entity=links.run.get("entity"),
                id=links.run["id"],
                resume="must",
                mode="online",
                dir=here,
                settings=settings,
            )
            try:
                yield run
            finally:
                run.finish()
        finally:
            if said is None:
                del os.environ["WANDB_DATA_DIR"]
            else:
                os.environ["WANDB_DATA_DIR"] = said
