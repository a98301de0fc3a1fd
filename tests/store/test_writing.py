"""Where an artifact may be written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from fusion.files import check_writable
from fusion.store.layout import MANIFEST
from fusion.store.manifest import Manifest
from fusion.store.writing import check_free
from tests.store.conftest import put

Make = Callable[..., Manifest]


def test_check_free(make_manifest: Make, store: Path) -> None:
    check_free("mnli", "adapter", store, overwrite=False)
    put(store / "mnli", make_manifest())
    with pytest.raises(UserError, match="overwrite=true"):
        check_free("mnli", "adapter", store, overwrite=False)
    check_free("mnli", "adapter", store, overwrite=True)
    for overwrite in (False, True):  # a fusion never takes an adapter's name
        with pytest.raises(UserError, match="is a stored adapter; set a different name= for this fusion"):
            check_free("mnli", "fusion", store, overwrite)
    (store / "notes").mkdir()
    with pytest.raises(UserError, match="is not an artifact"):
        check_free("notes", "adapter", store, overwrite=True)
    (store / "mnli" / MANIFEST).write_text("{")
    check_free("mnli", "adapter", store, overwrite=True)  # damaged: training it again fixes it
    with pytest.raises(UserError, match="letters"):
        check_free("../mnli", "adapter", store, overwrite=True)


def test_check_writable(store: Path) -> None:
    check_writable(str(store), "store")  # not there yet: its parents will be made
    assert not store.exists()
    store.parent.mkdir()
    store.write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        check_writable(str(store), "store")
    with pytest.raises(UserError, match="Not a directory"):
        check_writable(str(store / "below"), "store")


def test_check_writable_without_permission(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.mkdir(parents=True)

    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(str(store), "store")
