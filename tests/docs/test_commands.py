"""Every command in the documentation is read by the program that it starts: keys, values, names and targets exist.

Nothing is trained here; `test_walkthrough.py` runs some of the commands.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from fusion.cli.config_sources import conf_folder
from fusion.cli.console import read_arguments
from fusion.cli.job_config import Command, prepare
from pipelines import adapterdrop, demo, precision, ranking, two_stage
from pipelines.commands import read_config
from pipelines.compare.config import read_comparison
from pipelines.study.config import StudyConfig
from tests.docs.commands import COMMANDS, PAGES, ROOT, DocumentedCommand, blocks

HYDRA = ("stage1", "stage2", "select", "evaluate", "predict", "rank", "inspect", "report")
# Programs of others, and what is no program of ours to check.
OTHERS = ("pip", "source", "mkdir", "printf", "eval", "pre-commit", ".ci/run")
TASK = "kind: classification\ntext: text\nlabels: [billing, outage, other]\nmetrics: [macro_f1]\n"
PIPELINES = {
    "demo": demo.DemoConfig,
    "two_stage": two_stage.TwoStageConfig,
    "ranking": ranking.RankingConfig,
    "adapterdrop": adapterdrop.DropConfig,
    "precision": precision.PrecisionConfig,
    "study": StudyConfig,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder of the documentation, with a task; Hydra composes from there."""
    for name in (*(f"fusion.{name}" for name in HYDRA), "pipelines.benchmark.__main__"):
        importlib.import_module(name)  # registers the schema of its config
    place = tmp_path_factory.mktemp("documentation")
    for name in ("conf/task", "outputs/stage2", "DIR"):
        (place / name).mkdir(parents=True)
    (place / "conf" / "task" / "tickets.yaml").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in ("FUSION_CONF", "FUSION_DATA_DIR"):
            patch.delenv(name, raising=False)
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            yield place


def commands(program: str, *names: str) -> list[DocumentedCommand]:
    modules = [f"{program}.{name}" for name in names]
    return [c for c in COMMANDS if c.words[:2] == ("python", "-m") and c.words[2] in modules]


