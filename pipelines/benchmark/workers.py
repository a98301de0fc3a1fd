"""The coordinator's side: a worker process that is asked one thing at a time and answers, or is given up."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
from pathlib import Path
from typing import Any

from pipelines.benchmark.errors import BenchmarkError
from pipelines.commands import python_path

CLOSING_SECONDS = 10.0


def worker_environment(threads: int) -> dict[str, str]:
    """This process's environment, with the thread count said to every library that has one of its own."""
    more = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return os.environ | more | quiet | {"PYTHONPATH": python_path()}


class WorkerProcess:
    """A program that answers JSON lines; its stderr goes to `log`.

    Raises (from `ask`):
        BenchmarkError: it died, answered an error, or took longer than `timeout` seconds.
    """

    def __init__(self, name: str, command: list[str], log: Path, threads: int, timeout: float) -> None:
        self.name, self.log, self.timeout = name, log, timeout
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                env=worker_environment(threads),
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        # A thread reads, since a pipe cannot be read with a time limit everywhere.
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: the missing answer says so
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        try:
            line = self._lines.get(timeout=self.timeout)
        except queue.Empty:
            self._process.kill()
            raise self._error(do, f"took more than {self.timeout:g} s") from None
        if line is None:
            raise self._error(do, f"ended with exit code {self._process.wait()}")
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._error(do, f"answered {line.strip()[:80]!r}") from None
        if "error" in answer:
            raise self._error(do, str(answer["error"]).splitlines()[0])
        return answer

    def _error(self, do: str, what: str) -> BenchmarkError:
        return BenchmarkError(f"the worker {self.name}, asked for {do}, {what} (log: {self.log})")

    def close(self) -> None:
        """Lets it end by itself, or ends it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
