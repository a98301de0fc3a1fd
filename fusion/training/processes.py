"""The processes of a DDP job under Hydra.

Lightning launches the other ranks by rerunning the command line: with `-m`, each rank would start the whole sweep, and
if a rank fails, the others wait forever. Therefore the app launches *all* ranks of a job itself, as torchrun does, with
the composed config; Lightning sees LOCAL_RANK and launches no further processes. The launcher does not train.

A signal to the launcher is forwarded to rank 0 only, which finishes its step and writes a checkpoint while the other
ranks still run its collectives; then all are killed. All times are measured with `time.monotonic`.
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

T = TypeVar("T")

JOB = "FUSION_RANK_JOB"  # environment variable with the directory of a rank's job
POLL = 0.1  # seconds between polls of the ranks
GRACE = 5.0  # seconds until the other ranks are killed after one failed
PATIENCE = 30.0  # seconds until rank 0 is killed after an interrupt, and the others after rank 0 exited


class RankError(TrainingError):
    """Raised if a rank of a DDP job failed; the other ranks are stopped."""


_ERRORS: dict[str, type[BaseException]] = {
    error.__name__: error for error in (UserError, TrainingError, RankError, KeyboardInterrupt, signals.Terminated)
}


def count(trainer: TrainerConfig) -> int:
    """Return the number of processes to start for a job on this machine: 1 if this is one that torchrun started.

    Raises UserError if Lightning rejects the settings, or they do not match torchrun's.
    """
    by_torchrun = os.environ.get("LOCAL_WORLD_SIZE")
    if trainer.devices in (1, "1") and trainer.num_nodes == 1 and not trainer.shards and by_torchrun is None:
        return 1  # the common case, without importing Lightning
    import pytorch_lightning as pl

    from fusion.training.lightning_internals import processes_to_start

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its tips
    keys = ("accelerator", "strategy", "devices", "num_nodes")
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {key: trainer.arguments()[key] for key in keys} | dict.fromkeys(off, False)
    given = " ".join(f"trainer.{key}={getattr(trainer, key)}" for key in keys)
    try:
        planned = pl.Trainer(**settings)
    except Exception as error:
        raise UserError(f"{given}: {error}") from error
    if by_torchrun is not None:
        nodes = int(os.environ["WORLD_SIZE"]) // int(by_torchrun)
        if (planned.num_devices, planned.num_nodes) != (int(by_torchrun), nodes):
            raise UserError(
                f"{given}: torchrun started {by_torchrun} processes on each of {nodes} nodes; expected "
                f"trainer.devices={by_torchrun} trainer.num_nodes={nodes}"
            )
    if trainer.shards and planned.world_size == 1:
        raise UserError(
            f"{given}: there is only one process, so nothing can be sharded; expected trainer.devices=2 or more"
        )
    return processes_to_start(planned)


def program(function: Callable[..., Any]) -> list[str]:
    """Return the command that starts this program, without its arguments."""
    module = function.__module__
    if module == "__main__" and (spec := sys.modules["__main__"].__spec__) is not None:
        module = spec.name  # python -m fusion.stage1
    if module == "__main__":
        return [sys.executable, os.path.abspath(sys.argv[0])]
    return [sys.executable, "-m", module]


def cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(program: list[str], config: dict[str, Any], run: Run, ranks: int) -> dict[str, Any]:
    """Run one job in `ranks` processes and return the result of rank 0.

    Other ranks write to `run.rank1.log` and so on. The raised error's cause has the traceback of the rank that failed
    first. A second interrupt kills all ranks immediately.

    Raises:
        UserError, TrainingError: if a rank raised it, or MASTER_PORT cannot be used.
        RankError: if a rank failed with a different error, was killed or could not be started.
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
                f"the processes of this job could not be started: {error}; check the free disk space of {folder.parent}"
            ) from error
        except BaseException as error:
            number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            _interrupt_rank_zero(started, folder, number, PATIENCE)
            raise
        finally:
            for process in started:
                process.kill()  # no effect on a process that has exited
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):  # in an uninterruptible system call
                    process.wait(GRACE)
        outcomes = {rank: outcome for rank in range(ranks) if (outcome := read_json(folder / f"outcome{rank}"))}
    if not failed and 0 in outcomes:
        result: dict[str, Any] = outcomes[0]["result"]
        return result
    # The other ranks mostly fail because they lost the connection to the first failed rank.
    first = min(failed, key=lambda rank: outcomes[rank]["time"] if rank in outcomes else failed[rank], default=0)
    if (found := outcomes.get(first)) is not None and "error" in found:
        cause = RuntimeError(found["trace"]) if found["trace"] else None
        raise _ERRORS[found["error"]](*found["args"]) from cause
    code = started[first].returncode
    if code == -signal.SIGKILL:
        raise RankError(
            f"rank {first} was killed (SIGKILL), possibly because the machine ran out of memory\n"
            "Lower data.batch_size, or rerun the same command to resume"
        )
    log_file = run.directory / (f"run.rank{first}.log" if first else "run.log")
    raise RankError(f"rank {first} exited with code {code}: see {log_file}")


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
            start_new_session=True,  # so that Ctrl-C reaches the launcher only
        )


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> dict[int, float]:
    """Wait until all ranks have exited, or for a limited time after one has failed or rank 0 has exited.

    Returns the failed ranks, each with the time at which the failure was detected.
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
    # Before rank 0 starts its job, there is nothing to save, and a signal would print a traceback.
    if not started or not (folder / "started0").exists():
        return
    started[0].send_signal(number)
    deadline = time.monotonic() + seconds
    # Popen.wait would assume that Ctrl-C reached the child as well.
    while started[0].poll() is None and time.monotonic() < deadline:
        time.sleep(POLL)


def _port() -> int:
    """Return the rendezvous port: MASTER_PORT, or a free port. Raises UserError if MASTER_PORT cannot be used."""
    given = os.environ.get("MASTER_PORT", "0")
    try:
        if os.environ.get("NODE_RANK", "0") != "0":  # rank 0 listens on a different machine
            return int(given)
        with socket.create_server(("", int(given))) as probe:
            return int(probe.getsockname()[1])
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"MASTER_PORT={given}: expected a free port, 1 to 65535 ({error})\n"
            "Unset MASTER_PORT to select a free port automatically"
        ) from None


@dataclass(frozen=True)
class RankJob:
    rank: int
    config: dict[str, Any]
    run: Run
    folder: Path  # with the files that the ranks share with their launcher


def job_of_this_rank() -> RankJob | None:
    """Return the job that `launch` started this process for, or `None` if this process is not a rank."""
    variable = os.environ.pop(JOB, None)  # child processes of a rank are not ranks
    if variable is None:
        return None
    folder, rank = Path(variable), int(os.environ["LOCAL_RANK"])
    job = read_json(folder / "job")
    values, parent = job["run"], job["parent"]
    run = Run(**(values | {"directory": Path(values["directory"]), "overrides": tuple(values["overrides"])}))
    first = rank == 0 and os.environ.get("NODE_RANK", "0") == "0"
    run = replace(run, rank_zero=run.rank_zero and first)
    if rank == 0:
        signal.signal(signal.SIGINT, signals.raise_it)  # background jobs of a shell ignore SIGINT
    else:  # the rank forwards signals to the launcher and runs rank 0's collectives until the launcher kills it
        for number in signals.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signals.Forward(parent))
    (folder / f"started{rank}").touch()
    threading.Thread(target=_die_with, args=(parent,), daemon=True, name="parent-watch").start()
    _set_up_logging(run, rank)
    return RankJob(rank, job["config"], run, folder)


def run_rank(job: RankJob, work: Callable[[], dict[str, Any]]) -> int:
    """Run a rank's job, write its result or error for the launcher and return the exit code."""
    result: dict[str, Any] = {}
    raised: BaseException | None = None
    code, trace = 0, ""
    try:
        result = work()
    except UserError as error:
        raised, code = UserError(str(error)), 2
    except BaseException as error:
        interrupt = caused_by_interrupt(error)
        if isinstance(interrupt, signals.Terminated):
            raised, code = interrupt, 143
        elif interrupt is not None:
            raised, code = KeyboardInterrupt(), 130
        else:
            known = isinstance(error, TrainingError)
            raised = TrainingError(str(error)) if known else RankError(f"rank {job.rank}: {describe(error)}")
            code, trace = 1, traceback.format_exc()
            if job.rank:
                traceback.print_exc()  # to this rank's log file
    outcome = {"time": time.monotonic(), "result": result, "trace": trace}
    if raised is not None:
        outcome |= {"error": type(raised).__name__, "args": list(raised.args)}
    write_json(job.folder / f"outcome{job.rank}", outcome)
    return code


def gathered(own: T) -> list[T]:
    """Return the objects of all processes, by rank; `[own]` without DDP. Collective: must be called on all ranks."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, own)
    return everywhere


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def _set_up_logging(run: Run, rank: int) -> None:
    """Set up logging: rank 0 as in a single-process job, other ranks only warnings, to their own file."""
    console = logging.StreamHandler(sys.stdout)
    full = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    if rank:
        logging.basicConfig(level=logging.WARNING, handlers=[console], format=full, force=True)
        return
    file = logging.FileHandler(run.directory / "run.log", encoding="utf-8")
    file.setFormatter(logging.Formatter(full))
    logging.basicConfig(level=logging.INFO, handlers=[console, file], format="%(message)s", force=True)
