"""Loading from the hub, against a local stub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of each load, by its name in `hub_stand_in`."""
    program = Path(__file__).with_name("hub_stand_in.py")
    finished = subprocess.run(
        [sys.executable, str(program), str(tmp_path_factory.mktemp("home"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "", "quiet"
    return json.loads(finished.stdout.splitlines()[-1])


def test_a_split_is_loaded_and_then_taken_from_the_cache(loaded):
    assert loaded["first"]["rows"] == [f"row {number}" for number in range(10)]
    assert loaded["first"]["labels"] == [0, 1] * 5
    assert loaded["first"]["requests"] > 0
    assert loaded["again"]["rows"] == loaded["first"]["rows"]
    assert loaded["again"]["requests"] == 0


def test_each_validation_set(loaded):
    assert len(loaded["near"]["rows"]) == 4
    assert len(loaded["far"]["rows"]) == 5


def test_parts_of_a_converted_data_set(loaded):
    train, validation = loaded["converted train"]["rows"], loaded["converted validation"]["rows"]
    assert (len(train), len(validation)) == (16, 4)
    assert sorted(train + validation) == sorted(f"row {number}" for number in range(20))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("no configuration", "org/plain (large), train cannot be loaded: BuilderConfig 'large' not found"),
        ("no repository", "org/nothing, train cannot be loaded: Dataset 'org/nothing' doesn't exist"),
        ("script", "hub.revision=refs/convert/parquet"),
        ("broken", "org/broken, train cannot be loaded: Parquet magic bytes not found"),
    ],
)
def test_the_message_has_the_cause(loaded, case, expected):
    lines = loaded[case]["error"].splitlines()
    assert expected in lines[0]
    assert len(lines) == 2 and "data.dir=DIR" in lines[1]


def test_without_the_hub_the_cache_serves(loaded):
    assert loaded["offline"]["rows"] == loaded["first"]["rows"]
    assert len(loaded["offline, converted"]["rows"]) == 3


@pytest.mark.parametrize("case", ["offline, not cached", "offline, other configuration"])
def test_without_hub_and_cache_the_error_is_immediate(loaded, case):
    lines = loaded[case]["error"].splitlines()
    assert "not in the local cache, and the Hub cannot be reached" in lines[0]
    assert "set data.dir=DIR to read DIR/pets/train.parquet" in lines[1]
    assert loaded[case]["seconds"] < 3
