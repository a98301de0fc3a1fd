"""The processes of one DDP job, under Hydra.

Lightning starts the other ranks by running the command line again, `-m` and all: each child would
start the whole sweep once more, and a rank that fails would leave the others waiting. So the app
starts *all* ranks of a job itself, rank zero too, as `torchrun` would: it hands them the composed
and checked job, and Lightning finds its ranks already there (LOCAL_RANK is set). This process
trains nothing. Whatever happens to a rank, its environment, its process group and its memory go
with it, and the next job of a sweep starts afresh.

The commands have nothing to call. In rank zero `run.rank_zero` is true, in the others false; what a
rank's function returns counts for rank zero only.
"""

from __future__ import annotations

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

from fusion.config import TrainerConfig
from fusion.errors import UserError
from fusion.run import Run, Terminated, caused_by_interrupt, describe, write_json

log = logging.getLogger(__name__)

JOB = "FUSION_RANK_JOB"  # environment: the file that holds a rank's job
POLL = 0.1  # seconds between two looks at the ranks
GRACE = 5.0  # seconds that the other ranks get to end by themselves when one has failed
PATIENCE = 15.0  # seconds that interrupted ranks get to put down what they hold


class RankError(Exception):
    """A rank of a DDP job failed; the others were stopped."""


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

    If a rank fails, the others are stopped within seconds. Ranks above zero write to
    `run.rank1.log` and so on; the traceback of the rank that failed first is in run.log as well.

    Raises:
        UserError: a rank raised one.
        RankError: a rank failed or was killed.
    """
    with tempfile.TemporaryDirectory(prefix="fusion-ranks-") as folder:
        described = {"run": {**vars(run), "directory": str(run.directory)}, "config": config}
        job = Path(folder) / "job.json"
        write_json(job, described | {"parent": os.getpid()})
        started: list[subprocess.Popen[bytes]] = []
        ended: dict[int, float] = {}  # rank -> when it was seen to have failed
        try:
            for rank in range(ranks):
                started.append(_start(program, job, run.directory, rank, ranks))
            while any(process.poll() is None for process in started):
                for rank, process in enumerate(started):
                    if process.poll():
                        ended.setdefault(rank, time.time() - POLL)
                if ended and time.time() - min(ended.values()) > GRACE:
                    break
                time.sleep(POLL)
            for rank, process in enumerate(started):
                if process.poll():
                    ended.setdefault(rank, time.time() - POLL)
        finally:
            _stop(started, GRACE if ended else PATIENCE)
        reports = {rank: _read_report(Path(folder), rank) for rank in range(ranks)}
        if not ended and reports[0].get("kind") == "done":
            return reports[0]["result"]
        raise _cause(run.directory, started, ended, reports)


def _start(program: list[str], job: Path, directory: Path, rank: int, ranks: int) -> subprocess.Popen[bytes]:
    environment = os.environ.copy()
    environment.setdefault("MASTER_ADDR", "127.0.0.1")
    environment.setdefault("MASTER_PORT", _free_port(job.parent))
    environment.setdefault("NODE_RANK", "0")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ranks)))
    environment.update({JOB: str(job), "LOCAL_RANK": str(rank)})
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


def _free_port(folder: Path) -> str:
    """One port for all ranks of the job."""
    chosen = folder / "port"
    if not chosen.exists():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            chosen.write_text(str(probe.getsockname()[1]))
    return chosen.read_text()


def _stop(started: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Interrupts what still runs, and kills what does not listen (a rank that waits in a collective)."""
    running = [process for process in started if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGINT)
    deadline = time.time() + seconds
    for process in running:
        try:
            process.wait(max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read_report(folder: Path, rank: int) -> dict[str, Any]:
    file = folder / f"rank{rank}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _cause(
    directory: Path,
    started: list[subprocess.Popen[bytes]],
    ended: dict[int, float],
    reports: dict[int, dict[str, Any]],
) -> Exception:
    """The error of the rank that failed first; the others mostly lost their connection to it."""
    failed = {rank: reports[rank].get("time", seen) for rank, seen in ended.items()}
    if not failed:
        return RankError("rank 0 ended without a result")
    rank = min(failed, key=failed.__getitem__)
    report, code = reports[rank], started[rank].returncode
    if report.get("kind") == "user":
        return UserError(report["error"])
    if "traceback" in report:
        with open(directory / "run.log", "a", encoding="utf-8") as file:
            file.write(f"rank {rank}:\n{report['traceback']}")
        return RankError(f"rank {rank}: {report['error']}")
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    where = directory / ("run.log" if rank == 0 else f"run.rank{rank}.log")
    return RankError(f"rank {rank} {how}: see {where}")


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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
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
            return 143 if isinstance(interrupt, Terminated) else 130
        report["traceback"] = traceback.format_exc()
        if int(os.environ["LOCAL_RANK"]):
            traceback.print_exc()  # to this rank's own log
        return 1
    finally:
        if report:
            write_json(job.report, report | {"time": time.time()})


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
    file = logging.FileHandler(run.directory / "run.log", encoding="utf-8")
    file.setFormatter(logging.Formatter(full))
    logging.basicConfig(level=logging.INFO, handlers=[console, file], format="%(message)s", force=True)
