"""Worker processes of a suite, and the rounds in which their measurements are interleaved."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, TypeVar

from pipelines.benchmark.cases import Case, Setup
from pipelines.benchmark.config import BenchmarkConfig, BenchmarkError
from pipelines.benchmark.formulas import Backbone
from pipelines.benchmark.random_backbone import save_random_backbone
from pipelines.benchmark.report import Measured, Timings
from pipelines.commands import python_path, say

Name = TypeVar("Name")
Result = TypeVar("Result")
OURS, BASELINE = "ours", "rival"
LOGITS_LIMIT = 1e-4  # larger differences mean that the two models are not equal and cannot be compared
CLOSING_SECONDS = 10.0
# The baseline's trainer needs `accelerate`, which it does not list as a requirement.
PACKAGES = ("adapters==1.3.0", "torch==2.13.0", "accelerate>=1.1,<2")


def environment(threads: int) -> dict[str, str]:
    """Return this process's environment with the number of threads set for every library."""
    more = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return os.environ | more | quiet | {"PYTHONPATH": python_path()}


class WorkerProcess:
    """A process that answers requests on its stdin, one end of a pipe; its output is written to `log`."""

    def __init__(self, name: str, command: list[str], log: Path, threads: int, timeout: float) -> None:
        self.name, self.log, self.timeout = name, log, timeout
        self._pipe, other = Pipe()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=other.fileno(), stdout=output, stderr=subprocess.STDOUT, env=environment(threads)
            )
        other.close()
        if hasattr(os, "sched_setaffinity"):  # the threads that it starts later inherit this
            os.sched_setaffinity(self._process.pid, sorted(os.sched_getaffinity(0))[:threads])

    def ask(self, do: str, **arguments: Any) -> Any:
        """Call a method of the worker and return its result. Raises BenchmarkError if it fails or times out."""
        try:
            self._pipe.send_bytes(json.dumps({"do": do, **arguments}, default=asdict).encode())
            if self._pipe.poll(self.timeout):
                answer = json.loads(self._pipe.recv_bytes())
            else:
                self._process.kill()
                answer = {"error": f"did not answer within {self.timeout:g} s"}
        except (EOFError, OSError):
            answer = {"error": f"exited with code {self._process.wait()}"}
        if "error" in answer:
            problem = answer["error"].partition("\n")[0]
            raise BenchmarkError(f"worker {self.name}, {do}: {problem} (log: {self.log})")
        return answer["result"]

    def close(self) -> None:
        """Close the pipe, which ends the worker; kill it if it does not exit in time."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSING_SECONDS)
        self._process.kill()
        self._process.wait()


def baseline_python(venv: str | None, output: Path) -> str:
    """Return the baseline's Python interpreter: of `venv`, or of OUTPUT/rival-venv, which is created on first use."""
    folder = Path(venv).expanduser() if venv else output / "rival-venv"
    # Not resolved: the interpreter finds its packages by the location of the link.
    python = (folder / "bin" / "python").absolute()
    stamp = folder / ".installed"
    if venv and not python.is_file():
        raise BenchmarkError(f"rival.venv={venv}: expected a virtual environment with {python}")
    if venv or (stamp.is_file() and stamp.read_text(encoding="utf-8").split("\n") == list(PACKAGES)):
        return str(python)
    say(f"Installing the baseline ({', '.join(PACKAGES)}) into {folder}: this takes a few minutes, once")
    log = output / "rival-venv.log"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", *PACKAGES]
    with log.open("wb") as file:
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], pip):
            if code := subprocess.call(command, stdout=file, stderr=subprocess.STDOUT):
                raise BenchmarkError(
                    f"the baseline could not be installed: pip exited with code {code} (log: {log}); "
                    "rival.venv=FOLDER uses an existing environment"
                )
    stamp.write_text("\n".join(PACKAGES), encoding="utf-8")
    return str(python)


