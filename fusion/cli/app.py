"""The Hydra application: makes a command line program of a function of (config, run).

`command` finds `conf/`, composes and types the config, has every job checked before the first one starts, records
what each job makes, and ends with the exit code that scripts rely on: 0 done, 2 a wrong command or config, 1 a failed
job, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fusion.cli import preflight
from fusion.cli.config_sources import conf_folder, groups, register
from fusion.cli.hydra_internals import forget_jobs, is_hydras_own
from fusion.cli.job_config import Command, is_sweep, prepare
from fusion.cli.messages import OWN_TASK, explain
from fusion.cli.overrides import as_text, flags_first, text_keys
from fusion.cli.preflight import COMPOSING_ERRORS, CONFIG_ERRORS, Refused
from fusion.config.stages import StageConfig
from fusion.errors import TrainingError, UserError, first_line
from fusion.locks import run_lock
from fusion.runs import signals
from fusion.runs.memory import free_cycles
from fusion.runs.run import Run, RunState, describe, record
from fusion.runs.sweep import JobFailed, objective
from fusion.text import PROGRESS, printable, printable_output
from fusion.tracking.wandb_run import command_state
from fusion.training.expected_warnings import ignore_expected_warnings

log = logging.getLogger(__name__)

Function = Callable[[Any, Run], dict[str, Any]]


def command(
    name: str,
    schema: type,
    check: Callable[[Any, Run], RunState | None],
    settle: Callable[[Any, Sequence[str]], None] = lambda config, overrides: None,
) -> Callable[[Function], Callable[[], None]]:
    """Decorate a function as the program of `conf/NAME.yaml`, typed by `schema`.

    The function gets the typed config and the Run, and returns the content of result.json.

    Args:
        check: cheap; raises UserError, and may return the state of the run. It is called for every job of a sweep
            before the first one starts, and for each job again when it starts.
        settle: replaces placeholders of the typed config, such as sources=all, given the overrides.
    """
    register(name, schema)

    def decorate(function: Function) -> Callable[[], None]:
        @functools.wraps(function)
        def program() -> None:
            sys.exit(signals.exit_code(lambda: _main(Command(name, schema, check, function, settle))))

        return program

    return decorate


def _main(command: Command) -> int:
    from fusion.training import processes

    preflight.start(command)
    printable_output()
    ignore_expected_warnings()
    logging.raiseExceptions = False  # a full disk would fill the terminal with tracebacks
    if (rank := processes.job_of_this_rank()) is not None:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(command.schema), rank.config))
        return processes.run_rank(rank, lambda: command.function(typed, rank.run))
    words = sys.argv[1:]
    if any(re.match(r"\+*task=\{", word) for word in words):  # Hydra has no message for it
        return _error(f"+task={{...}}: a task is one file: expected +task=NAME\n{OWN_TASK}", 2)
    program = processes.program(command.function)
    codes: list[int] = []  # of this process's jobs

    def job(composed: DictConfig) -> Any:
        try:
            with signals.raised():  # a launcher may run the job in its own process
                return _job(command, program, composed, codes)
        finally:  # once the job's own frames are gone, and the traceback of one that failed
            free_cycles()

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and does not print and end with 1
    try:
        texts = text_keys(command.schema) | groups()
        sys.argv[1:] = flags_first([as_text(word, texts) for word in words])
        with command_state():
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=command.name)(job)()
    except Refused as error:
        return _error(str(error), error.code)
    except (*CONFIG_ERRORS, *COMPOSING_ERRORS) as error:  # a job's own errors do not get here
        return _error(explain(error, command.schema, words), 2)
    except (KeyboardInterrupt, signals.Terminated) as error:
        if preflight.sweep is None:
            raise  # `signals.exit_code` prints the line
        how, code = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else ("terminated", 143)
        return _error(preflight.sweep.stopped(how), code)
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except Exception as error:
        if isinstance(error, OSError):  # of Hydra's own files
            hint = "\nAn output folder cannot be written: hydra.run.dir= or hydra.sweep.dir= names another"
            _end_of_sweep()
            return _error(f"{command.name} failed: {describe(error)}{hint}", 1)
        if _end_of_sweep():  # a launcher misses a job that died: it is in the list
            return _error(f"{command.name} failed: {type(error).__name__}: {first_line(error)}", 1)
        traceback.print_exc()
        return _error(f"{command.name} failed: {describe(error)}", 1)
    finally:
        forget_jobs()
    return max(codes, default=0) if preflight.sweep is None else _end_of_sweep()


def _job(command: Command, program: list[str], composed: DictConfig, codes: list[int]) -> Any:
    """Run one job. A failure is recorded and not raised, so that a sweep continues with the next job.

    A job of a training command returns its objective, see `objective`, for sweepers that search by it.

    Raises:
        JobFailed: it failed under another sweeper than Hydra's default.
    """
    from fusion.training import processes

    launch: Any = HydraConfig.get()
    typed, run = prepare(command, composed, launch)

    def check() -> RunState | None:
        state = command.check(typed, run)
        if isinstance(typed, StageConfig) and run.rank_zero:
            if lock.enter_context(run_lock(Path(typed.store), str(typed.name))):
                state = command.check(typed, run)  # the process that held the lock may have done it
            _log_state(str(typed.name), state)
        return state

    def work() -> dict[str, Any]:
        ranks = processes.count(typed.trainer) if isinstance(typed, StageConfig) else 1
        if ranks > 1:
            return processes.launch(program, run.config, run, ranks)
        return command.function(typed, run)

    if preflight.sweep is None and is_sweep(launch):  # one of a launcher's processes, which share a terminal
        os.environ[PROGRESS] = "0"
    try:
        with contextlib.ExitStack() as lock:
            result = record(run, work, check)
    except Exception as error:
        message = str(error) if isinstance(error, UserError | TrainingError) else describe(error)
        if preflight.sweep is not None:
            preflight.sweep.errors[run.directory.absolute()] = describe(error)
        if isinstance(error, UserError):
            codes.append(_error(message, 2))
        else:
            if not is_sweep(launch) and not isinstance(error, TrainingError):
                traceback.print_exc()
            codes.append(_error(f"{command.name} failed: {message} (log: {run.directory}/run.log)", 1))
        if is_sweep(launch) and not is_hydras_own(launch.sweeper):  # it decides what a failed job means
            raise JobFailed(message) from None
        return None
    codes.append(0)
    if run.rank_zero and not is_sweep(launch):
        from fusion.cli.next_commands import end_of_run

        end_of_run(run, result)
    return objective(typed, result) if isinstance(typed, StageConfig) and result.get("metrics") else result


def _log_state(name: str, state: RunState | None) -> None:
    """One line for a run that was started before and is not done."""
    texts = {"interrupted": "was interrupted: resuming", "failed": "failed the last time: running it again"}
    if state is not None and state.state in texts:
        log.info("%s %s%s", name, texts[state.state], f" ({state.detail})" if state.detail else "")
    elif state is not None and state.state == "new" and state.detail:
        log.info("%s %s", name, state.detail)


def _end_of_sweep() -> int:
    """Print how a sweep went: a table, one line of counts, and which jobs failed; returns 1 where one did."""
    if (sweep := preflight.sweep) is None:
        return 0
    from fusion.cli.console import say
    from fusion.cli.next_commands import end_of_sweep

    end_of_sweep(preflight.command.name, sweep.folder, sweep.jobs())
    line, failed = sweep.outcome()
    say(line, flush=True)
    return _error("\n".join(failed), 1) if failed else 0


def _error(message: str, code: int) -> int:
    """Print a message on stderr; returns the code."""
    if os.environ.get("FUSION_DEBUG", "0") not in ("", "0") and sys.exc_info()[1] is not None:
        traceback.print_exc()
    with contextlib.suppress(OSError):  # the terminal may be a file on the disk that is full
        print(printable(message), file=sys.stderr, flush=True)
    return code
