"""What sources=all means, over manifests alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fusion.analysis.ranking.candidates import all_adapters
from fusion.errors import UserError
from tests.bench import Bench


@pytest.fixture
def store(three: Bench, tmp_path: Path) -> Path:
    shutil.copytree(three.folder / "store", tmp_path / "store")
    return tmp_path / "store"


def add(store: Path, name: str, of: str = "films", **changes: Any) -> None:
    """Another artifact, whose manifest says something else; `backbone` and `adapter` are changed key by key."""
    shutil.copytree(store / of, store / name)
    values = json.loads((store / name / "manifest.json").read_text())
    values.pop("checksum", None)  # of what it was
    for key, value in changes.items():
        values[key] = values[key] | value if key in ("backbone", "adapter") and value else value
    (store / name / "manifest.json").write_text(json.dumps(values | {"name": name}))


def names(store: Path, backbone: str, task: str | None = None) -> tuple[list[str], dict[str, str]]:
    found = all_adapters(store, backbone, task)
    return [manifest.name for manifest in found.sources], found.left_out


def test_all_are_taken_by_name(store: Path, tiny_backbone: Path) -> None:
    assert names(store, str(tiny_backbone)) == (["coins", "dice", "films"], {})
    assert all_adapters(store, str(tiny_backbone)).left_out_line() == ""


def test_the_targets_own_are_left_out_where_that_is_asked_for(store: Path, tiny_backbone: Path) -> None:
    add(store, "films-seed-2")
    entry = json.loads((store / "films" / "manifest.json").read_text())
    both = {task: {"task": entry["task"] | {"name": task}, "head": entry["head"]} for task in ("x", "films")}
    add(store, "several", multitask=both)
    own = "trained on films itself, include_target=true takes it in"
    assert names(store, str(tiny_backbone), "films") == (
        ["coins", "dice"],
        {"films": own, "films-seed-2": own, "several": own},
    )
    line = all_adapters(store, str(tiny_backbone), "films").left_out_line()
    assert line == f"left out: films, films-seed-2, several ({own})"
    assert names(store, str(tiny_backbone))[0] == ["coins", "dice", "films", "films-seed-2", "several"]


def test_debug_runs_and_diverged_ones_are_left_out(store: Path, tiny_backbone: Path) -> None:
    add(store, "films-debug")
    add(store, "films-diverged")
    add(store, "hot", result={"diverged": {"train_loss": 9.0, "limit": 2.0}})
    found, left_out = names(store, str(tiny_backbone))
    assert found == ["coins", "dice", "films"] and left_out == {
        "films-debug": "trained with debug=",
        "films-diverged": "its training diverged",
        "hot": "its training diverged",
    }


def test_what_cannot_be_fused_with_most_is_left_out_and_said(store: Path, tiny_backbone: Path) -> None:
    add(store, "before", adapter={"reads": "input"})
    add(store, "other", backbone={"name_or_path": "another", "fingerprint": "e" * 64})
    add(store, "same", backbone={"name_or_path": "a copy of it"})  # by another name, the same weights
    found, left_out = names(store, str(tiny_backbone))
    assert found == ["coins", "dice", "films", "same"]
    assert set(left_out) == {"before", "other"} and left_out["other"] == "backbone another"
    assert left_out["before"].startswith("feedforward/input on weights")
    assert "most have feedforward/normed on weights" in left_out["before"]


def test_other_kinds_are_none_of_them_and_damaged_artifacts_are_named(
    store: Path, tiny_backbone: Path
) -> None:
    reason = "cannot be read, python -m fusion.store verify says why"
    add(store, "a-head", kind="head", adapter=None)
    path = store / "dice" / "manifest.json"
    path.write_text(path.read_text()[:100])
    assert names(store, str(tiny_backbone)) == (["coins", "films"], {"dice": reason})
    for name in ("coins", "films"):
        (store / name / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=rf"has no adapters.*left out: coins, dice, films \({reason}\)"):
        all_adapters(store, str(tiny_backbone))


def test_a_store_without_any(store: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was trained on another, only on"):
        all_adapters(store, "another")
    for name in ("coins", "dice"):
        shutil.rmtree(store / name)
    with pytest.raises(
        UserError, match=r"no adapter is left to take; left out: films \(trained on films itself"
    ):
        all_adapters(store, str(tiny_backbone), "films")
    with pytest.raises(UserError, match="has no adapters"):
        all_adapters(tmp_path / "nothing", str(tiny_backbone))