class Session:
    """Starts each worker on first use; `close` stops all of them and removes the temporary folder."""

    def __init__(self, config: BenchmarkConfig) -> None:
        from fusion.backbones.files import locate
        from fusion.backbones.precision import hardware_dtype
        from fusion.model.inference import device_of

        self.config = config
        self.output = Path(config.output)
        self.work = (self.output / "work" / config.suite).absolute()
        self.threads = config.thread_count
        self.versions: dict[str, Any] = {}
        self._workers: dict[str, WorkerProcess] = {}
        folder = Path(locate(config.backbone.name_or_path)).absolute()
        device = device_of(config.device).type
        automatic = "bf16" if device == "cuda" else "float32"
        precision = automatic if config.precision == "auto" else config.precision
        dtype = hardware_dtype(device) if config.dtype == "auto" else config.dtype
        self.half = None if dtype == "float32" else dtype  # dtype of additional measurements
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        if config.shape is not None and config.suite != "families":
            layers, hidden_size = config.shape
            folder = save_random_backbone(folder, layers, hidden_size, self.work / "backbone")
        batch = (config.batch_size, config.tokens, self.threads, config.seed)
        self.setup = Setup(str(folder), *batch, device, precision)
        self.backbone = Backbone.read(str(folder))
        self.bottleneck = max(1, self.backbone.hidden_size // 16)  # R at the default reduction factor

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        shutil.rmtree(self.work, ignore_errors=True)
        with contextlib.suppress(OSError):  # another suite may be running
            self.work.parent.rmdir()

    def worker(self, name: str) -> WorkerProcess:
        if name not in self._workers:
            log = self.output / f"{self.config.suite}-{name}.log"
            worker = WorkerProcess(name, self.command(name), log, self.threads, self.config.timeout)
            self._workers[name] = worker
            self.versions[name] = worker.ask("prepare", setup=self.setup)
        return self._workers[name]

    def use_model(self, model_type: str, settings: dict[str, Any]) -> None:
        """Let both workers build a model with random weights in place of the backbone from now on."""
        self.setup = replace(self.setup, model_type=model_type, settings=settings)
        for worker in self._workers.values():
            worker.ask("prepare", setup=self.setup)

    def command(self, name: str) -> list[str]:
        if name == OURS:
            return [sys.executable, "-m", "pipelines.benchmark.ours"]
        return [baseline_python(self.config.rival.venv, self.output), "-m", "pipelines.benchmark.baseline"]

    def agreement(self, cases: Sequence[Case]) -> list[dict[str, Any]]:
        """Return the largest differences between both implementations on one padded batch, with dropout off."""
        import numpy as np

        found = []
        for case in cases:
            ours, theirs = (self.worker(name).ask("check", case=case) for name in (OURS, BASELINE))
            differences = {
                "logits": float(np.abs(np.subtract(ours["logits"], theirs["logits"])).max()),
                "loss": abs(ours["loss"] - theirs["loss"]),
                "penalty": abs(ours["penalty"] - theirs["penalty"]) / max(1.0, abs(ours["penalty"])),
            }
            shown = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
            say(f"{case}, same weights and batch: largest differences: {shown}")
            if not all(value <= LOGITS_LIMIT for value in differences.values()):  # also raises for NaN
                raise BenchmarkError(f"{case}: ours and the baseline differ by more than {LOGITS_LIMIT:g} ({shown})")
            found.append({"case": asdict(case), **differences})
        return found

    def rounds(self, parts: Mapping[Name, Callable[[], Result]]) -> dict[Name, list[Result]]:
        """Call each function once per round, in reverse order in every second round, and return all results by name."""
        found: dict[Name, list[Result]] = {name: [] for name in parts}
        rounds = self.config.round_count
        for number in range(rounds):
            for name in list(parts)[:: 1 if number % 2 == 0 else -1]:
                found[name].append(parts[name]())
            say(f"round {number + 1} of {rounds} done")
        return found

    def time(self, measured: Sequence[Measured], forget: bool = False) -> Timings:
        """Time the cases in rounds. With `forget`, delete each model afterwards: all may not fit in memory."""
        for name in dict.fromkeys(who for who, _ in measured):
            self.worker(name)  # start it before the first round

        def seconds(who: str, case: Case) -> list[float]:
            found: list[float] = self.worker(who).ask(
                "time", case=case, warmup=self.config.warmup, steps=self.config.steps
            )
            if forget:
                self.worker(who).ask("forget")
            return found

        return self.rounds({pair: partial(seconds, *pair) for pair in measured})

    def peak(self, who: str, case: Case) -> int:
        """Return the peak bytes of tensors in a step, above those after loading."""
        return int(self.worker(who).ask("peak", case=case))
