"""From a command line to a typed config and a run. The only file that knows Hydra.

A command is a function of (config, run). `command` makes the program of it: it finds `conf/`,
composes, turns the outcome into the schema's objects, has every job checked before the first one
starts, records what each job leaves, and ends with the exit code that scripts rely on:
0 done, 2 a wrong command or config, 1 a failed job, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import logging
import os
import re
import secrets
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, cast, get_args, get_origin, get_type_hints

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.grammar.gen.OverrideLexer import InputStream, OverrideLexer  # type: ignore[attr-defined]
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from fusion.cli.console import say
from fusion.config.compositions import COMPOSITIONS
from fusion.config.methods import METHODS
from fusion.config.stages import Stage1Config, Stage2Config, StageConfig
from fusion.config.task import TaskConfig
from fusion.data.task_files import check_task_file, read_large
from fusion.errors import TrainingError, UserError, first_line
from fusion.files import expand_paths, resolve_path
from fusion.locks import run_lock
from fusion.runs import signals
from fusion.runs.memory import free_cycles
from fusion.runs.run import Run, RunState, check_folder, describe, record
from fusion.runs.sweep import JobFailed, Sweep, command_again, objective, summarize_states
from fusion.store.unfit import DEBUG
from fusion.text import (
    PROGRESS,
    is_plain,
    only_in_quotes,
    override,
    printable,
    printable_logs,
    quoted,
    repeated,
)
from fusion.tracking.decision import name_sweep, shared_decision
from fusion.training.expected_warnings import ignore_expected_warnings

log = logging.getLogger(__name__)

Check = Callable[[Any, Run], RunState | None]
Function = Callable[[Any, Run], dict[str, Any]]
Settle = Callable[[Any, Sequence[str]], None]

CONFIG_ERRORS = (UserError, HydraException, OmegaConfBaseException, YAMLError)
COMPOSING_ERRORS = (ValueError, AssertionError)  # what Hydra raises besides, for overrides it cannot place

# These decide a default name already, or are the name: a sweep over them needs no suffix.
NAMED_ANYWAY = ("task", "tasks", "name", "composition", "method")
OWN_TASK = "a task of your own is conf/task/NAME.yaml in the working directory or in $FUSION_CONF"
USER_CONF = "user"  # how Hydra's search path calls the folders of user_conf_folders


@dataclass(frozen=True)
class Command:
    name: str
    schema: type
    check: Check
    function: Function
    settle: Settle = lambda config, overrides: None


class Refused(BaseException):
    """What ends the program before its first job: a wrong command line (2), or a fault in a check (1).

    No Exception, since Hydra turns those of a callback into warnings.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def command(
    name: str, schema: type, check: Check, settle: Settle = lambda config, overrides: None
) -> Callable[[Function], Callable[[], None]]:
    """Makes a program of a function: `conf/NAME.yaml`, typed by `schema`, tested by `check`.

    `settle` puts into the typed config what was said by a word that stands for it, such as sources=all: from
    then on the config, and all that is written of it, has what the word stands for. It gets the overrides too.

    The function gets the typed config and the Run, and returns what result.json holds. `check` is
    cheap, raises UserError, and may say how the run stands; it sees every job of a sweep before the first
    one starts, and each job once more when its turn comes.
    """
    register(name, schema)

    def decorate(function: Function) -> Callable[[], None]:
        @functools.wraps(function)
        def program() -> None:
            sys.exit(signals.exit_code(lambda: _main(Command(name, schema, check, function, settle))))

        return program

    return decorate


def register(name: str, schema: type) -> None:
    """Lets `conf/NAME.yaml` say `NAME_schema` in its defaults: the types that its keys must have."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


# Groups without files in conf/: each name of their tables is a choice.
TABLES: dict[str, Collection[str]] = {"composition": COMPOSITIONS, "method": METHODS}
for _group, _names in TABLES.items():
    for _name in _names:
        ConfigStore.instance().store(group=_group, name=_name, node={"name": _name}, provider="fusion")


def conf_folder() -> Path:
    """The shipped `conf/`: inside the package once it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise UserError(f"no conf folder in {package} or {package.parent}: install the project again")


def user_conf_folders() -> list[Path]:
    """Where a user's own tasks and experiments are looked for: `./conf` and `$FUSION_CONF`."""
    candidates = [Path.cwd() / "conf"]
    if named := os.environ.get("FUSION_CONF"):
        candidates.append(resolve_path(named, "FUSION_CONF"))
        if not candidates[-1].is_dir():
            raise UserError(f"FUSION_CONF={named}: no such folder")
    found: list[Path] = []
    for folder in candidates:
        resolved = folder.resolve()
        a_copy_of_ours = (resolved / "launch.yaml").is_file()  # a checkout's, while the wheel runs
        if resolved.is_dir() and not a_copy_of_ours and resolved not in found:
            found.append(resolved)
    return found


