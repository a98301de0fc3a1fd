"""What the workflows share: their settings, running the project's commands, and reading what these have stored."""

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

from fusion.cli.program import read_arguments, run_program
from fusion.config.fields import checked, default_of
from fusion.errors import UserError
from fusion.runs.signals import SIGNALS, Terminated, raised
from fusion.text import hydra_value, quoted

Config = TypeVar("Config")
ROOT = Path(__file__).resolve().parent.parent
# Exit codes of a command that was interrupted or terminated; below 0 where the signal killed it.
INTERRUPTED = {130: 130, 143: 143} | {-n: 130 if n == signal.SIGINT else 143 for n in SIGNALS}


def say(text: str) -> None:
    """Print at once: the commands write to the same terminal."""
    print(text, flush=True)


def distinct(default: list[Any], at_least: int = 1) -> Any:
    """A setting that is a list of different values."""
    return checked(
        default,
        lambda values: at_least <= len(values) == len(set(values)),
        f"at least {at_least} value{'s' * (at_least != 1)}, each once",
    )


def run_workflow(schema: type[Config], words: Sequence[str] | None, work: Callable[[Config], int | None]) -> int:
    """Run a workflow with the settings of the command line; returns the exit code.

    Args:
        words: None: those that this process was started with.
    """
    defaults = OmegaConf.to_yaml(OmegaConf.structured(schema))
    usage = f"{sys.modules[schema.__module__].__doc__}\nKEY=VALUE, with these defaults:\n\n{defaults}"
    return run_program(words, usage, lambda words: work(read_config(schema, words)) or 0)


def read_config(schema: type[Config], words: Sequence[str]) -> Config:
    """`labels=300 seed=1` as an object of a dataclass.

    Raises:
        UserError: an unknown key, or a value of the wrong type or out of range.
    """
    keys = {f.name: hydra_value(default_of(f)) for f in fields(schema)}  # type: ignore[arg-type]
    last = {word.partition("=")[0]: word for word in words}  # of a repeated key the last one counts
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
    """How a command ended. `errors`: its last lines on stderr, where they were kept."""

    code: int
    seconds: float
    errors: tuple[str, ...] = ()


def call(module: str, overrides: Sequence[str], without: Sequence[str] = ()) -> float:
    """Run a command with its output shown; returns its seconds.

    Args:
        without: environment variables that are hidden from it.

    Raises:
        SystemExit: it failed, with its exit code.
    """
    outcome = attempt(module, overrides, without, keep_errors=False)
    if outcome.code != 0:
        raise _exit(outcome.code)
    return outcome.seconds


def attempt(module: str, overrides: Sequence[str], without: Sequence[str] = (), keep_errors: bool = True) -> Outcome:
    """Run a command with its output shown, and return how it ended, also if it failed.

    Args:
        keep_errors: read its stderr; otherwise the command writes to the terminal itself, with progress bars.

    Raises:
        SystemExit, KeyboardInterrupt, Terminated: the command or the workflow was interrupted or terminated.
    """
    say("$ " + typed(module, overrides))
    environment = {key: value for key, value in os.environ.items() if key not in without}
    environment |= {"PYTHONPATH": python_path(), "FUSION_NEXT": "0"}  # no proposals of next commands
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
            # A command takes two signals within a second as one: Ctrl-C has reached it already.
            process.send_signal(signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM)
            finish()
            raise
        finally:
            process.kill()  # at a second signal
    if code in INTERRUPTED:
        raise _exit(INTERRUPTED[code])
    return Outcome(code, time.monotonic() - start, tuple(errors))


def _exit(code: int) -> SystemExit:
    say(f"the command above ended with exit code {code}; start the workflow again to continue from there")
    return SystemExit(code)


def python_path() -> str:
    """PYTHONPATH with the project first, for a program that is started anywhere."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def typed(module: str, overrides: Sequence[str]) -> str:
    """A command as it is typed in a shell."""
    return shlex.join(["python", "-m", module, *map(quoted, overrides)])


def stored(store: Path, name: str) -> dict[str, Any]:
    """The manifest of a stored artifact."""
    content: dict[str, Any] = json.loads((store / name / "manifest.json").read_text(encoding="utf-8"))
    return content


def validation_scores(store: Path, name: str) -> dict[str, float]:
    """The metrics of a stored artifact on its first validation split, its main metric first."""
    scores: dict[str, float] = next(iter(stored(store, name)["metrics"].values()))
    return scores
