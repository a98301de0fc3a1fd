"""What the journeys share: their own few settings, and running the project's commands one after another."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from fusion.errors import UserError

Settings = TypeVar("Settings")
ROOT = Path(__file__).resolve().parent.parent


class Terminated(BaseException):
    """SIGTERM, to be handed on to the command that runs."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def say(text: str) -> None:
    """A line for the terminal; the commands write there too, so it must keep its place."""
    print(text, flush=True)


def python_path() -> str:
    """PYTHONPATH with the project in front, for a program that is started anywhere."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def call(module: str, overrides: list[str], without: tuple[str, ...] = ()) -> float:
    """Run a command with its output shown, and give its seconds.

    Args:
        without: variables of the environment that it must not see.

    Raises:
        SystemExit: it failed or was interrupted; with its exit code.
    """
    say("$ " + shlex.join(["python", "-m", module, *overrides]))
    environment = {key: value for key, value in os.environ.items() if key not in without}
    environment["PYTHONPATH"] = python_path()
    before = signal.signal(signal.SIGTERM, _terminate)
    start = time.monotonic()
    try:
        with subprocess.Popen([sys.executable, "-m", module, *overrides], env=environment) as process:
            try:
                code = process.wait()
            except KeyboardInterrupt:  # Ctrl-C reaches the command as well: let it end in order
                process.wait()
                code = 130
            except Terminated:
                process.terminate()
                process.wait()
                code = 143
    finally:
        signal.signal(signal.SIGTERM, before)
    if code != 0:
        say(
            f"the command above ended with exit code {code}; what is done is kept, and the next start goes on there"
        )
        raise SystemExit(code)
    return time.monotonic() - start


def read_config(schema: type[Settings], arguments: list[str]) -> Settings:
    """`labels=300 seed=1` as an object of a dataclass.

    Raises:
        UserError: a key that is not there, or a value of the wrong type or out of range.
    """
    known = OmegaConf.structured(schema)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(known, OmegaConf.from_cli(arguments)))
    except OmegaConfBaseException as error:
        expected = " ".join(f"{key}={value}" for key, value in asdict(schema()).items())  # type: ignore[call-overload]
        said = "no such key" if isinstance(error, ConfigKeyError) else str(error).splitlines()[0]
        raise UserError(f"{error.full_key}: {said}; expected some of\n{expected}") from error
    assert isinstance(config, schema)
    return config