class UserConf(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in user_conf_folders():
            search_path.append(provider=USER_CONF, path=f"file://{folder}")


Plugins.instance().register(UserConf)


class CheckedFiles(FileConfigSource):
    """Hydra's own reader of files, that checks a task file first, and reads no file twice: each job asks several times."""

    kept: ClassVar[dict[tuple[str, Path], tuple[tuple[int, int], ConfigResult]]] = {}

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        if not path.is_file():
            return super().load_config(config_path)  # says that it is not there
        state = (status := path.stat()).st_mtime_ns, status.st_size
        known, result = self.kept.get((self.provider, path), (None, None))
        if result is None or known != state:
            result = self._load(path, config_path)
            self.kept[self.provider, path] = state, result
        return copy.deepcopy(result)  # Hydra takes the defaults out of it

    def _load(self, path: Path, config_path: str) -> ConfigResult:
        group, _, name = config_path.removesuffix(".yaml").rpartition("/")
        if name in TABLES.get(group, ()):
            raise UserError(
                f"{group} {name} is in two places: {path} and the {group}s that are built in\ngive your own another name"
            )
        if not config_path.startswith("task/"):
            return super().load_config(config_path)
        if check_task_file(path):  # Hydra needs seconds for thousands of values
            result = ConfigResult(
                config=DictConfig(read_large(path, get_yaml_loader().yaml_implicit_resolvers)),
                path=f"{self.scheme()}://{self.path}",
                provider=self.provider,
                header=self._get_header_dict(""),  # a file with one is refused
            )
        else:
            result = super().load_config(config_path)
        _check_types(path, cast(DictConfig, result.config))
        return result


# Hydra tells its readers apart by this, and a launcher's job in another process registers its own once more.
CheckedFiles.__name__ = FileConfigSource.__name__
SourcesRegistry.instance().types["file"] = CheckedFiles  # wherever a search path came from


def _check_types(path: Path, task: DictConfig) -> None:
    """Refuse a task file's value of the wrong type here, where the file and the key are known.

    Raises:
        UserError: names both. Keys that no task has are found later, with those that were meant.
    """
    schema = OmegaConf.structured(TaskConfig)
    for key in [str(key) for key in task if key in schema]:
        try:
            merged = OmegaConf.merge(schema, {key: _one_of_each_type(task[key])})
        except ConfigKeyError:
            continue
        except OmegaConfBaseException:
            kind = type(schema._get_node(key)).__name__
            expected = {"ListNode": "a list", "ListConfig": "a list", "DictConfig": "keys with values"}
            value = str(task[key])
            raise UserError(
                f"{path}: {key}={value[:60]}{'...' if len(value) > 60 else ''}: "
                f"expected {expected.get(kind, 'text')}{' with path' if key == 'hub' else ''}"
            ) from None
        if key == "hub" and task[key] is not None and OmegaConf.is_missing(merged.hub, "path"):
            raise UserError(f"{path}: hub has no path; expected the name of a data set on the hub")


def _one_of_each_type(value: Any) -> Any:
    """A list or mapping with one entry of each type, where it is long: the types are checked, each entry for a while."""
    if not isinstance(value, (ListConfig, DictConfig)) or len(value) <= 100:
        return value
    if isinstance(value, ListConfig):
        return list({type(entry): entry for entry in value}.values())
    return dict({type(entry): (key, entry) for key, entry in value.items()}.values())


# --- one job: from Hydra's config to ours ---------------------------------------------------------


def prepare(command: Command, composed: DictConfig, launch: DictConfig) -> tuple[Any, Run]:
    """The typed config and the Run of one composed job; `launch` is Hydra's part of the config.

    Raises:
        UserError: no task, tasks that do not go together, a value out of its range or of the wrong type.
    """
    config = copy.deepcopy(composed)
    with open_dict(config):
        config.pop("hydra", None)
    choices = launch.runtime.choices
    _check_choices(launch)
    if (extra := _extra_key(config)) is not None:
        raise UserError(_unknown(extra, command.schema))
    task, several = choices.get("task"), OmegaConf.select(config, "tasks")
    if several is not None:
        if task is not None:
            raise UserError(
                f"+task={task} and tasks= do not go together: tasks=[TASK,ANOTHER] names them all"
            )
        config.tasks = [_task_of(command, name) for name in _task_names(several)]
    elif task is not None:
        config.task.name = task
    elif OmegaConf.select(config, "task") is not None:
        raise UserError("a task is one file: say +task=NAME; a sweep over several is -m +task=NAME,ANOTHER")
    elif issubclass(command.schema, StageConfig) and not _is_multitask(config):
        raise UserError(f"no task: say +task=NAME, one of {', '.join(_options('task'))}\n{OWN_TASK}")
    try:
        typed: Any = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a key"
        raise UserError(f"{key} is required: say {key}=...") from None
    expand_paths(typed)
    command.settle(typed, tuple(launch.overrides.task))
    if isinstance(typed, StageConfig) and typed.name is None:
        suffix = _swept(launch, NAMED_ANYWAY)
        name = typed.default_name().replace("/", "-")  # type: ignore[attr-defined]
        typed.name = f"{name}-{suffix}" if suffix else name
    if isinstance(typed, StageConfig) and choices.get("debug") and not str(typed.name).endswith(DEBUG):
        typed.name = f"{typed.name}{DEBUG}"  # it never passes for a real one
    sweep = _is_sweep(launch)
    directory = Path(OmegaConf.select(launch, "runtime.output_dir", throw_on_missing=False) or ".")
    if isinstance(typed, StageConfig) and typed.trainer.profiler and not typed.trainer.default_root_dir:
        typed.trainer.default_root_dir = str(directory)  # where Lightning puts the table
    run = Run(
        command=command.name,
        directory=directory,
        overrides=tuple(launch.overrides.task),
        config=asdict(typed),
        group=str(choices.get("experiment") or (Path(launch.sweep.dir).name if sweep else command.name)),
        rank_zero=_is_rank_zero(),
    )
    return typed, run


def _is_multitask(config: DictConfig) -> bool:
    method = METHODS.get(OmegaConf.select(config, "method.name"))
    return method is not None and method.multitask


def _task_names(several: Any) -> list[str]:
    """The tasks of `tasks=`, as they were typed.

    Raises:
        UserError: they are no list of two names or more, each once.
    """
    names = OmegaConf.to_container(several) if OmegaConf.is_list(several) else several
    if not isinstance(names, list) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.+/-]+", name) for name in names
    ):
        raise UserError(f"{override('tasks', names)}: expected names of tasks, such as 'tasks=[snli,rte,cb]'")
    if len(names) < 2:
        shown = f"tasks=[{','.join(names)}]"
        raise UserError(f"{shown}: expected at least two; a single one is +task={(names or ['NAME'])[0]}")
    if twice := repeated(names):
        raise UserError(f"tasks=[{','.join(names)}]: duplicate {', '.join(twice)}; expected each task once")
    return names


