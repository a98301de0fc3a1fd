"""A run's place in the store: what it will be called, and whether it is there already."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config.stages import StageConfig
from fusion.errors import first_line
from fusion.runs.run import (
    Run,
    RunState,
    caused_by_interrupt,
    checkpoint_folder,
    describe,
    identity,
    identity_config,
    is_done,
    write_json,
)
from fusion.store.lookup import find, names, read_manifest
from fusion.store.trained_data import note_ambiguous_labels
from fusion.store.writing import check_free, check_writable

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

ATTEMPT = "attempt.json"
POSITION = "position.json"
LAST, BEFORE = "last.ckpt", "before.ckpt"  # checkpoints, which `fusion.training.checkpoints` writes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOutput:
    """What a run makes.

    kind: what is stored, one of the manifest's KINDS.
    config: the part of the config (and of what it names) that the identity is the hash of.
    checkpoints: where its training is taken up again after an interruption.
    stored: the manifest of the artifact that an equal run has stored, if one has.
    resume: whether the run goes on from its checkpoints; else it begins anew.
    """

    kind: str
    name: str
    store: Path
    identity: str
    config: dict[str, Any]
    checkpoints: Path
    stored: Manifest | None
    resume: bool = True

    def result(self) -> dict[str, Any]:
        """The result of the stored artifact, as result.json has it."""
        assert self.stored is not None
        path = find(self.name, self.store)
        log.info("%s is done already: %s", self.name, path)
        note_ambiguous_labels(self.stored)
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # of one that was killed just after it had stored
        return result_of(self.stored, path)

    @property
    def run_state(self) -> RunState:
        """What became of this very run so far."""
        if self.stored is not None:
            return RunState("done")
        attempt, there = _read(self.checkpoints / ATTEMPT), self._has_checkpoint
        if not attempt and not there:
            return RunState("new")
        where = self._position() if there else "from the beginning"
        how = f"goes on {where}" if self.resume else "begins anew"
        if attempt.get("status") == "failed":
            return RunState("failed", f"{first_line(Exception(attempt.get('error')))}; {how}")
        return RunState("interrupted", where) if self.resume else RunState("new", how)

    @property
    def outlook(self) -> str:
        """What the same command would do after a failure, as the files are now."""
        if not self._has_checkpoint:
            return "it starts over, since there is no checkpoint"
        if not self.resume:
            return f"without resume=false it resumes {self._position()} ({self.checkpoints})"
        return f"it resumes {self._position()} ({self.checkpoints})"

    @property
    def _has_checkpoint(self) -> bool:
        """Whether there is one to resume from; a position without one is of no use."""
        return any((self.checkpoints / name).is_file() for name in (LAST, BEFORE))

    def _position(self) -> str:
        position = _read(self.checkpoints / POSITION)
        if {type(position.get(key)) for key in ("epoch", "batch")} != {int}:
            return "at its last checkpoint"
        return f"at epoch {position['epoch'] + 1}, batch {position['batch'] + 1}"

    @contextlib.contextmanager
    def attempt(self, run: Run, resume: bool) -> Iterator[None]:
        """Keeps beside the checkpoints how the work inside ends, until it has ended well."""
        if not run.rank_zero:
            yield
            return
        if not resume:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        said = {
            "status": "running",
            "error": None,
            "directory": str(run.directory),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self._note(said)
        try:
            yield
        except BaseException as error:
            interrupt = caused_by_interrupt(error)
            self._note(
                said
                | {
                    "status": "failed" if interrupt is None else "interrupted",
                    "error": describe(interrupt or error),
                }
            )
            if interrupt is not None:
                log.info("%s stopped; the same command again: %s", self.name, self.outlook)
            raise
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _note(self, said: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a full disk is nobody's reason to stop; it will say so itself
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.checkpoints / ATTEMPT, said)


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def find_output(config: StageConfig, run: Run, kind: str, inputs: dict[str, Any] | None = None) -> RunOutput:
    """Look the run up in the store; no model is loaded for it.

    Args:
        inputs: what the config only names and the result depends on: the hashes of the sources.

    Raises:
        UserError: the name is taken by another run and `overwrite` is not set, or cannot be used.
    """
    assert config.name is not None
    store = Path(config.store)
    asked = identity(run.config, inputs), identity_config(run.config, inputs)
    check_writable(store)
    stored = (
        read_manifest(config.name, store) if config.name in names(store) and not config.overwrite else None
    )
    there = None if stored is None else (stored.run.identity, stored.run.config)
    epochs = None if stored is None else stored.result.epochs
    done = is_done(config.name, there, asked, config.overwrite, epochs)
    if not done:
        check_free(config.name, kind, store, config.overwrite)
    return RunOutput(
        kind=kind,
        name=config.name,
        store=store,
        identity=asked[0],
        config=asked[1],
        checkpoints=checkpoint_folder(store, config.name, asked[0]),
        stored=stored if done else None,
        resume=config.resume,
    )


def result_of(manifest: Manifest, path: Path) -> dict[str, Any]:
    """What result.json holds: the run's own figures and, from the files, bytes and place."""
    stored_bytes = sum(file.bytes for file in manifest.files.values())
    parameters = manifest.result.parameters | {"stored_bytes": stored_bytes}
    return manifest.content["result"] | {"parameters": parameters, "artifact": str(path)}
