"""Shared by the workflows: their settings, the project's commands, and examples of tasks."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusion.cli import console
from fusion.config.fields import Settings, checked, default_of
from fusion.errors import UserError
from fusion.files import write_json
from fusion.runs.signals import SIGNALS, Terminated, raised
from fusion.store.lookup import read_manifest
from fusion.text import hydra_value, quoted

if TYPE_CHECKING:
    from fusion.config.task import TaskConfig
    from fusion.data.rows import Rows

Config = TypeVar("Config")
ROOT = Path(__file__).resolve().parent.parent
# Exit codes of a command that was interrupted or terminated; negative if the signal killed it.
INTERRUPTED = {130: 130, 143: 143} | {-n: 130 if n == signal.SIGINT else 143 for n in SIGNALS}


say = partial(console.say, flush=True)  # since the commands write to the same terminal


def distinct(default: list[Any], at_least: int = 1) -> Any:
    """A setting that is a list of distinct values."""
    return checked(
        default,
        lambda values: at_least <= len(values) == len(set(values)),
        f"at least {at_least} distinct value{'s' * (at_least != 1)}",
    )


def run_workflow(schema: type[Config], words: Sequence[str] | None, work: Callable[[Config], int | None]) -> int:
    """Run a workflow with the settings of the command line (by default of this process) and return the exit code."""
    defaults = OmegaConf.to_yaml(OmegaConf.structured(schema))
    usage = f"{sys.modules[schema.__module__].__doc__}\nKEY=VALUE, with these defaults:\n\n{defaults}"
    return console.run_program(words, usage, lambda words: work(read_config(schema, words)) or 0)


def read_config(schema: type[Config], words: Sequence[str]) -> Config:
    """Parse arguments such as `labels=300 seed=1` into `schema`. Raises UserError for unknown keys and wrong values."""
    keys = {f.name: hydra_value(default_of(f)) for f in fields(schema)}  # type: ignore[arg-type]
    last = {word.partition("=")[0]: word for word in words}  # the last value of a repeated key is used
    _, values = console.read_arguments(list(last.values()), keys, (0, 0), "KEY=VALUE")
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


def call(module: str, overrides: Sequence[str]) -> float:
    """Run a command, show its output and return its seconds. Raises SystemExit with its exit code if it fails."""
    outcome = attempt(module, overrides, keep_errors=False)
    if outcome.code != 0:
        raise _exit(outcome.code)
    return outcome.seconds


def attempt(module: str, overrides: Sequence[str], keep_errors: bool = True) -> Outcome:
    """Run a command, show its output and return its outcome. Raises SystemExit if it is interrupted or terminated.

    `keep_errors` captures stderr; otherwise the command writes to the terminal itself, with progress bars.
    """
    say("$ " + typed(module, overrides))
    start, errors = time.monotonic(), deque[str](maxlen=20)
    with (
        raised(),
        subprocess.Popen(
            [sys.executable, "-m", module, *map(quoted, overrides)],
            env=os.environ | {"PYTHONPATH": python_path(), "FUSION_NEXT": "0"},  # do not suggest next commands
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


def task_config(task: str) -> TaskConfig:
    """Read the YAML file of a built-in task."""
    from fusion.cli.config_sources import conf_folder
    from fusion.config.task import TaskConfig

    content = yaml.safe_load((conf_folder() / "task" / f"{task}.yaml").read_text(encoding="utf-8"))
    return TaskConfig.from_dict(content | {"name": task}, where=f"task {task}")


def examples(task: str, split: str, limit: int | None = None, data_dir: str | None = None) -> Rows:
    """Read the examples of a built-in task, as the commands do with `data.limit.SPLIT=limit` and `data.dir=data_dir`."""
    from fusion.config.data import DataConfig, LimitConfig
    from fusion.data.rows import load_rows

    return load_rows(task_config(task), DataConfig(dir=data_dir, limit=LimitConfig(**{split: limit})), split)


@dataclass
class SeedsConfig(Settings):
    """Settings of a workflow that trains artifacts for multiple seeds in OUTPUT/store. Existing artifacts are skipped."""

    seeds: list[int] = distinct([1, 2, 3])
    backbone: str = "minilm"
    data_dir: str | None = None
    output: str = ""

    @property
    def store(self) -> Path:
        return Path(self.output) / "store"

    @property
    def shared(self) -> list[str]:
        """Overrides of every command."""
        data = [f"data.dir={self.data_dir}"] if self.data_dir else []
        return [f"backbone={self.backbone}", f"store={self.store}", *data]

    def sweep(self, module: str, folder: str, overrides: Sequence[str], name: str | None = None) -> None:
        """Train a sweep, with a run per seed if `name` is set: NAME-seed-SEED."""
        words = [*overrides, *self.shared, "logger=csv"]
        if name is not None:
            words += [f"seed={','.join(map(str, self.seeds))}", f"name={name}-seed-${{seed}}"]
        call(module, ["-m", *words, f"hydra.sweep.dir={self.output}/runs/{folder}"])

    def scores(self, name: str) -> list[dict[str, Any]]:
        """Return the metrics of an artifact on its first validation split for each seed, the main metric first."""
        manifests = [read_manifest(f"{name}-seed-{seed}", self.store) for seed in self.seeds]
        return [next(iter(manifest.metrics.values())) for manifest in manifests]

    def save(self, name: str, **results: Any) -> None:
        """Write the settings and the results to OUTPUT/NAME.json."""
        path = Path(self.output) / f"{name}.json"
        write_json(path, {"config": asdict(self), **results})
        say(f"Results: {path}")