def _task_of(command: Command, name: str) -> DictConfig:
    """The task that `+task=NAME` would give: the same search path, types and messages."""
    loader = GlobalHydra.instance().config_loader()
    composed = loader.load_configuration(command.name, [f"+{override('task', name)}"], run_mode=RunMode.RUN)
    _check_choices(composed.hydra)
    composed.task.name = name
    task: DictConfig = composed.task
    return task


_END = -1  # what the lexer's tokens have before and behind them
LISTS_OF_NAMES = ("sources", "tasks", "runs")  # typed Any, since a word may stand for the list


def text_keys(schema: type) -> set[str]:
    """The keys whose values are text, or lists of text."""
    found = {*LISTS_OF_NAMES} & {*keys_of(schema)}
    for key, kind in _types_of(schema):
        inner = {kind, *get_args(kind)}
        if inner & {str, list[str]} and not inner & {Any}:
            found.add(key)
    return found


def as_text(word: str, keys: Collection[str]) -> str:
    """An override of one of `keys` in which what Hydra would read as a number or a truth value is quoted.

    `name=true` and `+task=1e3` mean the names that were typed, not True and 1000.0. Null stays null, except where
    it can only be a name: `+task=null`, `sources=[null]`.
    """
    match = re.match(r"\+{0,2}([\w./-]+)=", word)
    if match is None or match[1] not in keys:
        return word
    lexer = OverrideLexer(InputStream(word[match.end() :]))
    lexer.removeErrorListeners()
    lexer.mode(OverrideLexer.VALUE_MODE)
    tokens = lexer.getAllTokens()
    value, shift = word[match.end() :], 0
    around = {OverrideLexer.COMMA, OverrideLexer.BRACKET_OPEN, OverrideLexer.BRACKET_CLOSE, _END}
    known = around | {OverrideLexer.WS}
    kinds = [_END, *(token.type for token in tokens if token.type != OverrideLexer.WS), _END]
    if {OverrideLexer.POPEN, OverrideLexer.BRACE_OPEN} & {*kinds}:  # functions such as range(1,4); keys
        return word
    named = match[1] == "task" or (match[1] in LISTS_OF_NAMES and OverrideLexer.BRACKET_OPEN in kinds)
    place, quoted = 0, {OverrideLexer.INT, OverrideLexer.FLOAT, OverrideLexer.BOOL}
    quoted |= {OverrideLexer.NULL} if named else set()
    for token in tokens:
        if token.type == OverrideLexer.WS:
            continue
        place += 1
        alone = kinds[place - 1] in known and kinds[place + 1] in known
        if alone and token.type in quoted:
            first, last = token.start + shift, token.stop + 1 + shift
            value, shift = f"{value[:first]}'{value[first:last]}'{value[last:]}", shift + 2
    return word[: match.end()] + value


def flags_first(words: Sequence[str]) -> list[str]:
    """The command line with its overrides last, since Hydra takes them only side by side: -m may be anywhere."""
    before = ["", *words]
    overrides = [
        bool(re.match(r"[+~]*[\w@./-]+=", word))
        and (not last.startswith("-") or last in ("-m", "--multirun"))
        for last, word in zip(before, words, strict=False)
    ]
    marked = list(zip(words, overrides, strict=True))
    return [word for word, is_one in marked if not is_one] + [word for word, is_one in marked if is_one]


