"""W&B without the settings of whoever runs the tests, and a stub of its server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import wandb

from fusion.tracking.wandb_run import state
from tests.tracking.wandb_server import WandbServer, wandb_server

KEY = "0123456789abcdef" * 2 + "01234567"

# W&B's thread logs errors of a killed service during later tests, and caplog captures them although W&B's logger does
# not propagate.
logging.getLogger("wandb.sdk.lib.asyncio_manager").setLevel(logging.CRITICAL)


@contextlib.contextmanager
def clean_wandb(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """No key, no settings, no network variables; a separate W&B session."""
    with pytest.MonkeyPatch.context() as patch:
        state.reset()
        for variable in list(os.environ):
            if variable.startswith("WANDB_") or variable.lower().endswith("_proxy"):
                patch.delenv(variable)
        home.mkdir(parents=True, exist_ok=True)
        patch.setenv("NETRC", str(home / "netrc"))
        for kind in ("CONFIG", "CACHE", "DATA"):
            patch.setenv(f"WANDB_{kind}_DIR", str(home / kind.lower()))
        patch.chdir(home)
        yield patch
        with contextlib.suppress(Exception):  # a test may have ended the service
            wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        yield server


@lru_cache
def leet(directory: Path, *options: str) -> str:
    """What `wandb leet inspect` reads from the only run under DIRECTORY/wandb."""
    (path,) = [p for p in directory.glob("wandb/*run-*/*.wandb")]
    program = Path(sysconfig.get_path("scripts")) / "wandb"
    command = [sys.executable, str(program), "leet", "inspect", "--json", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def records(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in leet(directory).splitlines()]
    return [line[kind] for line in lines if line["type"] == kind]


def history(directory: Path) -> list[dict[str, Any]]:
    return [record["item"] for record in records(directory, "history")]


def summary(directory: Path) -> dict[str, Any]:
    return dict(json.loads(leet(directory, "--summary")))
