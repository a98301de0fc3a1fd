"""What a shell offers after a tab: Hydra's completion, for the programs that an installation puts on the PATH."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_packaging import project

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS: dict[str, str] = project()["scripts"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs, written as pip writes them."""
    folder = tmp_path_factory.mktemp("programs") / "bin"
    folder.mkdir()
    for name, entry in SCRIPTS.items():
        module, _, function = entry.partition(":")
        lines = (
            "#!/bin/sh",  # the interpreter's path may have blanks, which no first line may
            f'\'\'\'exec\' "{sys.executable}" "$0" "$@"',
            "' '''",
            "import sys",
            f"from {module} import {function}",
            f"sys.exit({function}())",
        )
        (folder / name).write_text("\n".join(lines) + "\n")
        (folder / name).chmod(0o755)
    return folder


def environment(path: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def offered(path: Path, line: str, cwd: Path) -> list[str]:
    done = subprocess.run(
        [str(path / line.split()[0]), "-sc", "query=bash"],
        env=environment(path) | {"COMP_LINE": line, "COMP_POINT": str(len(line))},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_program_is_installed() -> None:
    assert {"fusion-stage1", "fusion-stage2", "fusion-evaluate", "fusion-predict"} <= SCRIPTS.keys()
    for entry in SCRIPTS.values():
        module, _, function = entry.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_built_in_and_user_defined_tasks_are_completed(path: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "mine.yaml").write_text("kind: classification\n")
    found = offered(path, "fusion-stage1 +task=m", tmp_path)
    assert {"+task=mnli", "+task=mrpc", "+task=mine"} <= set(found)
    assert all(word.startswith("+task=m") for word in found)


def test_groups_and_keys_are_completed(path: Path, tmp_path: Path) -> None:
    assert offered(path, "fusion-stage2 debug=o", tmp_path) == ["debug=one_batch", "debug=overfit"]
    assert offered(path, "fusion-stage1 optim.l", tmp_path) == ["optim.lr="]
    assert offered(path, "fusion-stage2 composition=st", tmp_path) == ["composition=static"]


def test_a_shell_completes(path: Path, tmp_path: Path) -> None:
    """Bash itself, asked as it asks after a tab."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    script = (
        'eval "$(fusion-stage1 -sc install=bash)"\n'
        "complete -p fusion-stage1 >/dev/null || exit 3\n"
        "COMP_LINE='fusion-stage1 +task=mn' COMP_POINT=22 COMP_CWORD=1\n"
        "hydra_bash_completion\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        [bash, "--norc", "-c", script], env=environment(path), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "+task=mnli\n"), done.stderr


def test_a_program_is_the_same_as_its_module(path: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(path / "fusion-stage1"), "+task=nothing_like_it"],
        env=environment(path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "unknown task 'nothing_like_it'" in done.stderr
    assert list(tmp_path.iterdir()) == []