def _groups() -> set[str]:
    """The groups of which one is chosen by name: those of the shipped conf/, of the user's, and of the tables."""
    return {*TABLES} | {
        folder.name
        for conf in (conf_folder(), *user_conf_folders())
        for folder in conf.iterdir()
        if folder.is_dir()
    }


def _is_sweep(launch: DictConfig) -> bool:
    return launch.mode is not None and launch.mode.name == "MULTIRUN"


def _check_choices(launch: DictConfig) -> None:
    """Each chosen file may be in one place only: the shipped conf/ or one of the user's."""
    for group, choice in launch.runtime.choices.items():
        if group.startswith("hydra/") or choice is None:
            continue
        for name in [choice] if isinstance(choice, str) else choice:
            places = [
                file
                for source in launch.runtime.config_sources
                if source.schema == "file" and source.provider in ("main", USER_CONF)
                if (file := Path(source.path) / group / f"{name}.yaml").is_file()
            ]
            if len(places) > 1:
                raise UserError(
                    f"{group} {name} is in two places: {' and '.join(map(str, places))}\n"
                    "give your own another name"
                )


def _extra_key(config: DictConfig, prefix: str = "") -> str | None:
    """A key that the schema does not have: `+KEY=...` gets past Hydra's own check."""
    kind = OmegaConf.get_type(config)
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else None
    for key, value in config.items_ex(resolve=False):
        if known is not None and key not in known:
            return f"{prefix}{key!s}"
        deeper = isinstance(value, DictConfig) and not (value._is_none() or value._is_missing())
        if deeper and (inner := _extra_key(value, f"{prefix}{key!s}.")) is not None:
            return inner
    return None


def _options(group: str) -> list[str]:
    return sorted(GlobalHydra.instance().config_loader().get_group_options(group))


def _swept(launch: DictConfig, without: Sequence[str]) -> str:
    """The swept keys and their values as part of a name: "seed-3"; empty outside a sweep."""
    if not _is_sweep(launch):
        return ""
    left_out = {*without, *launch.job.config.override_dirname.exclude_keys}
    pairs = [override.lstrip("+").partition("=") for override in sorted(launch.overrides.task)]
    return _safe("-".join(f"{key}-{_safe(value)}" for key, _, value in pairs if key not in left_out))


