"""Provenance of an artifact: code, package versions, threads and directory. Unknown values are null."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from fusion import __version__

# The dependencies in pyproject.toml, which may affect results.
PACKAGES = (
    *("torch", "pytorch-lightning", "transformers", "tokenizers", "datasets", "hydra-core", "omegaconf", "wandb"),
    *("safetensors", "huggingface-hub", "filelock", "pyarrow", "numpy", "scipy", "PyYAML", "pydantic", "nervaluate"),
    *("jinja2", "matplotlib", "pillow", "rich", "pandas", "peft", "accelerate", "gguf"),
)
PROJECT = Path(__file__).resolve().parents[2]
CODE = ("fusion", "conf")  # directories that affect results
GIT_SECONDS = 5.0


@functools.cache
def versions() -> dict[str, str | None]:
    """Return the versions of this project, Python and `PACKAGES`; None for packages that are not installed."""
    found: dict[str, str | None] = {"adapter-fusion": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def circumstances() -> dict[str, Any]:
    """Return the git state, number of threads, working directory and environment for the manifest."""
    import torch

    environment = {"FUSION_CONF": conf} if (conf := os.environ.get("FUSION_CONF")) else {}
    return {"git": git_state(), "threads": torch.get_num_threads(), "folder": os.getcwd(), "environment": environment}


def git_state(project: Path = PROJECT) -> dict[str, Any] | None:
    """Return the commit of the checkout and whether it has uncommitted changes, or None outside a checkout."""
    output = _git(project, "rev-parse", "--show-toplevel", "HEAD")
    root, _, commit = (output or "").partition("\n")
    if not commit or Path(root).resolve() != project.resolve():
        return None
    changed = _git(project, "status", "--porcelain", "--", *CODE)
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(project: Path, *words: str) -> str | None:
    # Ignore variables that a git hook has set, and take no locks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        return subprocess.run(
            ["git", "-C", str(project), *words],
            env=environment | {"GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            errors="replace",
            timeout=GIT_SECONDS,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
