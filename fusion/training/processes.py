"""The processes of one DDP job, under Hydra.

Lightning starts the other ranks by running the command line again, `-m` and all: each child would
start the whole sweep once more, and a rank that fails would leave the others waiting. So the app
starts *all* ranks of a job itself, rank zero too, as `torchrun` would: it hands them the composed
and checked job, and Lightning finds its ranks already there (LOCAL_RANK is set). This process
trains nothing. Whatever happens to a rank, its environment, its process group and its memory go
with it, and the next job of a sweep starts afresh.

Who interrupts this process means the job: rank zero alone is told, so that it can end its step and keep
where it is while the other ranks still answer its collectives; what is left then is killed. Rank zero is
the only one that has something to keep.

All waiting is by the monotonic clock, which one machine's processes share and nobody sets.

The commands have nothing to call. In rank zero `run.rank_zero` is true, in the others false; what a
rank's function returns counts for rank zero only.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.config.training import TrainerConfig
from fusion.errors import TrainingError, UserError
from fusion.files import write_json
from fusion.runs import signals
from fusion.runs.run import Run, RunLog, caused_by_interrupt, describe

log = logging.getLogger(__name__)

JOB = "FUSION_RANK_JOB"  # environment: the file that holds a rank's job
POLL = 0.1  # seconds between two looks at the ranks
GRACE = 5.0  # seconds that the other ranks get to end by themselves when one has failed
PATIENCE = 30.0  # seconds that rank zero gets to put down what it holds, and the others to end after it
START = 300.0  # seconds that a rank gets to start Python and read its job
PORTS = 3  # ports to try, where somebody takes the chosen one before the ranks do


class RankError(TrainingError):
    """A rank of a DDP job failed; the others were stopped."""


class PortTaken(RankError):
    """Another program listens where rank zero wanted to."""


# --- in the process that starts the ranks ---------------------------------------------------------


def count(trainer: TrainerConfig) -> int:
    """How many processes the job needs on this machine; 1: this one does.

    Raises:
        UserError: Lightning knows no such accelerator, strategy or devices here.
    """
    if trainer.devices in (1, "1") and trainer.num_nodes == 1:
        return 1  # the common case needs no Lightning
    import pytorch_lightning as pl
    from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

    talk = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = talk.level
    talk.setLevel(logging.WARNING)
    try:
        planned = pl.Trainer(
            accelerator=trainer.accelerator,
            strategy=trainer.strategy,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except Exception as error:
        asked = f"trainer.accelerator={trainer.accelerator} trainer.devices={trainer.devices}"
        raise UserError(f"{asked} trainer.strategy={trainer.strategy}: {error}") from error
    finally:
        talk.setLevel(level)
    if not isinstance(planned.strategy.launcher, _SubprocessScriptLauncher):
        return 1  # one device, or a strategy that forks
    environment = planned.strategy.launcher.cluster_environment
    return 1 if environment.creates_processes_externally else planned.num_devices  # else: SLURM, torchrun


def program(function: Callable[..., Any]) -> list[str]:
    """The command that starts this program again, without its arguments."""
    module = function.__module__
    if module == "__main__" and (spec := sys.modules["__main__"].__spec__) is not None:
        module = spec.name  # python -m fusion.stage1
    if module == "__main__":
        return [sys.executable, os.path.abspath(sys.argv[0])]
    return [sys.executable, "-m", module]


def launch(program: list[str], config: dict[str, Any], run: Run, ranks: int) -> dict[str, Any]:
    """Runs one job in `ranks` processes and gives what rank zero's function returned.

    If a rank fails, the others are stopped within seconds. If this process is interrupted, rank zero gets
    `PATIENCE` seconds to end in order; a second interruption ends all ranks at once. Ranks above zero write
    to `run.rank1.log` and so on; the traceback of the rank that failed first is in run.log as well.

    Raises:
        UserError: a rank raised one; or MASTER_PORT is no port, or taken.
        TrainingError: a rank raised one.
        RankError: a rank failed or was killed.
    """
    for left in reversed(range(PORTS)):
        port = _port()
        try:
            return _launch(program, config, run, ranks, port)
        except PortTaken as error:
            if _asked_port() is not None:
                raise _taken(port) from error
            log.warning("port %d was taken by another program%s", port, ": trying another" if left else "")
        except OSError as error:
            raise RankError(
                f"the processes of this job could not be started: {error}; is a disk full ({tempfile.gettempdir()})?"
            ) from error
    raise RankError(f"{PORTS} free ports were taken before they could be used: MASTER_PORT=PORT says one")


def _launch(program: list[str], config: dict[str, Any], run: Run, ranks: int, port: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fusion-ranks-", ignore_cleanup_errors=True) as folder:
        described = {"run": {**vars(run), "directory": str(run.directory)}, "config": config}
        job = Path(folder) / "job.json"
        write_json(job, described | {"parent": os.getpid()})
        started: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(ranks):
                started.append(_start(program, job, run.directory, rank, ranks, port))
            ended = _wait(started, Path(folder))
            if ended:
                _interrupt(started, Path(folder), signal.SIGINT, GRACE)
        except Exception:
            raise
        except BaseException as error:
            number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            _interrupt(started, Path(folder), number, PATIENCE)
            raise
        finally:
            _kill(started)
        reports = {rank: _read_report(Path(folder), rank) for rank in range(ranks)}
        if not ended and reports[0].get("kind") == "done":
            return reports[0]["result"]
        raise _cause(run.directory, started, ended, reports)


def _wait(started: list[subprocess.Popen[bytes]], folder: Path) -> dict[int, float]:
    """Until all ranks have ended, or those that will not end by themselves have had their time.

    Returns:
        The ranks that have failed, each with when that was seen.
    """
    ended: dict[int, float] = {}
    begun, finished = time.monotonic(), None
    while any(process.poll() is None for process in started):
        now = time.monotonic()
        for rank, process in enumerate(started):
            if process.poll():
                ended.setdefault(rank, now - POLL)
            elif process.returncode is None and now - begun > START and not _has_begun(folder, rank):
                raise RankError(f"rank {rank} did not start within {START:g} s: run the same command again")
        if started[0].returncode == 0 and finished is None:
            finished = now  # its result is there: nobody waits for ever for a rank that cannot end
        if (ended and now - min(ended.values()) > GRACE) or (
            finished is not None and now - finished > PATIENCE
        ):
            break
        time.sleep(POLL)
    for rank, process in enumerate(started):
        if process.poll():
            ended.setdefault(rank, time.monotonic() - POLL)
    return ended


def _start(
    program: list[str], job: Path, directory: Path, rank: int, ranks: int, port: int
) -> subprocess.Popen[bytes]:
    environment = os.environ.copy()
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("NODE_RANK", "0")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    environment.update({JOB: str(job), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)})
    # A session of its own: a Ctrl-C reaches this process alone, which then stops the ranks.
    if rank == 0:
        return subprocess.Popen(program, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    with open(directory / f"run.rank{rank}.log", "ab") as output:
        return subprocess.Popen(
            program,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _port() -> int:
    """Where the ranks meet: MASTER_PORT where somebody has set it, else one that is free now."""
    port = _asked_port()
    if port is None:
        return _free_port()
    if os.environ.get("NODE_RANK", "0") == "0":  # on another machine it is rank zero's to listen there
        try:
            socket.create_server(("", port)).close()
        except OSError:
            raise _taken(port) from None
    return port


def _asked_port() -> int | None:
    asked = os.environ.get("MASTER_PORT")
    if asked is None:
        return None
    if not asked.isdecimal() or not 0 < int(asked) < 2**16:
        raise UserError(
            f"MASTER_PORT={asked}: expected a port, 1 to 65535; without it a free one is chosen: unset MASTER_PORT"
        )
    return int(asked)


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def _taken(port: int) -> UserError:
    return UserError(
        f"MASTER_PORT={port}: another program listens there, and the processes of this job cannot meet\n"
        "Without it a free port is chosen: unset MASTER_PORT, or set it to another one"
    )


def _interrupt(started: list[subprocess.Popen[bytes]], folder: Path, number: int, seconds: float) -> None:
    """Lets rank zero end in order. The others are left to answer it; whoever interrupts again ends all at once."""
    if not started or started[0].poll() is not None:
        return
    if not _has_begun(
        folder, 0
    ):  # it has nothing to save, and a starting interpreter would print a traceback
        return
    started[0].send_signal(number)
    deadline = time.monotonic() + seconds
    # Polled, since Popen.wait takes a Ctrl-C for one that its child has got as well.
    while started[0].poll() is None and time.monotonic() < deadline:
        time.sleep(POLL)


def _kill(started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        if process.poll() is None:
            process.kill()
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):  # the system has not let go of it yet
            process.wait(GRACE)


def _has_begun(folder: Path, rank: int) -> bool:
    return (folder / f"rank{rank}.begun").exists()


def _read_report(folder: Path, rank: int) -> dict[str, Any]:
    file = folder / f"rank{rank}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _cause(
    directory: Path,
    started: list[subprocess.Popen[bytes]],
    ended: dict[int, float],
    reports: dict[int, dict[str, Any]],
) -> BaseException:
    """The error of the rank that failed first; the others mostly lost their connection to it."""
    failed = {rank: reports[rank].get("time", seen) for rank, seen in ended.items()}
    if not failed:
        return RankError(f"rank 0 ended without a result: see {directory / 'run.log'}")
    rank = min(failed, key=failed.__getitem__)
    report, code = reports[rank], started[rank].returncode
    if report.get("kind") == "user":
        return UserError(report["error"])
    if "traceback" in report:
        with contextlib.suppress(OSError), open(directory / "run.log", "a", encoding="utf-8") as file:
            file.write(f"rank {rank}:\n{report['traceback']}")
        if report["kind"] == "training":
            return TrainingError(report["error"])
        kind = PortTaken if "EADDRINUSE" in report["error"] else RankError
        return kind(f"rank {rank}: {report['error']}")
    if report.get("kind") == "interrupted":  # it was told by somebody else than this process
        return (
            KeyboardInterrupt()
            if report["code"] == 130
            else signals.Terminated(report["error"].partition(": ")[2])
        )
    if code == -signal.SIGKILL:
        return RankError(
            f"rank {rank} was killed (SIGKILL), by somebody or by the system where memory runs out\n"
            "A smaller data.batch_size= takes less; the same command goes on"
        )
    how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    where = directory / ("run.log" if rank == 0 else f"run.rank{rank}.log")
    return RankError(f"rank {rank} {how}: see {where}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# --- in a rank ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankJob:
    """What a rank was given: the composed and checked config, and the run with this rank's view."""

    config: dict[str, Any]
    run: Run
    report: Path