def _safe(text: str) -> str:
    """Text as a file name that needs no quoting and is never too long."""
    text = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text).strip("-.")
    if len(text) > 100:
        text = f"{text[:90].rstrip('-.')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def _is_rank_zero() -> bool:
    """False in all processes but the first, where SLURM or torchrun has started one per device."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))
    return all(rank in (None, "", "0") for rank in ranks)


def _subject(*, _root_: DictConfig) -> str:
    """What a run folder is about: the tasks (or the artifact), and in a sweep the swept keys."""
    task = _root_.hydra.runtime.choices.get("task")
    several = OmegaConf.select(_root_, "tasks", throw_on_missing=False)
    if OmegaConf.is_list(several):
        task = "-".join(map(str, several))
    artifact = OmegaConf.select(_root_, "artifact", throw_on_missing=False)
    subject = str(task or (Path(str(artifact)).name if artifact else "unset"))
    swept = _swept(_root_.hydra, ("task", "tasks", "artifact"))
    return _safe(f"{subject}-{swept}" if swept else subject)


OmegaConf.register_new_resolver("subject", _subject, replace=True)
OmegaConf.register_new_resolver("unique", lambda: secrets.token_hex(3), use_cache=True, replace=True)


# --- before the first job -------------------------------------------------------------------------

_current: Command  # the command of this process, for the callback that Hydra makes
_sweep: Sweep | None = None


class Preflight(Callback):
    """Composes, types and checks every job before the first one starts."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with _refusing():
            typed, run = prepare(_current, config, config.hydra)
            _current.check(typed, run)
            check_folder(_output_folder(config, "run"), "hydra.run.dir")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global _sweep
        with _refusing():
            folder = _output_folder(config, "sweep")
            loader = GlobalHydra.instance().config_loader()
            words = [f"{k}={v}" for k, v in (config.hydra.sweeper.get("params") or {}).items()]
            # As they were typed: `name=rte-${seed}` is another name in each job.
            words += cast(list[str], OmegaConf.to_container(config.hydra.overrides.task, resolve=False))
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(words)
            constant = [o.key_or_group for o in overrides if not o.is_sweep_override()]
            # every job of the sweep, wherever it runs, knows by this what is the same in all of them
            keys = ",".join(f"'{key}'" for key in constant)
            config.hydra.overrides.hydra.append(f"hydra.job.config.override_dirname.exclude_keys=[{keys}]")
            if not str(config.hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper"):
                check_folder(folder, "hydra.sweep.dir")
                _sweep = Sweep.begin(folder)
                name_sweep(folder)
                return  # another sweeper finds its jobs as it goes: each is checked when its turn comes
            planned: list[Path] = []
            again = None
            standing: dict[str, RunState] = {}
            names: dict[tuple[str, str], Sequence[str]] = {}
            (members,) = BasicSweeper.split_arguments(overrides, None)
            for number, member in enumerate(members):
                try:
                    composed = loader.load_sweep_config(config, member)
                except COMPOSING_ERRORS as error:
                    raise HydraException(str(error)) from error
                try:
                    typed, run = prepare(_current, composed, composed.hydra)
                    found = _current.check(typed, run)
                except UserError as error:
                    raise UserError(f"job {number} ({' '.join(member)}): {error}") from error
                if found is not None:
                    standing[str(run.config.get("name"))] = found
                planned.append(folder / _job_folder(composed, number))
                if isinstance(typed, StageConfig):
                    again = command_again(typed.resume, typed.overwrite)
                    first = names.setdefault((typed.store, str(typed.name)), member)
                    if first is not member:
                        raise UserError(_same_name(str(typed.name), first, member, overrides))
            check_folder(folder, "hydra.sweep.dir")
            for place in planned:
                if place.exists() and not place.is_dir():
                    raise UserError(
                        f"{place}: this is a file, expected a folder; hydra.sweep.dir=DIR names another"
                    )
            _sweep = Sweep.begin(folder, planned, again)
            name_sweep(folder)
            if standing:
                say("\n".join(summarize_states(standing)), flush=True)


def _output_folder(config: DictConfig, mode: str) -> Path:
    """hydra.run.dir or hydra.sweep.dir, where Hydra itself will make it: it does not expand `~`.

    Raises:
        UserError: it is no possible path, or starts with `~`.
    """
    text, key = str(config.hydra[mode].dir), f"hydra.{mode}.dir"
    if text.startswith("~"):
        raise UserError(f"{key}={text}: ~ is not expanded here; write the whole path, or $HOME in the shell")
    return resolve_path(text, key)


def _same_name(name: str, first: Sequence[str], second: Sequence[str], overrides: Sequence[Override]) -> str:
    """Why two jobs of a sweep would be stored under one name, and what to do about it."""
    swept = [one for one in overrides if one.is_sweep_override()]
    for one in swept:
        if twice := repeated(one.sweep_string_iterator()):
            times = "twice" if list(one.sweep_string_iterator()).count(twice[0]) == 2 else "several times"
            value = twice[0].strip("'\"")
            return f"{one.input_line}: {value} is given {times}; expected each value once"
    different = [(one, other) for one, other in zip(first, second, strict=True) if one != other]
    jobs = f"{' '.join(one for one, _ in different)} and {' '.join(other for _, other in different)}"
    keys = [one.key_or_group for one in swept if one.key_or_group != "name"] or ["seed"]
    keys = [f"{key}.name" if key in ("task", "adapter", "composition", "method") else key for key in keys]
    made = shlex.quote("-".join(["name=NAME", *(f"${{{key}}}" for key in keys)]))
    given = any(one.key_or_group == "name" for one in overrides)
    ways = f"leave name= out, or use {made}" if given else f"give each its own name with {made}"
    return f"two jobs of this sweep would both be stored as {name}: {jobs}\n{ways}"


def _job_folder(composed: DictConfig, number: int) -> str:
    """Where Hydra will put a job of the sweep, below hydra.sweep.dir; what only the launcher knows stays open."""
    before = HydraConfig.instance().cfg
    with open_dict(composed):
        composed.hydra.job.num = number
        composed.hydra.job.id = number
    HydraConfig.instance().set_config(composed)  # ${hydra:…} reads it there
    try:
        return str(composed.hydra.sweep.subdir)
    finally:
        HydraConfig.instance().cfg = before


class _refusing:
    """Lets nothing that goes wrong in a callback pass as a warning."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CONFIG_ERRORS):
            raise Refused(explain(error, _current.schema), 2) from error
        if isinstance(error, Exception):
            traceback.print_exception(error)
            raise Refused(f"{_current.name} failed: {describe(error)}", 1) from error


# --- the program ----------------------------------------------------------------------------------


def _main(command: Command) -> int:
    from fusion.training import processes

    global _current, _sweep
    _current, _sweep = command, None
    printable_logs()
    ignore_expected_warnings()
    logging.raiseExceptions = False  # a full disk would fill the terminal; run.log itself says that it ends
    if (rank := processes.job_of_this_rank()) is not None:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(command.schema), rank.config))
        return processes.run_rank(rank, lambda: command.function(typed, rank.run))
    if any(re.match(r"\+*task=\{", word) for word in sys.argv[1:]):  # which OmegaConf stumbles over
        return _say(f"+task={{...}}: a task is one file: say +task=NAME\n{OWN_TASK}", 2)
    try:
        texts = text_keys(command.schema) | _groups()
    except UserError as error:  # FUSION_CONF
        return _say(str(error), 2)
    typed_words = sys.argv[1:]
    sys.argv[1:] = flags_first([as_text(word, texts) for word in sys.argv[1:]])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and does not print and end with 1
    program = processes.program(command.function)
    outcomes: list[int] = []  # exit codes of this process's jobs

    def job(composed: DictConfig) -> Any:
        try:
            with signals.raised():  # a launcher may run the job in a process of its own
                return _job(command, program, composed, outcomes)
        finally:  # once the job's own frames are gone, and the traceback of one that failed
            free_cycles()

    try:
        with shared_decision():
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=command.name)(job)()
    except Refused as error:
        return _say(str(error), error.code)
    except (*CONFIG_ERRORS, *COMPOSING_ERRORS) as error:  # a job's own errors do not get here
        return _say(explain(error, command.schema, typed_words), 2)
    except (KeyboardInterrupt, signals.Terminated) as error:
        if _sweep is None:
            raise  # the program's one line comes from `signals.exit_code`
        ended = ("interrupted", 130) if isinstance(error, KeyboardInterrupt) else ("terminated", 143)
        return _say(_sweep.stopped(ended[0]), ended[1])
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except OSError as error:  # of Hydra's own files
        if _sweep is not None:
            _sweep_outcome(command, _sweep)
        cure = "make room, or name another with hydra.run.dir= or hydra.sweep.dir="
        return _say(
            f"{command.name} failed: {describe(error)}\nAn output folder cannot be written: {cure}", 1
        )
    except Exception as error:
        # A launcher misses a job that died: it is in the list.
        if _sweep is not None and _sweep_outcome(command, _sweep):
            return _say(f"{command.name} failed: {type(error).__name__}: {first_line(error)}", 1)
        traceback.print_exc()
        return _say(f"{command.name} failed: {describe(error)}", 1)
    if _sweep is not None:
        return _sweep_outcome(command, _sweep)
    return max(outcomes, default=0)


def _job(command: Command, program: list[str], composed: DictConfig, outcomes: list[int]) -> Any:
    """One job. A failure is recorded and not raised, so that a sweep continues with the next job.

    A job of a training command returns its objective, see `objective`, for sweepers that search by it.

    Raises:
        JobFailed: it failed, and another sweeper than Hydra's own has to know.
    """
    from fusion.training import processes

    launch: Any = HydraConfig.get()
    typed, run = prepare(command, composed, launch)

    def check() -> RunState | None:
        standing = command.check(typed, run)
        if isinstance(typed, StageConfig) and run.rank_zero:
            if turn.enter_context(run_lock(Path(typed.store), str(typed.name))):
                standing = command.check(typed, run)  # whoever had the turn may have done it
            _say_standing(str(typed.name), standing)
        return standing

    def work() -> dict[str, Any]:
        ranks = processes.count(typed.trainer) if isinstance(typed, StageConfig) else 1
        if ranks > 1:
            return processes.launch(program, run.config, run, ranks)
        return command.function(typed, run)

    if _sweep is None and _is_sweep(launch):  # a launcher's process, one of several at one terminal
        os.environ[PROGRESS] = "0"
    try:
        with contextlib.ExitStack() as turn:
            result = record(run, work, check)
    except Exception as error:
        if _sweep is not None:
            _sweep.errors[run.directory.absolute()] = describe(error)
        if isinstance(error, UserError):
            outcomes.append(_say(str(error), 2))
            if _reads_returns(launch):
                raise JobFailed(str(error)) from None
            return None
        if not _is_sweep(launch) and not isinstance(error, TrainingError):
            traceback.print_exc()
        said = str(error) if isinstance(error, TrainingError) else describe(error)
        outcomes.append(_say(f"{command.name} failed: {said} (log: {run.directory}/run.log)", 1))
        if _reads_returns(launch):
            raise JobFailed(said) from None
        return None
    outcomes.append(0)
    if run.rank_zero and not _is_sweep(launch):
        from fusion.cli.ending import end_of_run

        end_of_run(run, result)
    return objective(typed, result) if isinstance(typed, StageConfig) and result.get("metrics") else result


def _reads_returns(launch: DictConfig) -> bool:
    """Whether the sweeper looks at what jobs return: all but Hydra's own.

    Such a sweeper decides itself what a failed job means, by the exception that Hydra keeps in its place.
    """
    return _is_sweep(launch) and not str(launch.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def _say_standing(name: str, standing: RunState | None) -> None:
    """One line for a run that is not new; the command itself says where a finished one lies."""
    if standing is not None and standing.state == "interrupted":
        log.info("%s was interrupted and goes on%s", name, f": {standing.detail}" if standing.detail else "")
    elif standing is not None and standing.state == "failed":
        log.info(
            "%s failed the last time and runs again%s",
            name,
            f" ({standing.detail})" if standing.detail else "",
        )
    elif standing is not None and standing.state == "new" and standing.detail:
        log.info("%s %s", name, standing.detail)


def _sweep_outcome(command: Command, sweep: Sweep) -> int:
    """Says how a sweep went: a table, in one line how many jobs, then which failed and where their logs are."""
    from fusion.cli.ending import end_of_sweep

    end_of_sweep(command.name, sweep.folder, sweep.jobs())
    line, failed = sweep.outcome()
    say(line, flush=True)
    return _say("\n".join(failed), 1) if failed else 0


def _say(message: str, code: int) -> int:
    if os.environ.get("FUSION_DEBUG", "0") not in ("", "0") and sys.exc_info()[1] is not None:
        traceback.print_exc()
    with contextlib.suppress(OSError):  # the terminal may be a file on the disk that is full
        print(printable(message), file=sys.stderr, flush=True)
    return code


# --- what a wrong command line gets ---------------------------------------------------------------


def explain(error: BaseException, schema: type, words: Sequence[str] = ()) -> str:
    """One or two lines for a config that Hydra or OmegaConf refused: the key, and what was meant.

    Args:
        words: the command line as it was typed.
    """
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    cause = error.__cause__ or error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = sorted(error.options or [])
        said = f"unknown {group} {name!r}{_near(name, options)}; known: {', '.join(options)}"
        if group == "task":
            said += f"\n{OWN_TASK}"
        return said
    if match := re.search(r"Could not (?:override|delete)(?: from config\.)? '?([^'=\s]+)'?", text):
        key = match[1]
        if key == "task":
            return "task is added, not overridden: say +task=NAME"
        return _unknown(key, schema)
    if re.match(r"Unexpected type( for root: NoneType|: None)", text):
        inner = [word for word in sys.argv[1:] if re.match(r"\+*(task|logger)\.[\w.]+=", word)]
        if any(re.match(r"\+*tasks=", word) for word in sys.argv[1:]):
            return f"{' '.join(inner)}: with tasks=, what a task says stands in its own file\n{OWN_TASK}"
        return (
            f"{' '.join(inner)}: a key of what is not there; choose it first: +task=NAME, logger=[wandb,csv]"
        )
    if isinstance(cause, OSError) and text.startswith("Unable to configure handler"):
        return (
            f"{cause.filename}: cannot be written ({cause.strerror})\nhydra.run.dir=DIR names another folder"
        )
    if isinstance(error, YAMLError):
        return " ".join(text.split())
    if match := re.search(r"Error merging override (\S+)", text):
        key = match[1].lstrip("+").split("=")[0]
        if "not in" in str(cause) and key not in keys_of(schema):
            return _unknown(key, schema)
        if isinstance(cause, ValidationError) and (expected := _expected(dict(_types_of(schema)).get(key))):
            return f"{match[1]}: expected {expected}"
        return f"{match[1]}: {first_line(cause)}"
    if match := re.match(r"Multiple values for (\w+)\.", text):
        key = match[1]
        return f"{key} is given more than once: expected one +{key}=NAME; a sweep is -m +{key}=NAME,ANOTHER"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        key, _, value = match[1].partition("=")
        takes_list = _takes_list(dict(_types_of(schema)).get(key.lstrip("+")))
        a_list = f"; a list is written '{key}=[{value}]'" if takes_list else ""
        return f"{match[1]}: several values are a sweep, which needs -m{a_list}"
    if match := re.search(r"^In '(.+)': .*\n(?:.*\n)*?Key '(.+)' not in '", text):
        return f"conf file {match[1]}.yaml: {_unknown(match[2], schema)}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, words)
    lines = [line.strip() for line in f"{text}\n{cause if cause is not error else ''}".splitlines()]
    return "\n".join([line for line in lines if line][:2])


def _unreadable(word: str, words: Sequence[str]) -> str:
    """The reason why Hydra's grammar has no such override, and how it is written."""
    start = f"cannot read the override {word!r}: "
    key, equals, value = word.partition("=")
    if not equals or not key:
        before = words[words.index(word) - 1] if word in words[1:] else ""
        if "=" in before and not before.endswith("="):  # the shell has split a value at a space
            return f"{start}expected KEY=VALUE; a value with a space is put in quotes, '{before} {word}'"
        return f"{start}expected KEY=VALUE"
    if odd := only_in_quotes(key.lstrip("+~")):
        return f"{start}a key has no {' '.join(odd)}"
    if odd := only_in_quotes(value):
        if is_plain(value):
            return f"{start}quotes are needed for {' '.join(odd)}\n{shlex.quote(quoted(word))} is read"
        return f"{start}double quotes are needed around a text with {' '.join(odd)}, as in '{key}=[\"A\"]'"
    return (
        f"{start}a value with [ ] {{ }} ( ) ' = or \" is put in double quotes, and the whole in single ones"
    )


def _expected(kind: Any) -> str:
    """What a key of this type takes, where it is one number or truth value; else empty."""
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    given = [one for one in get_args(kind) or (kind,) if one is not type(None)]
    if len(given) != 1 or given[0] not in names:
        return ""
    return names[given[0]] + (", or null" if type(None) in get_args(kind) else "")


def _takes_list(kind: Any) -> bool:
    """Whether a key of this type may have a list for its value."""
    return kind is Any or list in (kind, get_origin(kind)) or any(map(_takes_list, get_args(kind)))


def keys_of(schema: type) -> list[str]:
    """Every key that a schema knows, dotted: "seed", "optim.lr", ..."""
    return [key for key, _ in _types_of(schema)]


def _types_of(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that a schema knows, dotted, with its type."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name, kind
        for inner in (kind, *get_args(kind)):
            if is_dataclass(inner):
                yield from _types_of(cast(type, inner), f"{prefix}{name}.")


# What people type who know other programs, and the keys that do it here; those that the command has are proposed.
SYNONYMS = {
    "learning_rate": ("optim.lr", "lr"),
    "epochs": ("trainer.max_epochs",),
    "num_train_epochs": ("trainer.max_epochs",),
    "max_steps": ("trainer.max_steps",),
    "steps": ("trainer.max_steps",),
    "bs": ("data.batch_size",),
    "per_device_train_batch_size": ("data.batch_size",),
    "gradient_accumulation_steps": ("trainer.accumulate_grad_batches",),
    "warmup_ratio": ("optim.warmup",),
    "early_stopping": ("optim.patience",),
    "max_seq_length": ("data.max_length",),
    "num_workers": ("data.workers",),
    "data_dir": ("data.dir",),
    "train_file": ("data.dir",),
    "max_train_samples": ("data.limit.train",),
    "gpus": ("trainer.devices", "accelerator"),
    "device": ("trainer.accelerator", "accelerator"),
    "fp16": ("trainer.precision",),
    "bf16": ("trainer.precision",),
    "model": ("artifact", "backbone.name_or_path"),
    "model_name_or_path": ("artifact", "backbone.name_or_path"),
    "checkpoint": ("artifact", "resume"),
    "name": ("artifact",),
    "adapters": ("sources",),
    "file": ("input",),
    "input_file": ("input",),
    "output_file": ("output",),
    "output_dir": ("output", "store"),
    "project": ("logger.wandb.project",),
}
TEXTS = ("text", "texts", "sentence", "sentences", "prompt", "premise", "hypothesis", "question", "rows")
OF_TRAINING = ("adapter", "composition", "method", "experiment", "debug", "optim", "trainer", "head", "seed")


def _unknown(key: str, schema: type) -> str:
    """Says which keys may have been meant: same last part, else a like one beside it, else anywhere."""
    every = keys_of(schema)
    inner = [known for known in every if known.startswith(f"{key}.")]
    uses = "artifact" in every
    if key == "backbone" and uses:
        return (
            "backbone= is not for this command: an artifact brings its own backbone; leave it out\n"
            "backbone.name_or_path=FOLDER names another place of the same weights"
        )
    if key in every and inner:
        shown = ", ".join(inner[:6]) + (", ..." if len(inner) > 6 else "")
        return f"{key} holds several settings here and takes no value itself; it has {shown}"
    for stage, other in (("stage 1", Stage1Config), ("stage 2", Stage2Config)):
        if issubclass(schema, StageConfig) and schema is not other and key in keys_of(other):
            return f"unknown key {key}: it is one of {stage}, not of this command; leave it out"
    parent, _, last = key.rpartition(".")
    if uses and "input" in every and last in TEXTS:
        return (
            f"unknown key {key}: predictions are for the rows of a file, input=rows.jsonl, with one JSON object a "
            'line\nsuch as {"COLUMN": "a text"}, where COLUMN is a text column of the artifact\'s task'
        )
    if uses and key.partition(".")[0] in OF_TRAINING and key.partition(".")[0] not in every:
        return f"unknown key {key}: an artifact is used as it was trained; leave {key}= out"
    if uses:  # a task of an artifact is its own, or another file: +task=NAME
        every = [known for known in every if not known.startswith("task.")]
    keys = [(*known.rpartition(".")[::2], known) for known in every]

    def like(choices: list[tuple[str, str, str]], cutoff: float) -> list[str]:
        near = difflib.get_close_matches(last, [name for _, name, _ in choices], 3, cutoff)
        return [known for _, name, known in choices if name in near]

    meant = [known for known in SYNONYMS.get(key, ()) if known in every][:1]
    meant = meant or [known for _, name, known in keys if name == last]
    meant = meant or like([choice for choice in keys if choice[0] == parent], 0.6) or like(keys, 0.7)
    meant = [known for known in meant if known != key and not key.startswith(f"{known}.")][:4]
    if meant:
        return f"unknown key {key}: did you mean {' or '.join(meant)}?"
    beside = [name for folder, name, _ in keys if folder == parent]
    there = f"; {parent} has {', '.join(beside)}" if parent and beside else "; --cfg job shows all keys"
    return f"unknown key {key}{there}"


def _near(name: str, options: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, options, 3, 0.5)
    return f": did you mean {' or '.join(near)}?" if near else ""
