"""Shared by the workflows: parsing their settings, running the project's commands and reading stored manifests."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion.cli.console import read_arguments, run_program
from fusion.config.fields import checked, default_of
from fusion.errors import UserError
from fusion.runs.signals import SIGNALS, Terminated, raised
from fusion.text import hydra_value, quoted

Config = TypeVar("Config")
ROOT = Path(__file__).resolve().parent.parent
# Exit codes of a command that was interrupted or terminated; negative if the signal killed it.
INTERRUPTED = {130: 130, 143: 143} | {-n: 130 if n == signal.SIGINT else 143 for n in SIGNALS}


def say(text: str) -> None:
    """Print and flush, since the commands write to the same terminal."""
    print(text, flush=True)


def distinct(default: list[Any], at_least: int = 1) -> Any:
    """A setting that is a list of distinct values."""
    return checked(
        default,
        lambda values: at_least <= len(values) == len(set(values)),
        f"at least {at_least} distinct value{'s' * (at_least != 1)}",
    )


def run_workflow(schema: type[Config], words: Sequence[str] | None, work: Callable[[Config], int | None]) -> int:
    """Run a workflow with the settings of the command line and return the exit code.

    Args:
        words: the arguments; if `None`, those of this process.
    """
    defaults = OmegaConf.to_yaml(OmegaConf.structured(schema))
    usage = f"{sys.modules[schema.__module__].__doc__}\nKEY=VALUE, with these defaults:\n\n{defaults}"
    return run_program(words, usage, lambda words: work(read_config(schema, words)) or 0)


def read_config(schema: type[Config], words: Sequence[str]) -> Config:
    """Parse arguments such as `labels=300 seed=1` into an instance of `schema`.

    Raises:
        UserError: if a key is unknown, or a value has the wrong type or is out of range.
    """
    keys = {f.name: hydra_value(default_of(f)) for f in fields(schema)}  # type: ignore[arg-type]
    last = {word.partition("=")[0]: word for word in words}  # the last value of a repeated key is used
    _, values = read_arguments(list(last.values()), keys, (0, 0), "KEY=VALUE")
    given = OmegaConf.from_dotlist([f"{key}={value}" for key, value in values.items()])
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, schema)
    return config


@dataclass(frozen=True)
class Outcome:
    """Exit code and seconds of a command, and the last lines of its stderr if they were captured."""

    code: int
    seconds: float
    errors: tuple[str, ...] = ()


def call(module: str, overrides: Sequence[str], without: Sequence[str] = ()) -> float:
    """Run a command, show its output and return its seconds.

    Args:
        without: environment variables to remove.

    Raises:
        SystemExit: if the command fails, with its exit code.
    """
    outcome = attempt(module, overrides, without, keep_errors=False)
    if outcome.code != 0:
        raise _exit(outcome.code)
    return outcome.seconds


def attempt(module: str, overrides: Sequence[str], without: Sequence[str] = (), keep_errors: bool = True) -> Outcome:
    """Run a command, show its output and return its outcome, whether or not it succeeded.

    Args:
        keep_errors: capture stderr; otherwise the command writes to the terminal itself, with progress bars.

    Raises:
        SystemExit, KeyboardInterrupt, Terminated: if the command or the workflow is interrupted or terminated.
    """
    say("$ " + typed(module, overrides))
    environment = {key: value for key, value in os.environ.items() if key not in without}
    environment |= {"PYTHONPATH": python_path(), "FUSION_NEXT": "0"}  # do not suggest next commands
    start, errors = time.monotonic(), deque[str](maxlen=20)
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

        def finish() -> int:
            for line in process.stderr or ():
                print(line, end="", file=sys.stderr, flush=True)
                errors.append(line.rstrip())
            return process.wait()

        try:
            code = finish()
        except (KeyboardInterrupt, Terminated) as stop:
            # Ctrl-C has already reached the command, which treats two signals within a second as one.
            process.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            finish()
            raise
        finally:
            process.kill()  # at a second signal
    if code in INTERRUPTED:
        raise _exit(INTERRUPTED[code])
    return Outcome(code, time.monotonic() - start, tuple(errors))


def _exit(code: int) -> SystemExit:
    say(f"the command above exited with code {code}; run the workflow again to continue from there")
    return SystemExit(code)


def python_path() -> str:
    """Return PYTHONPATH with the project first, for a program started in any folder."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def typed(module: str, overrides: Sequence[str]) -> str:
    """Return a command as it is typed in a shell."""
    return shlex.join(["python", "-m", module, *map(quoted, overrides)])


def stored(store: Path, name: str) -> dict[str, Any]:
    """Read the manifest of a stored artifact."""
    content: dict[str, Any] = json.loads((store / name / "manifest.json").read_text(encoding="utf-8"))
    return content


def validation_scores(store: Path, name: str) -> dict[str, float]:
    """Return the metrics of a stored artifact on its first validation split, the main metric first."""
    scores: dict[str, float] = next(iter(stored(store, name)["metrics"].values()))
    return scores
