"""A hub that fails: each load ends in a bounded time, and the message has the override that works without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CURES = {"data": "data.dir=DIR", "backbone": "backbone.name_or_path=", "tokenizer": "backbone.name_or_path="}
SECONDS = 30.0


def load(folder: Path, fault: str, kind: str) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.hub.hub_faults", str(folder), fault, kind],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "", "quiet"
    came: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    lines = came["message"].splitlines()
    assert len(lines) == 2 and CURES[kind] in lines[1], came
    assert came["seconds"] < SECONDS
    return came


QUICK = [
    ("500", "data", "cannot be loaded: the Hub returned status 500"),
    ("truncated", "backbone", "file should be of size 200000 but has size 100000"),
]
SLOW = [
    ("404", "backbone", "cannot be loaded"),
    ("500", "backbone", "the Hub returned status 500"),
    ("500", "tokenizer", "the Hub returned status 500"),
    ("404", "data", "cannot be loaded"),
    ("404", "tokenizer", "cannot be loaded"),
    ("truncated", "data", "Consistency check failed"),
    ("dropping", "data", "the download was interrupted"),
    ("dropping", "backbone", "the download was interrupted"),
    ("stalling", "data", "the download was interrupted"),
    ("stalling", "backbone", "the download was interrupted"),
    ("silent later", "data", "the Hub does not respond"),
    *[("silent", kind, "the Hub cannot be reached") for kind in CURES],
    *[("dns", kind, "the Hub cannot be reached") for kind in CURES],
    *[("slow", kind, "the Hub does not respond") for kind in CURES],
]


@pytest.mark.parametrize(("fault", "kind", "expected"), QUICK)
def test_the_message_has_the_fault(tmp_path: Path, fault: str, kind: str, expected: str) -> None:
    assert expected in load(tmp_path, fault, kind)["message"]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "kind", "expected"), SLOW)
def test_the_message_has_the_cause_of_a_slow_fault(tmp_path: Path, fault: str, kind: str, expected: str) -> None:
    assert expected in load(tmp_path, fault, kind)["message"]
