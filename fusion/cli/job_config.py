"""Convert Hydra's config of one job to typed settings and a Run."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue

from fusion.backbones.precision import automatic_dtype
from fusion.cli.messages import OWN_TASK, unknown_key
from fusion.config.commands import RankConfig
from fusion.config.data import Fold
from fusion.config.methods import METHODS
from fusion.config.stages import Stage1Config, StageConfig
from fusion.errors import UserError
from fusion.files import expand_paths
from fusion.runs.run import Run, RunState
from fusion.store.compatibility import DEBUG
from fusion.text import override, repeated

# These keys already determine the default name, so a sweep over them adds nothing.
NAMED_ANYWAY = ("task", "tasks", "name", "composition", "method", "data.leave_out")


@dataclass(frozen=True)
class Command:
    """A command line program, see `fusion.cli.app.command`."""

    name: str
    schema: type
    check: Callable[[Any, Run], RunState | None]
    function: Callable[[Any, Run], dict[str, Any]]
    settle: Callable[[Any, Sequence[str]], None]


def prepare(command: Command, composed: DictConfig, launch: DictConfig) -> tuple[Any, Run]:
    """Return the typed config and the Run of one job. `launch` is Hydra's part of the config."""
    choices = launch.runtime.choices
    config = copy.deepcopy(composed)
    with open_dict(config):
        config.pop("hydra", None)
    if (extra := _extra_key(config)) is not None:
        raise UserError(unknown_key(extra, command.schema))
    _set_tasks(command, config, choices.get("task"))
    try:
        typed: Any = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a key"
        where = f" in the file of {choices.get('task')}" if key.startswith("task") else f"; set {key}=..."
        raise UserError(f"{key} is required{where}") from None
    expand_paths(typed)
    if isinstance(typed, StageConfig | RankConfig) and typed.backbone.dtype == "auto":
        required = typed.method.definition.dtype if isinstance(typed, Stage1Config) else None
        if isinstance(typed, StageConfig):
            accelerator, precision = typed.trainer.accelerator, typed.trainer.precision
        else:
            accelerator, precision = typed.accelerator, None
        typed.backbone.dtype = automatic_dtype(accelerator, precision, required)
    command.settle(typed, tuple(launch.overrides.task))
    directory = Path(OmegaConf.select(launch, "runtime.output_dir", throw_on_missing=False) or ".")
    if isinstance(typed, StageConfig):
        if typed.name is None:
            name = typed.default_name().replace("/", "-")  # type: ignore[attr-defined]
            typed.name = "-".join(filter(None, (name, _swept(launch, NAMED_ANYWAY))))
        if typed.data.leave_out is not None:
            suffix = Fold.parse(typed.data.leave_out).suffix
            typed.name = f"{typed.name.removesuffix(suffix)}{suffix}"
        if choices.get("debug") and not typed.name.endswith(DEBUG):
            typed.name = f"{typed.name}{DEBUG}"
        if typed.trainer.profiler and not typed.trainer.default_root_dir:
            typed.trainer.default_root_dir = str(directory)  # output directory of the profile
    sweep = Path(launch.sweep.dir).name if is_sweep(launch) else None
    run = Run(
        command=command.name,
        directory=directory,
        overrides=tuple(launch.overrides.task),
        config=asdict(typed),
        group=str(choices.get("experiment") or sweep or command.name),
        rank_zero=is_rank_zero(),
    )
    return typed, run


def _extra_key(config: DictConfig, prefix: str = "") -> str | None:
    """Return a key that is not in the schema, since Hydra does not check `+KEY=...`."""
    kind = OmegaConf.get_type(config)
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else None
    for key, value in config.items_ex(resolve=False):
        if known is not None and key not in known:
            return f"{prefix}{key!s}"
        deeper = isinstance(value, DictConfig) and not (value._is_none() or value._is_missing())
        if deeper and (inner := _extra_key(value, f"{prefix}{key!s}.")) is not None:
            return inner
    return None


def _set_tasks(command: Command, config: DictConfig, task: str | None) -> None:
    """Set the name of the task, or replace the names in `tasks` by task configs."""
    if (names := OmegaConf.select(config, "tasks")) is not None:
        if task is not None:
            raise UserError(f"+task={task} and tasks= cannot be combined; list all tasks in tasks=[TASK,TASK]")
        names = _checked_names(OmegaConf.to_container(names) if OmegaConf.is_list(names) else names)
        load = GlobalHydra.instance().config_loader().load_configuration
        words = [[f"+{override('task', name)}", override("task.name", name)] for name in names]
        config.tasks = [load(command.name, own, run_mode=RunMode.RUN).task for own in words]
    elif task is not None:
        config.task.name = task
    elif OmegaConf.select(config, "task") is not None:
        raise UserError("expected a single task +task=NAME, or a sweep -m +task=NAME,NAME")
    elif issubclass(command.schema, StageConfig | RankConfig):
        method = METHODS.get(OmegaConf.select(config, "method.name"))
        if method is None or not method.multitask:
            known = sorted(GlobalHydra.instance().config_loader().get_group_options("task"))
            raise UserError(f"no task: expected +task=NAME, one of {', '.join(known)}\n{OWN_TASK}")


def _checked_names(names: Any) -> list[str]:
    """Raise UserError if `tasks=` is not a list of at least two distinct names."""
    words = names if isinstance(names, list) else []
    if len(words) < 2 or not all(isinstance(name, str) and re.fullmatch(r"[\w.+/-]+", name) for name in words):
        one = f"; for a single task set +task={words[0]}" if len(words) == 1 else ""
        raise UserError(
            f"{override('tasks', names)}: expected names of at least two tasks, such as 'tasks=[snli,rte,cb]'{one}"
        )
    if twice := repeated(words):
        raise UserError(f"{override('tasks', names)}: expected distinct tasks, got duplicate {', '.join(twice)}")
    return words


def is_sweep(launch: DictConfig) -> bool:
    return launch.mode is not None and launch.mode.name == "MULTIRUN"


def is_rank_zero() -> bool:
    """Return whether this is the first process, also if SLURM or torchrun started one per device."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
    return all(rank in (None, "", "0") for rank in ranks)


def _swept(launch: DictConfig, without: Sequence[str]) -> str:
    """Return the swept keys and values as part of a name: "seed-3"; empty outside a sweep."""
    if not is_sweep(launch):
        return ""
    left_out = {*without, *launch.job.config.override_dirname.exclude_keys}
    pairs = [override.lstrip("+").partition("=") for override in sorted(launch.overrides.task)]
    return _safe("-".join(f"{key}-{_safe(value)}" for key, _, value in pairs if key not in left_out))


def _safe(text: str) -> str:
    """Convert a string to a file name of limited length that needs no quoting."""
    text = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")
    if len(text) > 100:
        text = f"{text[:90].rstrip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def _subject(*, _root_: DictConfig) -> str:
    """Return the name of a run directory: the tasks or the artifact, and the swept keys."""
    task = _root_.hydra.runtime.choices.get("task")
    tasks = OmegaConf.select(_root_, "tasks", throw_on_missing=False)
    if OmegaConf.is_list(tasks):
        task = "-".join(map(str, tasks))
    artifact = OmegaConf.select(_root_, "artifact", throw_on_missing=False)
    subject = str(task or (Path(str(artifact)).name if artifact else "unset"))
    return _safe("-".join(filter(None, (subject, _swept(_root_.hydra, ("task", "tasks", "artifact"))))))


OmegaConf.register_new_resolver("subject", _subject, replace=True)
OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(3), use_cache=True, replace=True)
