"""evaluate reads rows from the folder of the artifact's training."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from fusion.config.commands import EvaluateConfig
from fusion.config.data import DataConfig
from fusion.errors import UserError
from fusion.evaluate import use_trained_data
from tests.bench import Bench


def settled(bench: Bench, *overrides: str, **changes: object) -> str | None:
    config = EvaluateConfig(artifact="films", store=str(bench.folder / "store"), data=DataConfig())
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    use_trained_data(config, overrides)
    return config.data.dir


def test_the_folder_of_the_training_unless_data_dir_is_set(bench: Bench) -> None:
    bench.stage1("films")
    folder = str(bench.folder / "data")
    assert settled(bench) == folder
    assert settled(bench, task=bench.tasks["books"]) == folder  # its rows are there as well
    assert settled(bench, task=dataclasses.replace(bench.tasks["films"], name="elsewhere")) is None
    assert settled(bench, "data.dir=null") is None
    assert settled(bench, data=DataConfig(dir=str(bench.folder))) == str(bench.folder)
    shutil.move(folder, Path(folder).with_name("moved"))
    with pytest.raises(UserError, match=r"data folder that films was trained with does not exist\nSet data\.dir=DIR"):
        settled(bench)
