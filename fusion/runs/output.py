"""The output of a training run: its artifact in the store, and the state of earlier attempts."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.backbones.files import check_files, stamp
from fusion.config.model import BackboneConfig
from fusion.config.stages import StageConfig
from fusion.errors import UserError, first_line
from fusion.files import check_writable, now, read_json, write_json
from fusion.runs.identity import identity, identity_config, name_conflict
from fusion.runs.run import Run, RunState, caused_by_interrupt, describe
from fusion.store.compatibility import differences, note_ambiguous_labels
from fusion.store.layout import RUNS
from fusion.store.lookup import find, names, read_manifest
from fusion.store.writing import check_free

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

ATTEMPT = "attempt.json"
POSITION = "position.json"
PARTS = "after the finished trainings"
LAST, BEFORE = "last.ckpt", "before.ckpt"  # checkpoints, written by `fusion.training.checkpoints`

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOutput:
    """The artifact of a training run."""

    kind: str  # one of `KINDS`
    name: str
    store: Path
    identity: str
    config: dict[str, Any]  # the settings and inputs that `identity` hashes
    checkpoints: Path  # STORE/.runs/NAME-IDENTITY
    stored: Manifest | None  # the artifact, if a run of this identity is done
    resume: bool = True  # whether to resume from the checkpoints

    def result(self) -> dict[str, Any]:
        """Return the result of the stored artifact for result.json."""
        assert self.stored is not None
        path = find(self.name, self.store)
        log.info("%s is already done: %s", self.name, path)
        note_ambiguous_labels(self.stored)
        shutil.rmtree(self.checkpoints, ignore_errors=True)  # of a run that was killed after saving
        return result_of(self.stored, path)

    @property
    def run_state(self) -> RunState:
        """State of this run before it starts."""
        if self.stored is not None:
            return RunState("done")
        attempt, resumable = read_json(self.checkpoints / ATTEMPT), self._has_checkpoint
        if not attempt and not resumable:
            return RunState("new")
        where = PARTS if attempt.get("parts") else self._position() if resumable else "from the beginning"
        how = f"resumes {where}" if self.resume else "starts over"
        if attempt.get("status") == "failed":
            return RunState("failed", f"{first_line(Exception(attempt.get('error')))}; {how}")
        return RunState("interrupted", where) if self.resume else RunState("new", how)

    @property
    def outlook(self) -> str:
        """Describe what rerunning the command does after a failure."""
        if not self._has_checkpoint:
            return "it starts over, since there is no checkpoint"
        without = "" if self.resume else "without resume=false "
        return f"{without}it resumes {self._position()} ({self.checkpoints})"

    @property
    def _has_checkpoint(self) -> bool:
        return any((self.checkpoints / name).is_file() for name in (LAST, BEFORE))

    def _position(self) -> str:
        position = read_json(self.checkpoints / POSITION)
        try:
            return f"at epoch {position['epoch'] + 1}, batch {position['batch'] + 1}"
        except (LookupError, TypeError):
            return "at its last checkpoint"

    @contextlib.contextmanager
    def attempt(self, run: Run, resume: bool, parts: bool = False) -> Iterator[None]:
        """Record the status of the block next to the checkpoints, and delete both if it succeeds.

        `parts`: whether the block consists of multiple trainings, which are stored and resumed on their own.
        """
        if not run.rank_zero:
            yield
            return
        if not resume:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        status = {
            "status": "running",
            "error": None,
            "directory": str(run.directory),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": now(),
            **({"parts": True} if parts else {}),
        }
        self._write_attempt(status)
        try:
            yield
        except BaseException as error:
            interrupt = caused_by_interrupt(error)
            ended = "failed" if interrupt is None else "interrupted"
            if isinstance(error, UserError) and not self._has_checkpoint:
                shutil.rmtree(self.checkpoints, ignore_errors=True)  # invalid input: nothing to resume
                raise
            self._write_attempt(status | {"status": ended, "error": describe(interrupt or error)})
            if interrupt is not None:
                outlook = f"it continues {PARTS}" if parts else self.outlook
                log.info("%s stopped; to continue, rerun the command: %s", self.name, outlook)
            raise
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _write_attempt(self, status: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a full disk is reported by the checkpoints
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.checkpoints / ATTEMPT, status)


def check_stage(config: StageConfig, output_of: Callable[[], RunOutput]) -> RunState:
    """Check data, backbone files and compiler before a model is loaded, and return the state of the run.

    `output_of` returns the run's output; it is called after the data was checked. Raises UserError if data, backbone
    files or compiler are missing or invalid.
    """
    from fusion.data.splits import check_held_out_splits, check_source

    check_held_out_splits(config.task_list, config.data)
    for task in config.task_list:
        check_source(task, config.data)
    output = output_of()
    if output.stored is None:
        backbone = config.backbone
        check_files(backbone.name_or_path, backbone.trust_remote_code, backbone.encoder_only, backbone.accept_licence)
    if config.compile:
        from fusion.backbones.layer_calls import check_compiler

        check_compiler()
    return output.run_state


def find_output(config: StageConfig, run: Run, kind: str, inputs: dict[str, Any] | None = None) -> RunOutput:
    """Look up the artifact of a run in the store, without loading a model. `inputs` are the hashes of its inputs.

    Raises UserError if the name is invalid or that of a different artifact without `overwrite`, or if the artifact is
    stored but its backbone has changed.
    """
    assert config.name is not None
    store = Path(config.store)
    asked = identity(run.config, inputs), identity_config(run.config, inputs)
    check_writable(config.store, "store")
    exists = config.name in names(store) and not config.overwrite
    stored = read_manifest(config.name, store) if exists else None
    if stored is None:
        check_free(config.name, kind, store, config.overwrite)
    elif stored.run.identity != asked[0]:
        raise name_conflict(config.name, stored.run.config, asked[1])
    else:
        _check_same_backbone(stored, config.backbone)
    checkpoints = store / RUNS / f"{config.name}-{asked[0]}"
    return RunOutput(kind, config.name, store, *asked, checkpoints, stored, config.resume)


def _check_same_backbone(stored: Manifest, config: BackboneConfig) -> None:
    """Raise UserError if the backbone in the same directory has changed; it is only loaded if files were modified."""
    before, now = stored.run.backbone_stamp, stamp(config.name_or_path)  # None in version 0.1
    if before is None or now is None or before == now:
        return
    from fusion.backbones.load import load_backbone

    name, revision, trust = config.name_or_path, config.revision, config.trust_remote_code
    backbone = load_backbone(name, revision, trust, encoder_only=config.encoder_only)
    pairs = {
        "backbone fingerprint": (stored.backbone.fingerprint, backbone.fingerprint),
        "backbone tokenizer": (stored.backbone.tokenizer or backbone.tokenizer_hash, backbone.tokenizer_hash),
    }
    if found := differences(pairs):
        raise UserError(
            f"{stored.name} was trained before {config.name_or_path} changed: {found}; set name=NAME to keep both, or "
            "overwrite=true to replace it"
        )


def result_of(manifest: Manifest, path: Path) -> dict[str, Any]:
    """Return the content of result.json: the manifest's result, stored bytes and artifact path."""
    stored_bytes = sum(file.bytes for file in manifest.files.values())
    parameters = manifest.result.parameters | {"stored_bytes": stored_bytes}
    return manifest.content["result"] | {"parameters": parameters, "artifact": str(path)}