def jobs(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The first and the last job of a sweep, for each key; the others only name more tasks and seeds."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = []
    for one in parsed:
        key = f"{'+' if one.is_add() else ''}{one.key_or_group}"
        values = list(one.sweep_string_iterator()) if one.is_discrete_sweep() else []
        choices.append([f"{key}={value}" for value in dict.fromkeys(values[:1] + values[-1:])] or [str(one.input_line)])
    for combined in zip_longest(*choices):
        yield [value or options[-1] for value, options in zip(combined, choices, strict=True)]


def overrides_of(command: DocumentedCommand) -> list[str]:
    """Its overrides, without flags and without keys of Hydra's own."""
    words = [word for word in command.words[3:] if re.match(r"\+?[a-z][\w.@/]*=", word)]
    flags = set(command.words[3:]) - {*words}
    assert flags <= {"-m", "--help", "--cfg", "job", "--info", "searchpath"}, str(command)
    searched = any(word.startswith("hydra/sweeper=") for word in words)
    # Optuna's ranges are read by its sweeper, which is not installed.
    words = [word for word in words if not (searched and re.search(r"=tag\(", word))]
    parsed = OverridesParser.create().parse_overrides(words)
    assert "-m" in flags or not any(one.is_sweep_override() for one in parsed), str(command)
    return [word for word in words if not re.match(r"hydra[./]", word)]


def command_of(name: str) -> Command:
    """A command with the settings of the real one, which trains nothing."""
    schema = OmegaConf.get_type(ConfigStore.instance().load(f"{name}_schema.yaml").node)
    assert schema is not None
    return Command(name, schema, lambda config, run: None, lambda config, run: {}, lambda config, overrides: None)


@cache
def known_groups() -> tuple[list[str], list[str]]:
    """The names of the config groups, and those of the tasks."""
    loader = GlobalHydra.instance().config_loader()
    return loader.list_groups(""), loader.get_group_options("task")


@cache
def composed(name: str, *groups: str) -> tuple[DictConfig, DictConfig]:
    """The config of a command, and Hydra's part of it."""
    config = compose(name, [*groups], return_hydra_config=True)
    hydra = config.hydra
    with open_dict(config):
        del config["hydra"]
    return config, hydra


def compose_all(command: DocumentedCommand) -> None:
    """Compose jobs of a command and convert them to the typed settings, as the command itself does.

    Hydra composes each choice of groups once, with one task for all (it takes most of the time); values are then set in
    a copy.
    """
    name = command.words[2].split(".")[1]
    group_names, tasks = known_groups()
    for job in jobs(overrides_of(command)):
        parsed = OverridesParser.create().parse_overrides(job)
        groups = [one for one in parsed if one.key_or_group in group_names]
        words = []
        for one in groups:
            assert one.key_or_group != "task" or one.value() in tasks, f"no task {one.value()}"
            words.append("+task=rte" if one.key_or_group == "task" else str(one.input_line))
        base, hydra = composed(name, *words)
        config = copy.deepcopy(base)
        for one in parsed:
            if one not in groups:
                OmegaConf.update(config, one.key_or_group, one.value(), merge=True)
        prepare(command_of(name), config, hydra)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_overrides_are_accepted(folder: Path, page: Path) -> None:
    for command in [*commands("fusion", *HYDRA), *commands("pipelines", "benchmark")]:
        if command.page == page:
            try:
                if overrides_of(command):  # else --help or --info
                    compose_all(command)
            except Exception as error:
                raise AssertionError(f"{command}\n{error}") from error


class Accepted(BaseException):
    """The arguments were read, and the command would start now."""


def test_other_programs_of_the_project_read_their_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(*arguments: Any) -> None:
        read_arguments(*arguments)
        raise Accepted

    for name in ("store", "compare", "sync"):
        module = importlib.import_module("fusion.store.__main__" if name == "store" else f"fusion.{name}")
        monkeypatch.setattr(module, "read_arguments", accept)
        for command in commands("fusion", name):
            with pytest.raises(Accepted):
                pytest.fail(f"{command}: exit code {module.main(list(command.words[3:]))}")
    for command in commands("pipelines", *PIPELINES):
        if "--help" not in command.words:
            read_config(PIPELINES[command.words[2].removeprefix("pipelines.")], list(command.words[3:]))
    for command in commands("pipelines", "compare"):
        read_comparison(list(command.words[3:]))


def test_all_commands_are_checked() -> None:
    """Every fenced command is of a program that a test here reads, or of another project."""
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets is not None
    known = {f"fusion.{name}" for name in (*HYDRA, "store", "compare", "sync")}
    known |= {f"pipelines.{name}" for name in (*PIPELINES, "compare", "benchmark")}
    for command in COMMANDS:
        if command.words[0] == "make":
            target, *values = command.words[1:]
            assert target in targets[1].split(), str(command)
            for value in values:
                assert re.search(rf"^{value.partition('=')[0]}\s*\?=", makefile, re.MULTILINE), str(command)
        elif command.words[:2] == ("python", "-m"):
            assert command.words[2] in known, str(command)
        else:
            assert command.words[0] in OTHERS, str(command)
    assert len(COMMANDS) > 100


def test_commands_are_in_bash_blocks() -> None:
    for page in PAGES:
        for language, text in blocks(page):
            assert language in ("bash", "yaml", "json", "python", "mermaid"), (page, text)
            assert language == "bash" or "python -m" not in text, (page, text)


def test_each_command_is_documented() -> None:
    """README names every command of the project."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 12_000
    for name in (*HYDRA, "store", "compare", "sync"):
        assert f"fusion.{name}" in readme


def test_relative_links_and_pictures_exist() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?^ *```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("https://", "http://", "#")):
                assert (page.parent / target.partition("#")[0]).is_file(), (page, target)


def test_files_of_the_project_that_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:fusion|conf|pipelines|tests)/[\w./]*)`", page.read_text("utf-8")):
            if name not in ("conf/backbone/NAME.yaml", "conf/task/NAME.yaml", "conf/task/tickets.yaml"):
                assert (ROOT / name).exists(), (page, name)
