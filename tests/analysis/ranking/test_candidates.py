"""The adapters that sources=all selects, by manifests alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fusion.analysis.ranking.selection import all_adapters
from fusion.errors import UserError
from tests.bench import Bench


@pytest.fixture
def store(three: Bench, tmp_path: Path) -> Path:
    shutil.copytree(three.folder / "store", tmp_path / "store")
    return tmp_path / "store"


def add(store: Path, name: str, of: str = "films", **changes: Any) -> None:
    """Another artifact, with a changed manifest; `backbone` and `adapter` are changed by key."""
    shutil.copytree(store / of, store / name)
    values = json.loads((store / name / "manifest.json").read_text())
    values.pop("checksum", None)
    for key, value in changes.items():
        values[key] = values[key] | value if key in ("backbone", "adapter") and value else value
    (store / name / "manifest.json").write_text(json.dumps(values | {"name": name}))


def names(store: Path, backbone: str, task: str | None = None) -> tuple[list[str], dict[str, str]]:
    found = all_adapters(store, backbone, task)
    return [manifest.name for manifest in found.sources], found.left_out


def test_all_are_selected_in_order_of_their_names(store: Path, tiny_backbone: Path) -> None:
    assert names(store, str(tiny_backbone)) == (["coins", "dice", "films"], {})
    assert all_adapters(store, str(tiny_backbone)).left_out_line() == ""


def test_adapters_of_the_target_can_be_excluded(store: Path, tiny_backbone: Path) -> None:
    add(store, "films-seed-2")
    entry = json.loads((store / "films" / "manifest.json").read_text())
    both = {task: {"task": entry["task"] | {"name": task}, "head": entry["head"]} for task in ("x", "films")}
    add(store, "both", multitask=both)
    own = "trained on the target films; set include_target=true to include it"
    assert names(store, str(tiny_backbone), "films") == (
        ["coins", "dice"],
        {"both": own, "films": own, "films-seed-2": own},
    )
    line = all_adapters(store, str(tiny_backbone), "films").left_out_line()
    assert line == f"excluded: both, films, films-seed-2 ({own})"
    assert names(store, str(tiny_backbone))[0] == ["both", "coins", "dice", "films", "films-seed-2"]


def test_debug_and_diverged_runs_are_excluded(store: Path, tiny_backbone: Path) -> None:
    add(store, "films-debug")
    add(store, "films-diverged")
    add(store, "hot", result={"diverged": {"train_loss": 9.0, "limit": 2.0}})
    found, left_out = names(store, str(tiny_backbone))
    assert found == ["coins", "dice", "films"] and left_out == {
        "films-debug": "trained with debug=",
        "films-diverged": "training diverged",
        "hot": "training diverged",
    }


def test_adapters_incompatible_with_most_are_excluded(store: Path, tiny_backbone: Path) -> None:
    add(store, "before", adapter={"reads": "input"})
    add(store, "other", backbone={"name_or_path": "another", "fingerprint": "e" * 64})
    add(store, "same", backbone={"name_or_path": "a copy of it"})  # the same weights by another name
    found, left_out = names(store, str(tiny_backbone))
    assert found == ["coins", "dice", "films", "same"]
    assert set(left_out) == {"before", "other"} and left_out["other"] == "trained on backbone another"
    assert left_out["before"].startswith("feedforward/input on weights")
    assert "instead of the most common feedforward/normed on weights" in left_out["before"]


def test_other_kinds_are_ignored_and_damaged_artifacts_are_named(store: Path, tiny_backbone: Path) -> None:
    reason = "cannot be read, see python -m fusion.store verify"
    add(store, "a-head", kind="head", adapter=None)
    path = store / "dice" / "manifest.json"
    path.write_text(path.read_text()[:100])
    assert names(store, str(tiny_backbone)) == (["coins", "films"], {"dice": reason})
    for name in ("coins", "films"):
        (store / name / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=rf"has no adapters.*excluded: coins, dice, films \({reason}\)"):
        all_adapters(store, str(tiny_backbone))


def test_a_store_without_candidates(store: Path, tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapters for another; excluded: coins, dice, films .trained on backbone "):
        all_adapters(store, "another")
    for name in ("coins", "dice"):
        shutil.rmtree(store / name)
    with pytest.raises(UserError, match=r"excluded: films \(trained on the target films"):
        all_adapters(store, str(tiny_backbone), "films")
    with pytest.raises(UserError, match="has no adapters"):
        all_adapters(tmp_path / "nothing", str(tiny_backbone))
