"""Fixtures: a small version of a real backbone, created in a temporary folder, and the commands on it.

What takes seconds to import is imported by what needs it: pytest-xdist's controller reads this file as well.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.bench import Bench

os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # refuses at once: no test asks the hub itself
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored


def pytest_collection_finish() -> None:
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import pytorch_lightning  # noqa: F401

    gc.freeze()  # what is imported by now stays, and is not traversed after each job of a sweep


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 3 layers and hidden size 32."""
    from tests.tiny_backbone import save_backbone

    return save_backbone(tmp_path_factory.mktemp("backbones") / "tiny bert")


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A program to start in place of `sys.executable`, with heavy imports preloaded: see tests/fork_server.py."""
    from tests.fork_server import warm_python

    with warm_python() as program:
        yield program


@pytest.fixture
def warm(warm_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that a test starts with `sys.executable` have done their imports, and so have their ranks."""
    monkeypatch.setattr(sys, "executable", warm_python)


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run a command in this process: `in_process(main, *words)` gives exit code, stdout and stderr."""
    for variable in ("FUSION_CONF", "FUSION_DATA_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it; this restores it
    root = logging.getLogger()
    before, level, handler = root.handlers[:], root.level, signal.getsignal(signal.SIGTERM)

    def run(main: Callable[[], None], *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    yield run
    root.handlers[:], root.level = before, level
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def make_backbone(tmp_path: Path) -> Callable[..., Path]:
    """`make_backbone("roberta", hidden_size=48, seed=1)` gives the folder of another one."""
    from tests.tiny_backbone import save_backbone

    return lambda model_type="bert", **options: save_backbone(tmp_path / f"{model_type}", model_type, **options)


@pytest.fixture
def bench(tmp_path: Path, tiny_backbone: Path) -> Bench:
    """The commands on a tiny backbone and tiny tasks."""
    from tests.bench import Bench

    return Bench(tmp_path / "a folder", tiny_backbone)
