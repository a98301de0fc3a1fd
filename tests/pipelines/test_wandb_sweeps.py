"""The sweeps of pipelines/wandb/: what W&B's agent makes of each file is a command that ours accepts."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from fusion.store.layout import is_name

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "pipelines" / "wandb"
FILES = sorted(FOLDER.glob("*.yaml"))
Sweep = dict[str, Any]


def read(path: Path) -> Sweep:
    sweep: Sweep = yaml.safe_load(path.read_text(encoding="utf-8"))
    return sweep


def ends(parameter: Mapping[str, Any]) -> list[Any]:
    """Values of a parameter: all of them, or the least and the most."""
    return list(parameter["values"]) if "values" in parameter else [parameter["min"], parameter["max"]]


def agents_command(sweep: Sweep, values: Mapping[str, Any]) -> list[str]:
    """What W&B's agent runs, as its `_command_run` puts it together."""
    # Importing this takes seconds, which collecting the tests need not wait for.
    from wandb.sdk.launch.sweeps import utils as wandb_sweeps

    macros: dict[str, Any] = wandb_sweeps.create_sweep_command_args(
        {"args": {key: {"value": value} for key, value in values.items()}}
    )
    macros |= {"interpreter": [sys.executable], "program": [sweep["program"]], "env": ["/usr/bin/env"]}
    words: list[str] = []
    for word in map(str, wandb_sweeps.create_sweep_command(list(sweep["command"]))):
        whole = word.startswith("${") and word.endswith("}")
        words += macros.get(word[2:-1], []) if whole else [word]
    return words


def test_available_sweeps() -> None:
    assert [path.stem for path in FILES] == ["bottleneck_size", "learning_rate", "sources"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_agents_command_is_accepted(path: Path) -> None:
    sweep = read(path)
    assert (ROOT / sweep["program"]).is_file()
    values = {key: ends(parameter)[-1] for key, parameter in sweep["parameters"].items()}
    command = agents_command(sweep, values)
    assert command[:3] == ["/usr/bin/env", sys.executable, "-m"]
    assert not [word for word in command if "args" in word or "interpreter" in word]
    done = subprocess.run(
        [*command, "--cfg", "job", "--resolve"],
        cwd=ROOT,
        env=os.environ | {"WANDB_RUN_ID": "a1b2c3d4", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    for key, value in values.items():
        found: Any = config
        for part in key.split("."):
            found = found[part]
        assert found == yaml.safe_load(str(value)), key
    assert is_name(config["name"]) and "$" not in config["name"]
    assert sweep["metric"]["goal"] == "maximize"
    assert sweep["metric"]["name"] == f"validation/{config['task']['metrics'][0]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_runs_have_unique_names(path: Path) -> None:
    sweep = read(path)
    (name,) = [word for word in sweep["command"] if word.startswith("name=")]
    every = [f"${{{key}}}" in name for key in sweep["parameters"]]
    assert all(every) or "${oc.env:WANDB_RUN_ID}" in name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_equivalent_multirun_has_the_same_search_space(path: Path) -> None:
    sweep = read(path)
    lines = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if "python -m" in line]
    (words,) = [shlex.split(line) for line in lines]
    assert words[:4] == ["python", "-m", sweep["command"][3], "-m"]
    fixed = {word for word in sweep["command"][4:] if not word.startswith(("name=", "${"))}
    overrides = OverridesParser.create().parse_overrides(words[4:])
    (members,) = BasicSweeper.split_arguments(overrides, None)
    assert all(fixed <= set(member) for member in members)
    asked = {frozenset(set(member) - fixed) for member in members}
    keys = list(sweep["parameters"])
    if sweep["method"] == "grid":
        grid = itertools.product(*(ends(sweep["parameters"][key]) for key in keys))
        assert asked == {frozenset(f"{k}={v}" for k, v in zip(keys, values, strict=True)) for values in grid}
    else:
        (key,) = keys
        low, high = ends(sweep["parameters"][key])
        rates = [float(word.removeprefix(f"{key}=")) for (word,) in asked]
        assert len(rates) > 1 and all(low <= rate <= high for rate in rates)
