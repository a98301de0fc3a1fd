"""The processes of a DDP job under Hydra.

Lightning starts the other ranks by rerunning the command line: with `-m`, each of them would start the whole sweep, and
if a rank fails, the others wait forever. So the app starts *all* ranks of a job itself, as torchrun does, with the
composed config; Lightning finds LOCAL_RANK set and starts none. This process does not train.

An interrupt of this process is forwarded to rank zero only, which finishes its step and writes a checkpoint while the
other ranks still take part in its collectives; then all are killed. All times are of the monotonic clock.
"""

from __future__ import annotations

import contextlib
import json
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.config.training import TrainerConfig
from fusion.errors import TrainingError, UserError
from fusion.files import write_json
from fusion.runs import signals
from fusion.runs.run import Run, RunLog, caused_by_interrupt, describe

log = logging.getLogger(__name__)

JOB = "FUSION_RANK_JOB"  # environment variable: the file with a rank's job
POLL = 0.1  # seconds between two polls of the ranks
GRACE = 5.0  # seconds for the other ranks to end after one has failed
PATIENCE = 30.0  # seconds for rank zero to end after an interrupt, and for the others after rank zero


class RankError(TrainingError):
    """A rank of a DDP job failed; the others were stopped."""


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

    rank_zero = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = rank_zero.level
    rank_zero.setLevel(logging.WARNING)
    keys = ("accelerator", "strategy", "devices", "num_nodes")
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {key: getattr(trainer, key) for key in keys} | dict.fromkeys(off, False)
    try:
        return processes_to_start(pl.Trainer(**settings))
    except Exception as error:
        given = " ".join(f"trainer.{key}={settings[key]}" for key in keys[:3])
        raise UserError(f"{given}: {error}") from error
    finally:
        rank_zero.setLevel(level)


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

    Ranks above zero write to `run.rank1.log` and so on; the traceback of the rank that failed first is in run.log too.
    A second interrupt kills all ranks at once.

    Raises:
        UserError, TrainingError: raised by a rank, or MASTER_PORT cannot be used.
        RankError: a rank failed otherwise, was killed or could not be started.
        KeyboardInterrupt, Terminated: this process, or rank zero, was interrupted.
    """
    port = _port()
    with tempfile.TemporaryDirectory(prefix="fusion-ranks-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        started: list[subprocess.Popen[bytes]] = []
        try:
            described = {**vars(run), "directory": str(run.directory)}
            write_json(folder / "job.json", {"run": described, "config": config, "parent": os.getpid()})
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
        reports = [_read_report(folder, rank) for rank in range(ranks)]
    if not failed and reports[0].get("kind") == "done":
        result: dict[str, Any] = reports[0]["result"]
        return result
    raise _cause(run.directory, [process.returncode for process in started], failed, reports)


def _start(
    program: list[str], folder: Path, directory: Path, rank: int, ranks: int, port: int
) -> subprocess.Popen[bytes]:
    defaults = {
        "MASTER_ADDR": "127.0.0.1",
        "NODE_RANK": "0",
        "OMP_NUM_THREADS": str(max(1, cores() // ranks)),
    }
    own = {JOB: str(folder / "job.json"), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
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


def _interrupt_rank_zero(
    started: Sequence[subprocess.Popen[bytes]], folder: Path, number: int, seconds: float
) -> None:
    # One that has not reported yet has nothing to save, and may be where a signal prints a traceback.
    if not started or not _read_report(folder, 0):
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


def _read_report(folder: Path, rank: int) -> dict[str, Any]:
    file = folder / f"rank{rank}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _cause(
    directory: Path, codes: Sequence[int], failed: dict[int, float], reports: Sequence[dict[str, Any]]
) -> BaseException:
    """The error of the rank that failed first; the others mostly lost their connection to it."""
    if not failed:
        return RankError(f"rank 0 ended without a result: see {directory / 'run.log'}")
    rank = min(failed, key=lambda rank: reports[rank].get("time", failed[rank]))
    report, code = reports[rank], codes[rank]
    kind, error = report.get("kind"), report.get("error", "")
    if kind == "user":
        return UserError(error)
    if kind == "interrupted":  # rank zero itself received the signal
        return KeyboardInterrupt() if report["code"] == 130 else signals.Terminated(error.partition(": ")[2])
    if kind in ("training", "failed"):
        with contextlib.suppress(OSError), open(directory / "run.log", "a", encoding="utf-8") as file:
            file.write(f"rank {rank}:\n{report['traceback']}")
        return TrainingError(error) if kind == "training" else RankError(f"rank {rank}: {error}")
    if code == -signal.SIGKILL:
        return RankError(
            f"rank {rank} was killed (SIGKILL), possibly because the machine ran out of memory\n"
            "Lower data.batch_size, or run the same command again to resume"
        )
    where = directory / (f"run.rank{rank}.log" if rank else "run.log")
    return RankError(f"rank {rank} ended with exit code {code}: see {where}")


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
    """The job of a rank.

    Attributes:
        config: composed and checked.
        run: with this rank's `rank_zero`.
        report: the file for its outcome.
    """

    config: dict[str, Any]
    run: Run
    report: Path


def job_of_this_rank() -> RankJob | None:
    """The job that `launch` started this process for; None: it is an ordinary process."""
    variable = os.environ.pop(JOB, None)  # processes that a rank starts are no ranks
    if variable is None:
        return None
    file = Path(variable)
    job = json.loads(file.read_text(encoding="utf-8"))
    rank, fields = int(os.environ["LOCAL_RANK"]), job["run"]
    rank_zero = fields["rank_zero"] and rank == 0 and os.environ.get("NODE_RANK", "0") == "0"
    converted = {"directory": Path(fields["directory"]), "overrides": tuple(fields["overrides"])}
    run = Run(**{**fields, **converted, "rank_zero": rank_zero})
    report = file.parent / f"rank{rank}.json"
    if rank == 0:
        signal.signal(signal.SIGINT, signals.raise_it)  # a shell's background job ignores it
    else:  # it takes part in rank zero's collectives until the launcher, which is told, ends it
        for number in signals.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signals.Forward(job["parent"]))
    write_json(report, {"kind": "started"})
    threading.Thread(target=_die_with, args=(job["parent"],), daemon=True, name="parent-watch").start()
    _set_up_logging(run, rank)
    return RankJob(job["config"], run, report)


def run_rank(job: RankJob, work: Callable[[], dict[str, Any]]) -> int:
    """Do a rank's work, write its report and return the exit code."""
    report: dict[str, Any] = {}
    try:
        report = {"kind": "done", "result": work()}
        return 0
    except UserError as error:
        report = {"kind": "user", "error": str(error)}
        return 2
    except BaseException as error:
        interrupt = caused_by_interrupt(error)
        if interrupt is not None:
            code = 143 if isinstance(interrupt, signals.Terminated) else 130
            report = {"kind": "interrupted", "error": describe(interrupt), "code": code}
            return code
        known = isinstance(error, TrainingError)
        report = {
            "kind": "training" if known else "failed",
            "error": str(error) if known else describe(error),
            "traceback": traceback.format_exc(),
        }
        if int(os.environ["LOCAL_RANK"]):
            traceback.print_exc()  # to this rank's own log
        return 1
    finally:
        try:
            write_json(job.report, report | {"time": time.monotonic()})
        except OSError as error:
            log.warning("%s: cannot be written (%s)", job.report, error.strerror or error)


def _die_with(parent: int) -> None:
    """Kill this rank once its launcher is gone, even if that was killed."""
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
    file = RunLog(run.directory / "run.log", encoding="utf-8")
    file.setFormatter(logging.Formatter(full))
    logging.basicConfig(level=logging.INFO, handlers=[console, file], format="%(message)s", force=True)
