"""The rival's own virtual environment: its versions do not fit beside ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipelines.benchmark.errors import BenchmarkError

# `accelerate` is what its trainer needs beyond its own requirements.
PACKAGES = ("adapters==1.3.0", "torch==2.13.0", "accelerate>=1.1,<2")
STAMP = ".installed"


def interpreter(venv: str | None, output: Path) -> Path:
    """The rival's python: of the folder that was named, or of one that is made once in `output`.

    Raises:
        BenchmarkError: the folder has no python, or pip failed.
    """
    folder = Path(venv).expanduser() if venv else output / "rival-venv"
    # Not resolved: the interpreter finds its packages by the link's own place.
    python = (folder / "bin" / "python").absolute()
    if venv:
        if not python.is_file():
            raise BenchmarkError(f"rival.venv={venv}: there is no {python}; expected a virtual environment")
        return python
    stamp = folder / STAMP
    if not (stamp.is_file() and stamp.read_text(encoding="utf-8").split("\n") == list(PACKAGES)):
        _make(folder, python, output / "rival-venv.log")
        stamp.write_text("\n".join(PACKAGES), encoding="utf-8")
    return python


def _make(folder: Path, python: Path, log: Path) -> None:
    print(f"Installing the rival ({', '.join(PACKAGES)}) into {folder}: a few minutes, once", flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", *PACKAGES]
    with log.open("w", encoding="utf-8") as file:
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], pip):
            code = subprocess.call(command, stdout=file, stderr=subprocess.STDOUT)
            if code != 0:
                raise BenchmarkError(
                    f"the rival could not be installed: pip ended with exit code {code} (log: {log}); "
                    "rival.venv=FOLDER takes an environment that has it"
                )
