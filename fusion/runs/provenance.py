"""Where an artifact came from, beyond its settings: the code, the packages, the threads, the folder.

None of it may fail or take long: what cannot be found out is null.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from fusion import __version__

# All that pyproject.toml asks for: any of them may change what a run computes or how it is read again.
PACKAGES = (
    "torch",
    "pytorch-lightning",
    "transformers",
    "tokenizers",
    "datasets",
    "hydra-core",
    "omegaconf",
    "wandb",
    "peft",
    "safetensors",
    "huggingface-hub",
    "filelock",
    "pyarrow",
    "numpy",
    "scipy",
    "PyYAML",
    "pydantic",
    "nervaluate",
    "jinja2",
    "matplotlib",
    "pillow",
    "rich",
)
PROJECT = Path(__file__).resolve().parents[2]
CODE = ("fusion", "conf")  # what of a checkout decides a run
GIT_SECONDS = 5.0
VARIABLES = ("FUSION_CONF",)  # of the environment, that a command's meaning depends on


def versions() -> dict[str, str | None]:
    """The versions of this project, of Python and of `PACKAGES`; null for one that is not installed."""
    return {"adapter-fusion": __version__, "python": platform.python_version()} | {
        package: _version(package) for package in PACKAGES
    }


def circumstances() -> dict[str, Any]:
    """What a manifest keeps of a run beside its config: git state, threads, folder and environment."""
    import torch

    return {
        "git": git_state(),
        "threads": torch.get_num_threads(),
        "folder": _folder(),
        "environment": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
    }


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return None


def git_state(project: Path = PROJECT) -> dict[str, Any] | None:
    """Commit of the project's checkout, and whether its code differs from it; null where there is no checkout.

    An installed package that lies somewhere inside another project's checkout is none of that checkout.
    """
    said = _git(project, "rev-parse", "--show-toplevel", "HEAD")
    if said is None or len(said.splitlines()) != 2:
        return None
    root, commit = said.splitlines()
    if Path(root).resolve() != project.resolve():
        return None
    changed = _git(project, "status", "--porcelain", "--", *CODE)
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(project: Path, *words: str) -> str | None:
    # Of this folder alone, whatever a hook or a shell has set; without locks, and without the user's own helpers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "-c", "core.fsmonitor=false", "-C", str(project), *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
