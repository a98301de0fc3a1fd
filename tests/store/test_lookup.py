"""How artifacts are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from fusion.store.layout import MANIFEST, WEIGHTS
from fusion.store.lookup import find, find_by_hash, names, read_manifest
from fusion.store.manifest import Manifest
from tests.store.conftest import FILES, put

Make = Callable[..., Manifest]


def test_find_by_name_then_by_path(make_manifest: Make, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = put(store / "mnli", make_manifest("mnli"))
    elsewhere = put(store.parent / "copies" / "mnli", make_manifest("mnli", seed=9))
    assert find("mnli", store) == stored
    assert find(str(elsewhere), store) == elsewhere
    monkeypatch.chdir(elsewhere.parent)
    assert find("mnli", store) == stored  # the store first
    assert find("./mnli", store) == Path("mnli")
    assert read_manifest(str(elsewhere), store).seed == 9
    assert find("mnli", store.parent / "empty") == Path("mnli")


def test_an_unknown_name_lists_the_available_ones(make_manifest: Make, store: Path) -> None:
    with pytest.raises(UserError, match=r"It is empty or does not exist; set store=DIR"):
        find("mnli", store)
    for name in ("mnli", "snli", "rte"):
        put(store / name, make_manifest(name))
    (store / ".runs" / "mnli-0123").mkdir(parents=True)
    (store / "notes").mkdir()
    assert names(store) == ["mnli", "rte", "snli"]
    with pytest.raises(UserError, match="did you mean mnli or snli") as error:
        find("mnlli", store)
    assert "It contains mnli, rte, snli" in str(error.value)
    with pytest.raises(UserError, match=r"no artifact '\.\./mnli'"):
        find("../mnli", store)
    with pytest.raises(UserError, match="is not an artifact"):
        find(str(store / "notes"), store)
    with pytest.raises(UserError, match="no artifact 'xxx"):
        find("x" * 5000, store)
    with pytest.raises(UserError, match="no artifact ''"):
        find("", store)
    for number in range(30):
        put(store / f"task{number}", make_manifest())
    with pytest.raises(UserError, match="and 13 more"):
        find("cola", store)


def test_find_by_hash(make_manifest: Make, store: Path) -> None:
    def files(digit: str) -> dict[str, Any]:
        return FILES | {WEIGHTS: {"sha256": digit * 64, "bytes": 10}}

    first, second, third = (make_manifest("mnli", files=files(digit)) for digit in "345")
    put(store / "mnli", second)
    put(store / "copy", third)
    put(store / ".replaced" / f"mnli-{first.hash[:8]}", first)
    assert find_by_hash(second.hash, "mnli", store) == store / "mnli"
    assert find_by_hash(third.hash, "mnli", store) == store / "copy"  # renamed by hand
    assert find_by_hash(first.hash, "mnli", store) == store / ".replaced" / f"mnli-{first.hash[:8]}"
    (store / "mnli" / MANIFEST).write_text("{")
    for gone, name in (("0" * 64, "mnli"), ("0" * 64, "rte"), (second.hash, "mnli")):
        with pytest.raises(UserError, match=rf"source {name} \({gone[:8]}\) not found: "):
            find_by_hash(gone, name, store)
    assert find_by_hash(third.hash, "mnli", store) == store / "copy"  # the damaged one hides nothing


def test_invalid_artifact_paths(make_manifest: Make, store: Path) -> None:
    folder = put(store / "mnli", make_manifest())
    (store / "peft").mkdir()
    (store / "peft" / "adapter_config.json").touch()
    for path in (folder / MANIFEST, store, store / "peft"):
        with pytest.raises(UserError, match="is not an artifact, since it has no manifest") as error:
            find(str(path), store)
        assert len(str(error.value).splitlines()) == 1