def job_of_this_rank() -> RankJob | None:
    """The job this process was started for by `launch`; None: it is an ordinary process."""
    file = os.environ.pop(JOB, None)  # what a rank starts in its turn is no rank
    if file is None:
        return None
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    rank = int(os.environ["LOCAL_RANK"])
    fields = job["run"]
    first = rank == 0 and int(os.environ.get("NODE_RANK", "0")) == 0
    run = Run(
        **fields
        | {
            "directory": Path(fields["directory"]),
            "overrides": tuple(fields["overrides"]),
            "rank_zero": first and fields["rank_zero"],
        }
    )
    if rank == 0:
        signal.signal(signal.SIGINT, signals.raise_it)  # a shell's background job ignores it
    else:
        # This one answers rank zero until the process that started it ends it: that one is told.
        for number in signals.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signals.Forward(job["parent"]))
    (Path(file).parent / f"rank{rank}.begun").touch()
    _end_with(job["parent"])
    _set_up_logging(run, rank)
    return RankJob(job["config"], run, Path(file).parent / f"rank{rank}.json")


def run_rank(job: RankJob, work: Callable[[], dict[str, Any]]) -> int:
    """Does a rank's work, reports its outcome to the process that started it; gives the exit code."""
    report: dict[str, Any] = {}
    try:
        report = {"kind": "done", "result": work()}
        return 0
    except UserError as error:
        report = {"kind": "user", "error": str(error)}
        return 2
    except BaseException as error:
        interrupt = caused_by_interrupt(error)
        report = {"kind": "failed", "error": describe(interrupt or error)}
        if interrupt is not None:
            code = 143 if isinstance(interrupt, signals.Terminated) else 130
            report |= {"kind": "interrupted", "code": code}
            return code
        if isinstance(error, TrainingError):
            report = {"kind": "training", "error": str(error)}
        report["traceback"] = traceback.format_exc()
        if int(os.environ["LOCAL_RANK"]):
            traceback.print_exc()  # to this rank's own log
        return 1
    finally:
        try:
            write_json(job.report, report | {"time": time.monotonic()})
        except OSError as error:
            log.warning("%s: cannot be written (%s)", job.report, error.strerror or error)


def _end_with(parent: int) -> None:
    """Ends this rank if the process that started it is gone, were it killed outright."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _set_up_logging(run: Run, rank: int) -> None:
    """Rank zero logs as a job of one process does; the others to their own file, warnings only."""
    console = logging.StreamHandler(sys.stdout)
    full = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    if rank:
        logging.basicConfig(level=logging.WARNING, handlers=[console], format=full, force=True)
        return
    file = RunLog(run.directory / "run.log", encoding="utf-8")
    file.setFormatter(logging.Formatter(full))
    logging.basicConfig(level=logging.INFO, handlers=[console, file], format="%(message)s", force=True)
