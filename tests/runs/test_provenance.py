"""Where a run came from: the state of the checkout, the packages, the threads; null where it cannot be known."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fusion.runs.provenance
from fusion.runs.provenance import PACKAGES, circumstances, git_state, versions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, "-C", str(folder), *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a project"
    (folder / "fusion").mkdir(parents=True)
    (folder / "fusion" / "code.py").write_text("one\n")
    (folder / "README.md").write_text("read\n")
    git(tmp_path, "init", "-q", str(folder))
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "one")
    return folder


def test_commit_and_changes(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout) == {"commit": commit, "dirty": False}
    (checkout / "README.md").write_text("another\n")
    (checkout / "rows.jsonl").write_text("{}\n")
    assert git_state(checkout) == {"commit": commit, "dirty": False}  # no code that a run is made of
    (checkout / "fusion" / "code.py").write_text("two\n")
    assert git_state(checkout) == {"commit": commit, "dirty": True}
    git(checkout, "checkout", "-q", "fusion")
    (checkout / "fusion" / "new.py").write_text("new\n")
    assert git_state(checkout) == {"commit": commit, "dirty": True}


def test_outside_a_git_checkout(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkout / "lib" / "site-packages"
    installed.mkdir(parents=True)
    assert git_state(installed) is None  # inside another project's checkout
    assert git_state(tmp_path) is None
    assert git_state(tmp_path / "nowhere") is None
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))  # as inside a hook
    assert git_state(tmp_path) is None
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(checkout) is None


def test_a_checkout_without_a_commit(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", str(tmp_path))
    assert git_state(tmp_path) is None


def test_a_git_that_hangs(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "git"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(fusion.runs.provenance, "GIT_SECONDS", 0.2)
    started = time.monotonic()
    assert git_state(checkout) is None
    assert time.monotonic() - started < 5


def test_circumstances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FUSION_CONF", raising=False)
    assert circumstances() == {
        "git": git_state(),
        "threads": torch.get_num_threads(),
        "folder": str(tmp_path),
        "environment": {},
    }
    monkeypatch.setenv("FUSION_CONF", "somewhere")
    assert circumstances()["environment"] == {"FUSION_CONF": "somewhere"}


def test_versions_of_all_dependencies(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {re.split(r"[<>=!~ ;\[]", line)[0] for line in project["dependencies"]}
    assert set(PACKAGES) == asked
    assert versions().keys() == asked | {"adapter-fusion", "python"}
    assert versions()["torch"] and torch.__version__.startswith(str(versions()["torch"]))
    monkeypatch.setattr(fusion.runs.provenance, "PACKAGES", ("no-such-package",))
    assert versions.__wrapped__()["no-such-package"] is None
