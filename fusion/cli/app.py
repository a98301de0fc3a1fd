"""Build a Hydra command line program from a function of (config, run)."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fusion.cli import startup
from fusion.cli.config_sources import as_text, conf_folder, groups, text_keys
from fusion.cli.console import say
from fusion.cli.hydra_internals import compose_job, is_hydras_own, parse, split_into_jobs
from fusion.cli.job_config import Command, is_rank_zero, is_sweep, prepare
from fusion.cli.messages import OWN_TASK, explain
from fusion.config.stages import StageConfig
from fusion.errors import TrainingError, UserError
from fusion.files import check_writable
from fusion.locks import run_lock
from fusion.runs import signals
from fusion.runs.memory import collect_rarely
from fusion.runs.run import Run, RunState, describe, record
from fusion.runs.sweep import Sweep, main_score, summarize_states
from fusion.text import PROGRESS, printable, printable_output
from fusion.tracking.wandb_run import state as wandb_state
from fusion.training.expected_warnings import ignore_expected_warnings

log = logging.getLogger(__name__)

CONFIG_ERRORS = (UserError, HydraException, OmegaConfBaseException, YAMLError)
COMPOSING_ERRORS = (ValueError, AssertionError)  # also raised by Hydra for invalid overrides
# Global, since Hydra instantiates the callback.
_command: Command
_sweep: Sweep | None = None

Function = Callable[[Any, Run], dict[str, Any]]


def command(
    name: str,
    schema: type,
    check: Callable[[Any, Run], RunState | None],
    settle: Callable[[Any, Sequence[str]], None] = lambda config, overrides: None,
) -> Callable[[Function], Callable[[], None]]:
    """Decorate a function of (typed config, Run), which returns the content of result.json, as a program.

    `check` raises UserError, and may return the state of the run; it is called for every job of a sweep before the
    first one starts, and again for each job. `settle` replaces placeholders such as sources=all, given the overrides.
    """
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)  # in the defaults of conf/NAME.yaml

    def decorate(function: Function) -> Callable[[], None]:
        @functools.wraps(function)
        def program() -> None:
            sys.exit(signals.exit_code(lambda: _main(Command(name, schema, check, function, settle))))

        return program

    return decorate


def _main(command: Command) -> int:
    from fusion.training import processes

    global _command, _sweep
    _command, _sweep = command, None
    wandb_state.reset()
    printable_output()
    ignore_expected_warnings()
    logging.raiseExceptions = False  # a full disk would print many tracebacks
    collect_rarely()
    if (rank := processes.job_of_this_rank()) is not None:
        startup.import_quickly()
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(command.schema), rank.config))
        return processes.run_rank(rank, lambda: command.function(typed, rank.run))
    words = sys.argv[1:]
    if any(re.match(r"\+*task=\{", word) for word in words):  # Hydra prints no message
        return _error(f"+task={{...}}: expected the name of a task, +task=NAME\n{OWN_TASK}", 2)
    program = processes.program(command.function)
    codes: list[int] = []  # exit codes of the jobs in this process

    def job(composed: DictConfig) -> Any:
        try:
            with signals.raised():  # a launcher may run the job in its own process
                return _job(command, program, composed, codes)
        finally:
            # A Trainer and its model form a reference cycle, so a sweep would keep multiple models in memory.
            gc.collect()

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of exiting with 1
    try:
        texts = text_keys(command.schema) | groups()
        typed_words = [as_text(word, texts) for word in words]
        # Hydra requires contiguous overrides.
        sys.argv[1:] = sorted(typed_words, key=lambda word: word not in ("-m", "--multirun"))
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=command.name)(job)()
    except PreflightError as error:
        return _error(*error.args)
    except (*CONFIG_ERRORS, *COMPOSING_ERRORS) as error:  # errors of jobs are handled in `_job`
        return _error(explain(error, command.schema, words), 2)
    except (KeyboardInterrupt, signals.Terminated) as error:
        if _sweep is None:
            raise  # `signals.exit_code` prints the line
        how, code = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else ("terminated", 143)
        return _error(_sweep.stopped(how), code)
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:
        hint = ""
        if isinstance(error, OSError):  # from files that Hydra writes
            hint = "\nSet hydra.run.dir=DIR or hydra.sweep.dir=DIR to a writable directory"
        if not _end_of_sweep() and not hint:  # a launcher raises for a killed job, which is listed
            traceback.print_exc()
        return _error(f"{command.name} failed: {describe(error)}{hint}", 1)
    return max(codes, default=0) if _sweep is None else _end_of_sweep()


def _job(command: Command, program: list[str], composed: DictConfig, codes: list[int]) -> Any:
    """Run one job, and return the main score of a training run, which sweepers maximize. Records failures."""
    from fusion.training import processes

    launch: Any = HydraConfig.get()
    typed, run = prepare(command, composed, launch)

    def check() -> RunState | None:
        state = command.check(typed, run)
        if isinstance(typed, StageConfig) and run.rank_zero:
            if lock.enter_context(run_lock(Path(typed.store), str(typed.name))):
                state = command.check(typed, run)  # the process that held the lock may have finished it
            texts = {"interrupted": "was interrupted: resuming (%s)", "failed": "failed before: rerunning (%s)"}
            if state is not None and state.detail:
                log.info(f"%s {texts.get(state.state, '%s')}", typed.name, state.detail)
        return state

    def work() -> dict[str, Any]:
        if hasattr(typed, "backbone"):  # all but the report run a model
            startup.import_quickly()
        ranks = processes.count(typed.trainer) if isinstance(typed, StageConfig) else 1
        if ranks > 1:
            return processes.launch(program, run.config, run, ranks)
        return command.function(typed, run)

    if not run.rank_zero:  # of torchrun or SLURM: rank 0 logs the same
        logging.getLogger().setLevel(logging.WARNING)
    if _sweep is None and is_sweep(launch):  # a launcher's processes share a terminal
        os.environ[PROGRESS] = "0"
    try:
        with contextlib.ExitStack() as lock:
            result = record(run, work, check)
    except Exception as error:
        message = str(error) if isinstance(error, UserError | TrainingError) else describe(error)
        if isinstance(error, UserError):
            codes.append(_error(message, 2))
        else:
            if not is_sweep(launch) and not isinstance(error, TrainingError):
                traceback.print_exc()
            codes.append(_error(f"{command.name} failed: {message} (log: {run.directory}/run.log)", 1))
        if is_sweep(launch) and not is_hydras_own(launch.sweeper):  # a custom sweeper handles failed jobs
            raise RuntimeError(message) from None
        return None
    codes.append(0)
    if run.rank_zero and not is_sweep(launch):
        from fusion.cli.finished import end_of_run

        end_of_run(run, result)
    if isinstance(typed, StageConfig) and result.get("metrics"):
        return (main_score(result) or ("", math.nan))[1]
    return result


def _end_of_sweep() -> int:
    """Print the table of a sweep, one line of counts, and the failed jobs. Returns 1 if any job failed."""
    if _sweep is None:
        return 0
    from fusion.cli.finished import end_of_sweep

    end_of_sweep(_command.name, _sweep.folder, _sweep.jobs())
    line, failed = _sweep.outcome()
    say(line, flush=True)
    return _error("\n".join(failed), 1) if failed else 0


def _error(message: str, code: int) -> int:
    if os.environ.get("FUSION_DEBUG", "0") not in ("", "0") and sys.exc_info()[1] is not None:
        traceback.print_exc()
    with contextlib.suppress(OSError):  # stderr may be redirected to a full disk
        print(printable(message), file=sys.stderr, flush=True)
    return code


class PreflightError(BaseException):
    """A message and an exit code. Not an Exception, which Hydra would turn into a warning in a callback."""


class Preflight(Callback):
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with _preflight_errors():
            _command.check(*prepare(_command, config, config.hydra))
            _output_folder(config, "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global _sweep
        with _preflight_errors():
            folder = _output_folder(config, "sweep")
            words = [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()]
            # Unresolved, since `name=rte-${seed}` differs between jobs.
            words += cast(list[str], OmegaConf.to_container(config.hydra.overrides.task, resolve=False))
            overrides = parse(words)
            # Tells all jobs of the sweep, in any process, which overrides are the same for all of them.
            constant = ",".join(f"'{one.key_or_group}'" for one in overrides if not one.is_sweep_override())
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{constant}]")
            if is_hydras_own(config.hydra.sweeper):
                sweep = _checked_sweep(config, folder, overrides)
            else:  # a custom sweeper: each job is checked when it starts
                sweep = Sweep.start(folder)
            _sweep = sweep if is_rank_zero() else None  # rank 0 records the jobs
            wandb_state.sweep = folder.absolute()


def _checked_sweep(config: DictConfig, folder: Path, overrides: list[Override]) -> Sweep:
    planned: list[Path] = []
    states: list[str] = []
    names: dict[tuple[str, str], Sequence[str]] = {}
    for number, job in enumerate(split_into_jobs(overrides)):
        try:
            composed, subfolder = compose_job(config, job, number)
        except COMPOSING_ERRORS as error:
            raise HydraException(str(error)) from error
        try:
            typed, run = prepare(_command, composed, composed.hydra)
            state = _command.check(typed, run)
        except UserError as error:
            raise UserError(f"job {number} ({' '.join(job)}): {error}") from error
        if state is not None:
            states.append(state.state)
        planned.append(folder / subfolder)
        if planned[-1].exists() and not planned[-1].is_dir():
            raise UserError(f"{planned[-1]} is a file; set hydra.sweep.dir=DIR to a different directory")
        if isinstance(typed, StageConfig):
            first = names.setdefault((typed.store, str(typed.name)), job)
            if first is not job:
                raise UserError(_same_name(str(typed.name), first, job, overrides))
    if states and is_rank_zero():
        say(summarize_states(states), flush=True)
    return Sweep.start(folder, planned)


def _output_folder(config: DictConfig, mode: str) -> Path:
    """Return hydra.run.dir or hydra.sweep.dir. Raises UserError for `~`, which Hydra does not expand."""
    text, key = str(config.hydra[mode].dir), f"hydra.{mode}.dir"
    if text.startswith("~"):
        raise UserError(f"{key}={text}: ~ is not expanded; expected an absolute or relative path")
    return check_writable(text, key)


def _same_name(name: str, first: Sequence[str], second: Sequence[str], overrides: Sequence[Override]) -> str:
    """Return the message for two jobs of a sweep with the same artifact name."""
    if list(first) == list(second):
        return f"two jobs of this sweep are identical: {' '.join(first)}\nexpected distinct values"
    pairs = [pair for pair in zip(first, second, strict=True) if pair[0] != pair[1]]
    jobs = " and ".join(" ".join(words) for words in zip(*pairs, strict=True))
    keys = [one.key_or_group for one in overrides if one.is_sweep_override() and one.key_or_group != "name"]
    keys = [f"{key}.name" if key in ("task", "adapter", "composition", "method") else key for key in keys]
    made = shlex.quote("-".join(["name=NAME", *(f"${{{key}}}" for key in keys or ["seed"])]))
    return f"two jobs of this sweep have the name {name}: {jobs}\nset distinct names with {made}"


@contextlib.contextmanager
def _preflight_errors() -> Iterator[None]:
    """Raise `PreflightError` for errors in a callback, which Hydra would turn into warnings."""
    try:
        yield
    except CONFIG_ERRORS as error:
        raise PreflightError(explain(error, _command.schema), 2) from error
    except Exception as error:
        traceback.print_exception(error)
        raise PreflightError(f"{_command.name} failed: {describe(error)}", 1) from error
