"""The id of a W&B run is kept until the run is done."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fusion.tracking.wandb_run import ID_FILE as FILE
from fusion.tracking.wandb_run import run_id


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


def test_id_is_kept_with_the_checkpoints(tmp_path: Path) -> None:
    first = run_id(tmp_path / "cb-12ab", "12ab")
    assert first is not None and re.fullmatch(r"12ab-[0-9a-f]{6}", first)
    assert run_id(tmp_path / "cb-12ab", "12ab") == first
    (tmp_path / "cb-12ab" / FILE).unlink()
    assert run_id(tmp_path / "cb-12ab", "12ab") != first
    assert run_id(None, "12ab") is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"id": 3}', '{"id": "a/b"}', '{"id": ""}'])
def test_damaged_file(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    found = run_id(tmp_path, "12ab")
    assert json.loads((tmp_path / FILE).read_text()) == {"id": found}


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(run_id(tmp_path / "file", "12ab")).startswith("12ab-")


def test_id_of_a_sweep_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")  # without a sweep it would merge all jobs of a multirun into one run
    assert run_id(tmp_path, "12ab") != "abc"
    monkeypatch.setenv("WANDB_SWEEP_ID", "xyz")
    assert run_id(tmp_path, "12ab") == "abc"
