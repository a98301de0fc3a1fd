from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fusion.config.commands import PredictConfig, ReportConfig
from fusion.config.stages import Stage1Config
from fusion.config.task import TaskConfig
from fusion.data.splits import check_source
from fusion.errors import UserError
from fusion.files import check_relative, check_writable, expand_paths, resolve_path
from fusion.store.__main__ import main as store_program
from fusion.sync import main as sync_program


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


BAD = {
    "": "is empty",
    "  ": "is empty",
    "a\0b": "null byte",
    "x" * 256: "name too long",
    "loop": "too many levels of symbolic links",
    "loop/store": "too many levels of symbolic links",
    "file/store": "not a directory",
    "~nobody-has-this-name/x": "home directory",
    "\ud800": "can't encode",
    "/".join(["x" * 200] * 30): "name too long",
}


@pytest.mark.parametrize("text", BAD)
def test_invalid_paths(home: Path, text: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_path(text, "store")
    message = str(error.value)
    assert message.startswith("store=") and BAD[text].lower() in message.lower() and len(message) < 1200
    assert message.isprintable()


def test_valid_paths(home: Path) -> None:
    assert resolve_path("~/store", "store") == home / "store"
    assert resolve_path("outputs/store", "store") == Path("outputs/store")
    assert resolve_path("link/new", "store") == Path("link/new")
    assert resolve_path("größe 東京/store", "store") == Path("größe 東京/store")


@dataclass
class Data:
    dir: str | None = None
    cache_dir: str | None = None


@dataclass
class Config:
    store: str = "outputs/store"
    artifact: str = "mnli"
    data: Data = field(default_factory=Data)


SETTINGS: dict[str, Any] = {
    "store": lambda path: Stage1Config(store=path),
    "artifact": lambda path: Config(artifact=path),
    "data.dir": lambda path: Config(data=Data(dir=path)),
    "data.cache_dir": lambda path: Config(data=Data(cache_dir=path)),
    "input": lambda path: PredictConfig(artifact="a", input=path, output="o"),
    "output": lambda path: PredictConfig(artifact="a", input="i", output=path),
}


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize("path", ["a\0b", "", "~nobody-has-this-name"])
def test_every_setting_is_checked(home: Path, key: str, path: str) -> None:
    with pytest.raises(UserError, match=f"^{key}="):
        expand_paths(SETTINGS[key](path))


@pytest.mark.parametrize("path", ["./loop/x", "~nobody-has-this-name"])
def test_a_backbone_folder_is_checked(home: Path, path: str) -> None:
    config = Stage1Config()
    config.backbone.name_or_path = path
    with pytest.raises(UserError, match=r"^backbone\.name_or_path="):
        expand_paths(config)


def test_all_paths_expand_the_home_folder(home: Path) -> None:
    stage1 = Stage1Config(store="~/store")
    predict = PredictConfig(artifact="mnli", store="~/store", input="~/in.csv", output="~/out.jsonl")
    report = ReportConfig(runs=["~/runs", "outputs"], output="~/report.html")
    for config in (stage1, predict, report):
        expand_paths(config)
    assert stage1.store == predict.store == str(home / "store")
    assert (predict.input, predict.output) == (str(home / "in.csv"), str(home / "out.jsonl"))
    assert report.folders == [home / "runs", Path("outputs")] and report.path == home / "report.html"


def test_paths_in_the_identity_are_kept_as_typed(home: Path) -> None:
    config = Stage1Config()
    config.data.dir, config.backbone.name_or_path = "~/data", "prajjwal1/bert-tiny"
    expand_paths(config)
    assert config.data.dir == "~/data"


@pytest.mark.parametrize("store", ["dangling", "loop", "file", "file/store", "x" * 300])
def test_a_store_that_cannot_be_written_is_refused_before_training(home: Path, store: str) -> None:
    with pytest.raises(UserError, match=r"^store="):
        check_writable(store, "store")


@pytest.mark.parametrize("path", ["loop", "x" * 300, "~nobody-has-this-name"])
def test_the_programs_without_hydra(home: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert store_program(["list", f"store={path}"]) == 2
    assert store_program(["show", "mnli", f"into={path}"]) == 2
    assert sync_program([f"runs={path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("=")[0] for line in lines] == ["store", "into", "runs"]


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/../../b", "..", ".", "", "a//b", "a\\..\\b", "C:x", "x\0"])
def test_a_name_that_leaves_its_folder(name: str, tmp_path: Path) -> None:
    assert check_relative(name) is not None
    config = Stage1Config()
    config.data.dir = str(tmp_path)
    task = TaskConfig(name=name, text=["text"], labels=["a", "b"], metrics=["accuracy"])
    with pytest.raises(UserError, match=r"not a subfolder of data\.dir"):
        check_source(task, config.data)


@pytest.mark.parametrize("name", ["mnli", "glue/mnli", "a..b", "größe"])
def test_a_name_inside_its_folder(name: str) -> None:
    assert check_relative(name) is None
