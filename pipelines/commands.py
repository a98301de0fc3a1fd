"""What the journeys share: their own few settings, and running the project's commands one after another."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, NoReturn, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from fusion.errors import UserError
from fusion.runs.signals import SIGNALS, Terminated, raised
from fusion.text import quoted

Settings = TypeVar("Settings")
ROOT = Path(__file__).resolve().parent.parent
# How a command says that somebody wanted it to stop; below 0 where the signal came before it could say so.
INTERRUPTED = {130: 130, 143: 143} | {-n: 130 if n == signal.SIGINT else 143 for n in SIGNALS}


def say(text: str) -> None:
    """A line for the terminal; the commands write there too, so it must keep its place."""
    print(text, flush=True)


def python_path() -> str:
    """PYTHONPATH with the project in front, for a program that is started anywhere."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `errors`: the last lines that it wrote to stderr, where they were kept."""

    code: int
    seconds: float
    errors: tuple[str, ...] = ()


def call(module: str, overrides: list[str], without: tuple[str, ...] = ()) -> float:
    """Run a command with its output shown, and give its seconds.

    Args:
        without: variables of the environment that it must not see.

    Raises:
        SystemExit: it failed or was interrupted; with its exit code.
    """
    outcome = _run(module, overrides, without, keep_errors=False)
    if outcome.code != 0:
        _give_up(outcome.code)
    return outcome.seconds


def attempt(module: str, overrides: list[str]) -> Outcome:
    """Run a command with its output shown, and say how it ended: a failure is not the end of the journey.

    Raises:
        SystemExit: it was interrupted (130) or terminated (143).
    """
    outcome = _run(module, overrides, (), keep_errors=True)
    if outcome.code in INTERRUPTED:
        _give_up(INTERRUPTED[outcome.code])
    return outcome


def _give_up(code: int) -> NoReturn:
    say(
        f"the command above ended with exit code {code}; what is done is kept, and the next start goes on there"
    )
    raise SystemExit(code)


def _run(module: str, overrides: list[str], without: tuple[str, ...], keep_errors: bool) -> Outcome:
    say("$ " + typed(module, overrides))
    environment = {key: value for key, value in os.environ.items() if key not in without}
    environment["PYTHONPATH"] = python_path()
    environment["FUSION_NEXT"] = "0"  # the journey itself knows what comes next
    start = time.monotonic()
    errors: deque[str] = deque(maxlen=20)
    with (
        raised(),
        subprocess.Popen(
            [sys.executable, "-m", module, *map(quoted, overrides)],
            env=environment,
            stderr=subprocess.PIPE if keep_errors else None,
            text=True,
            errors="replace",
        ) as process,
    ):
        shown = threading.Thread(target=_pass_on, args=(process.stderr, errors), daemon=True)
        shown.start()
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = _end(process, signal.SIGINT, 130)
        except Terminated:
            code = _end(process, signal.SIGTERM, 143)
        shown.join()
    return Outcome(code, time.monotonic() - start, tuple(errors))


def _end(process: subprocess.Popen[str], number: signal.Signals, code: int) -> int:
    """Let the command end in order; a second signal ends it at once.

    A Ctrl-C has reached the command as well, which takes what comes twice within a second as one.
    """
    process.send_signal(number)
    try:
        process.wait()
    except (KeyboardInterrupt, Terminated):
        process.kill()
        process.wait()
    return code


def _pass_on(stream: IO[str] | None, last: deque[str]) -> None:
    """Shows a command's stderr as it comes and keeps its last lines."""
    for line in stream or ():
        print(line, end="", file=sys.stderr, flush=True)
        last.append(line.rstrip())


def typed(module: str, overrides: list[str]) -> str:
    """A command as it is typed in a shell."""
    return shlex.join(["python", "-m", module, *map(quoted, overrides)])


def read_config(schema: type[Settings], arguments: list[str]) -> Settings:
    """`labels=300 seed=1` as an object of a dataclass.

    Raises:
        UserError: a key that is not there, or a value of the wrong type or out of range.
        SystemExit: --help, which is printed: the journey's own words and its keys.
    """
    known = OmegaConf.structured(schema)
    if {"-h", "--help"} & set(arguments):
        said = (sys.modules[schema.__module__].__doc__ or "").rstrip()
        say(f"{said}\n\nKeys and what they are unless you say KEY=VALUE:\n\n{OmegaConf.to_yaml(known)}")
        raise SystemExit(0)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(known, OmegaConf.from_cli(arguments)))
    except OmegaConfBaseException as error:
        expected = " ".join(f"{key}={value}" for key, value in asdict(schema()).items())  # type: ignore[call-overload]
        said = "no such key" if isinstance(error, ConfigKeyError) else str(error).splitlines()[0]
        raise UserError(f"{error.full_key}: {said}; expected some of\n{expected}") from error
    assert isinstance(config, schema)
    return config
