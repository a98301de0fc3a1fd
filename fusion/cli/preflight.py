"""Composes, types and checks every job of a command before the first one starts."""

from __future__ import annotations

import contextlib
import shlex
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fusion.cli.console import say
from fusion.cli.hydra_internals import compose_job, is_hydras_own, parse, split_into_jobs
from fusion.cli.job_config import Command, prepare
from fusion.cli.messages import explain
from fusion.config.stages import StageConfig
from fusion.errors import UserError
from fusion.files import resolve_path
from fusion.runs.run import RunState, check_folder, describe
from fusion.runs.sweep import Sweep, command_again, summarize_states
from fusion.tracking.wandb_run import state as wandb_state

CONFIG_ERRORS = (UserError, HydraException, OmegaConfBaseException, YAMLError)
COMPOSING_ERRORS = (ValueError, AssertionError)  # what Hydra raises besides, for overrides it cannot place

command: Command  # of this process: Hydra itself creates the callback
sweep: Sweep | None = None  # of this process


def start(started: Command) -> None:
    """Make this process's command known to the callback."""
    global command, sweep
    command, sweep = started, None


class Refused(BaseException):
    """Ends the program before its first job: exit code 2 for a wrong command line, 1 for an error in a check.

    Not an Exception, since Hydra turns those of a callback into warnings.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Preflight(Callback):
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with _refusing():
            command.check(*prepare(command, config, config.hydra))
            check_folder(_output_folder(config, "run"), "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global sweep
        with _refusing():
            folder = _output_folder(config, "sweep")
            words = [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()]
            # As they were typed: `name=rte-${seed}` is another name in each job.
            words += cast(list[str], OmegaConf.to_container(config.hydra.overrides.task, resolve=False))
            overrides = parse(words)
            # Every job of the sweep, in any process, reads from this what all jobs have in common.
            constant = ",".join(f"'{one.key_or_group}'" for one in overrides if not one.is_sweep_override())
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{constant}]")
            if is_hydras_own(config.hydra.sweeper):
                sweep = _checked_sweep(config, folder, overrides)
            else:  # another sweeper chooses its jobs as it goes: each is checked when it starts
                check_folder(folder, "hydra.sweep.dir")
                sweep = Sweep.start(folder)
            wandb_state.sweep = folder.absolute()


def _checked_sweep(config: DictConfig, folder: Path, overrides: list[Override]) -> Sweep:
    planned: list[Path] = []
    again = None
    states: dict[str, RunState] = {}
    names: dict[tuple[str, str], Sequence[str]] = {}
    for number, job in enumerate(split_into_jobs(overrides)):
        try:
            composed, subfolder = compose_job(config, job, number)
        except COMPOSING_ERRORS as error:
            raise HydraException(str(error)) from error
        try:
            typed, run = prepare(command, composed, composed.hydra)
            state = command.check(typed, run)
        except UserError as error:
            raise UserError(f"job {number} ({' '.join(job)}): {error}") from error
        if state is not None:
            states[str(run.config.get("name"))] = state
        planned.append(folder / subfolder)
        if isinstance(typed, StageConfig):
            again = command_again(typed.resume, typed.overwrite)
            first = names.setdefault((typed.store, str(typed.name)), job)
            if first is not job:
                raise UserError(_same_name(str(typed.name), first, job, overrides))
    check_folder(folder, "hydra.sweep.dir")
    for place in planned:
        if place.exists() and not place.is_dir():
            raise UserError(f"{place}: this is a file, expected a folder; hydra.sweep.dir=DIR names another")
    if states:
        say("\n".join(summarize_states(states)), flush=True)
    return Sweep.start(folder, planned, again)


def _output_folder(config: DictConfig, mode: str) -> Path:
    """hydra.run.dir or hydra.sweep.dir, where Hydra itself will make it: it does not expand `~`.

    Raises:
        UserError: no path, or one that starts with `~`.
    """
    text, key = str(config.hydra[mode].dir), f"hydra.{mode}.dir"
    if text.startswith("~"):
        raise UserError(f"{key}={text}: ~ is not expanded here; expected the whole path")
    return resolve_path(text, key)


def _same_name(name: str, first: Sequence[str], second: Sequence[str], overrides: Sequence[Override]) -> str:
    """The message for two jobs of a sweep that would be stored under one name."""
    if list(first) == list(second):
        return f"two jobs of this sweep are the same: {' '.join(first)}\nexpected each value of a sweep once"
    pairs = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
    jobs = " and ".join(" ".join(words) for words in zip(*pairs, strict=True))
    keys = [one.key_or_group for one in overrides if one.is_sweep_override() and one.key_or_group != "name"]
    keys = [f"{key}.name" if key in ("task", "adapter", "composition", "method") else key for key in keys]
    made = shlex.quote("-".join(["name=NAME", *(f"${{{key}}}" for key in keys or ["seed"])]))
    return f"two jobs of this sweep would both be stored as {name}: {jobs}\ngive each its own name with {made}"


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Let no error in a callback pass as a warning."""
    try:
        yield
    except CONFIG_ERRORS as error:
        raise Refused(explain(error, command.schema), 2) from error
    except Exception as error:
        traceback.print_exception(error)
        raise Refused(f"{command.name} failed: {describe(error)}", 1) from error
