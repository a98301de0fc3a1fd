"""A W&B run's id: kept for as long as the run is not done."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fusion.tracking.run_id import FILE, run_id


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)


def test_the_same_while_its_folder_is_there(tmp_path: Path) -> None:
    first = run_id(tmp_path / "cb-12ab", "12ab")
    assert first is not None and re.fullmatch(r"12ab-[0-9a-f]{6}", first)
    assert run_id(tmp_path / "cb-12ab", "12ab") == first
    (tmp_path / "cb-12ab" / FILE).unlink()
    assert run_id(tmp_path / "cb-12ab", "12ab") != first
    assert run_id(None, "12ab") is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"id": 3}', '{"id": "a/b"}', '{"id": ""}'])
def test_a_file_that_is_no_id(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    found = run_id(tmp_path, "12ab")
    assert json.loads((tmp_path / FILE).read_text()) == {"id": found}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(run_id(tmp_path / "file", "12ab")).startswith("12ab-")


def test_what_an_agent_gave_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")  # alone it would make one run of a whole multirun
    assert run_id(tmp_path, "12ab") != "abc"
    monkeypatch.setenv("WANDB_SWEEP_ID", "xyz")
    assert run_id(tmp_path, "12ab") == "abc"
