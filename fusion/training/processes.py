"""The processes of a DDP job under Hydra.

Lightning starts the other ranks by rerunning the command line: with `-m`, each of them would start the whole sweep, and
if a rank fails, the others wait forever. So the app starts *all* ranks of a job itself, as torchrun does, with the
composed config; Lightning finds LOCAL_RANK set and starts none. This process does not train.

An interrupt of this process is forwarded to rank zero only, which finishes its step and writes a checkpoint while the
other ranks still take part in its collectives; then all are killed. All times are of the monotonic clock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fusion.config.training import TrainerConfig
from fusion.errors import TrainingError, UserError
from fusion.files import read_json, write_json
from fusion.runs import signals
from fusion.runs.run import Run, caused_by_interrupt, describe

log = logging.getLogger(__name__)
T = TypeVar("T")

JOB = "FUSION_RANK_JOB"  # environment variable: the file with a rank's job
POLL = 0.1  # seconds between two polls of the ranks
GRACE = 5.0  # seconds for the other ranks to end after one has failed
PATIENCE = 30.0  # seconds for rank zero to end after an interrupt, and for the others after rank zero


class RankError(TrainingError):
    """A rank of a DDP job failed; the others were stopped."""


_ERRORS: dict[str, type[BaseException]] = {
    error.__name__: error for error in (UserError, TrainingError, RankError, KeyboardInterrupt, signals.Terminated)
}


# --- in the process that starts the ranks ---------------------------------------------------------


def count(trainer: TrainerConfig) -> int:
    """How many processes the job needs on this machine; 1: only this one.

    Raises:
        UserError: Lightning refuses the accelerator, strategy or devices.
    """
    if trainer.devices in (1, "1") and trainer.num_nodes == 1:
        return 1  # the common case needs no Lightning
    import pytorch_lightning as pl

    from fusion.training.lightning_internals import processes_to_start

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its tips
    keys = ("accelerator", "strategy", "devices", "num_nodes")
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {key: getattr(trainer, key) for key in keys} | dict.fromkeys(off, False)
    try:
        return processes_to_start(pl.Trainer(**settings))
    except Exception as error:
        given = " ".join(f"trainer.{key}={settings[key]}" for key in keys[:3])
        raise UserError(f"{given}: {error}") from error


def program(function: Callable[..., Any]) -> list[str]:
    """The command that starts this program, without its arguments."""
    module = function.__module__
    if module == "__main__" and (spec := sys.modules["__main__"].__spec__) is not None:
        module = spec.name  # python -m fusion.stage1
    if module == "__main__":
        return [sys.executable, os.path.abspath(sys.argv[0])]
    return [sys.executable, "-m", module]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(program: list[str], config: dict[str, Any], run: Run, ranks: int) -> dict[str, Any]:
    """Run one job in `ranks` processes and return the result of rank zero.

    Ranks above zero write to `run.rank1.log` and so on; the error's cause has the traceback of the rank that failed first.
    A second interrupt kills all ranks at once.

    Raises:
        UserError, TrainingError: raised by a rank, or MASTER_PORT cannot be used.
        RankError: a rank failed otherwise, was killed or could not be started.
        KeyboardInterrupt, Terminated: this process, or rank zero, was interrupted.
    """
    port = _port()
    started: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="fusion-ranks-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            write_json(folder / "job", {"config": config, "run": asdict(run), "parent": os.getpid()})
            for rank in range(ranks):
                started.append(_start(program, folder, run.directory, rank, ranks, port))
            failed = _wait(started)
            if failed:
                _interrupt_rank_zero(started, folder, signal.SIGINT, GRACE)
        except OSError as error:
            raise RankError(
                f"the processes of this job could not be started: {error}; is the disk full ({folder.parent})?"
            ) from error
        except BaseException as error:
            number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            _interrupt_rank_zero(started, folder, number, PATIENCE)
            raise
        finally:
            _kill(started)
        outcomes = {rank: outcome for rank in range(ranks) if (outcome := read_json(folder / f"outcome{rank}"))}
    if not failed and 0 in outcomes:
        result: dict[str, Any] = outcomes[0]["result"]
        return result
    # The others mostly lost their connection to the first.
    first = min(failed, key=lambda rank: outcomes[rank]["time"] if rank in outcomes else failed[rank], default=0)
    if (found := outcomes.get(first)) is not None:
        cause = RuntimeError(found["trace"]) if found["trace"] else None
        raise _ERRORS[found["error"]](*found["args"]) from cause
    code = started[first].returncode
    if code == -signal.SIGKILL:
        raise RankError(
            f"rank {first} was killed (SIGKILL), possibly because the machine ran out of memory\n"
            "Lower data.batch_size, or run the same command again to resume"
        )
    where = run.directory / (f"run.rank{first}.log" if first else "run.log")
    raise RankError(f"rank {first} ended with exit code {code}: see {where}")


def _start(
    program: list[str], folder: Path, directory: Path, rank: int, ranks: int, port: int
) -> subprocess.Popen[bytes]:
    defaults = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "OMP_NUM_THREADS": str(max(1, cores() // ranks))}
    own = {JOB: str(folder), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(directory / f"run.rank{rank}.log", "ab")) if rank else None
        return subprocess.Popen(
            program,
            env=defaults | os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches this process only
        )


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> dict[int, float]:
    """Wait until all ranks have ended, or for a limited time after one has failed or rank zero has ended.

    Returns:
        The ranks that failed, each with the time when that was seen.
    """
    failed: dict[int, float] = {}
    deadline = float("inf")
    while True:
        now = time.monotonic()
        running = 0
        for rank, process in enumerate(started):
            code = process.poll()
            running += code is None
            if code:
                failed.setdefault(rank, now - POLL)
                deadline = min(deadline, now + GRACE)
            elif code == 0 and rank == 0:
                deadline = min(deadline, now + PATIENCE)
        if not running or now > deadline:
            return failed
        time.sleep(POLL)


def _interrupt_rank_zero(started: Sequence[subprocess.Popen[bytes]], folder: Path, number: int, seconds: float) -> None:
    # Before it has started its job it has nothing to save, and a signal would print a traceback.
    if not started or not (folder / "started0").exists():
        return
    started[0].send_signal(number)
    deadline = time.monotonic() + seconds
    # Popen.wait would take a Ctrl-C as one that reached the child as well.
    while started[0].poll() is None and time.monotonic() < deadline:
        time.sleep(POLL)


def _kill(started: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.kill()  # does nothing to one that has been waited for
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is in an uninterruptible system call
            process.wait(GRACE)


def _port() -> int:
    """The port of the rendezvous: MASTER_PORT, or a free one.

    Raises:
        UserError: MASTER_PORT is no port, or another program listens there.
    """
    given = os.environ.get("MASTER_PORT", "0")
    try:
        if os.environ.get("NODE_RANK", "0") != "0":  # rank zero listens on another machine
            return int(given)
        with socket.create_server(("", int(given))) as probe:
            return int(probe.getsockname()[1])
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"MASTER_PORT={given}: expected a free port, 1 to 65535 ({error})\nunset MASTER_PORT to have one chosen"
        ) from None


# --- in a rank ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankJob:
    """The job of a rank; `folder` has the files that the ranks share with their launcher."""

    rank: int
    config: dict[str, Any]
    run: Run
    folder: Path


def job_of_this_rank() -> RankJob | None:
    """The job that `launch` started this process for; None: it is an ordinary process."""
    variable = os.environ.pop(JOB, None)  # processes that a rank starts are no ranks
    if variable is None:
        return None
    folder, rank = Path(variable), int(os.environ["LOCAL_RANK"])
    job = read_json(folder / "job")
    values, parent = job["run"], job["parent"]
    run = Run(**(values | {"directory": Path(values["directory"]), "overrides": tuple(values["overrides"])}))
    first = rank == 0 and os.environ.get("NODE_RANK", "0") == "0"
    run = replace(run, rank_zero=run.rank_zero and first)
    if rank == 0:
        signal.signal(signal.SIGINT, signals.raise_it)  # a shell's background job ignores it
    else:  # it takes part in rank zero's collectives until the launcher, which is notified, ends it
        for number in signals.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signals.Forward(parent))
    (folder / f"started{rank}").touch()
    threading.Thread(target=_die_with, args=(parent,), daemon=True, name="parent-watch").start()
    _set_up_logging(run, rank)
    return RankJob(rank, job["config"], run, folder)


def run_rank(job: RankJob, work: Callable[[], dict[str, Any]]) -> int:
    """Do a rank's work, write its outcome for the launcher and return the exit code."""
    result: dict[str, Any] = {}
    outcome: BaseException | None = None
    code, trace = 0, ""
    try:
        result = work()
    except UserError as error:
        outcome, code = UserError(str(error)), 2
    except BaseException as error:
        interrupt = caused_by_interrupt(error)
        if isinstance(interrupt, signals.Terminated):
            outcome, code = interrupt, 143
        elif interrupt is not None:
            outcome, code = KeyboardInterrupt(), 130
        else:
            known = isinstance(error, TrainingError)
            outcome = TrainingError(str(error)) if known else RankError(f"rank {job.rank}: {describe(error)}")
            code, trace = 1, traceback.format_exc()
            if job.rank:
                traceback.print_exc()  # to this rank's own log
    content = {
        "time": time.monotonic(),
        "result": result,
        "error": None if outcome is None else type(outcome).__name__,
        "args": [] if outcome is None else list(outcome.args),
        "trace": trace,
    }
    try:
        write_json(job.folder / f"outcome{job.rank}", content)
    except OSError as error:
        log.warning("%s: cannot be written (%s)", job.folder, error.strerror or error)
    return code


def gathered(own: T) -> list[T]:
    """The objects of all processes, by rank; `[own]` outside DDP. All processes have to call it."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, own)
    return everywhere


def _die_with(parent: int) -> None:
    """Kill this rank once its launcher has ended, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def _set_up_logging(run: Run, rank: int) -> None:
    """Rank zero logs as a job of one process does; the others log warnings to their own file."""
    console = logging.StreamHandler(sys.stdout)
    full = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    if rank:
        logging.basicConfig(level=logging.WARNING, handlers=[console], format=full, force=True)
        return
    file = logging.FileHandler(run.directory / "run.log", encoding="utf-8")
    file.setFormatter(logging.Formatter(full))
    logging.basicConfig(level=logging.INFO, handlers=[console, file], format="%(message)s", force=True)
