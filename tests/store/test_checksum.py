"""The checksum of a manifest: a change of any value is refused, and manifests without one still load."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.errors import UserError
from fusion.model.from_manifests import head_shapes, tensor_shapes, weight_shapes
from fusion.store.artifacts import load, save, verify
from fusion.store.layout import MANIFEST
from fusion.store.lookup import read_manifest
from fusion.store.manifest import Manifest, checksum_of

Make = Callable[..., Manifest]


@pytest.fixture
def path(store: Path, make_manifest: Make) -> Path:
    """The manifest of a stored adapter."""
    manifest = make_manifest("films")
    weights = {name: torch.ones(shape) for name, shape in (weight_shapes(manifest, [], Path()) or {}).items()}
    head = {name: torch.ones(shape) for name, shape in head_shapes(manifest, Path()).items()}
    return save(store, manifest, weights, head) / MANIFEST


def leaves(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield way
    for key, entry in inner or ():
        yield from leaves(entry, (*way, key))


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value[:-1] + chr(ord(value[-1]) ^ 1) if isinstance(value, str) and value else "x"


def test_a_change_of_any_value_is_refused(path: Path, store: Path) -> None:
    text = path.read_text()
    ways = list(leaves(json.loads(text)))
    assert len(ways) > 40
    for *way, key in ways:
        values = json.loads(text)
        parent = values
        for step in way:
            parent = parent[step]
        parent[key] = other(parent[key])
        path.write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_manifest("films", store)


def test_a_flipped_bit_changes_nothing_or_is_refused(path: Path, store: Path) -> None:
    content, manifest, draw = path.read_bytes(), read_manifest("films", store), random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged))
        try:
            assert read_manifest("films", store) == manifest  # white space, as JSON has it
        except UserError:
            refused += 1
    assert refused > 300


def test_another_layout_of_the_same_content_is_read(path: Path, store: Path) -> None:
    manifest = read_manifest("films", store)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=None))
    assert read_manifest("films", store) == manifest


def test_the_order_of_tasks_counts(make_manifest: Make) -> None:
    one, two = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert checksum_of({"multitask": one}) != checksum_of({"multitask": two})
    assert checksum_of({"a": 1, "checksum": "x"}) == checksum_of({"a": 1})


def test_without_a_checksum_it_loads_with_one_note(path: Path, store: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = read_manifest("films", store)
    values = json.loads(path.read_text())
    del values["checksum"]
    path.write_text(json.dumps(values))
    with caplog.at_level(logging.INFO):
        assert [load("films", store).manifest.hash for _ in range(2)] == [manifest.hash] * 2
    (record,) = [record for record in caplog.records if "checksum" in record.message]
    assert "overwrite=true to add one" in record.message
    (verdict,) = verify(store, tensor_shapes, "films")
    assert str(verdict) == "ok       films (its manifest has no checksum)"
    again = json.loads(read_manifest("films", store).to_json())  # written again, it has one
    assert again["checksum"] == checksum_of(again) == manifest.checksum


@pytest.mark.parametrize("value", ["", "0" * 64, None])
def test_another_checksum_is_refused(path: Path, store: Path, value: str | None) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checksum": value}))
    for read in (read_manifest, load):
        with pytest.raises(UserError, match=r"manifest\.json .*checksum"):
            read("films", store)
    (verdict,) = verify(store, tensor_shapes, "films")
    assert "checksum" in verdict.problem
