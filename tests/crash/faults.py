"""Fault injection: a process kills itself with SIGKILL at a chosen fault point, like a power failure.

File operations are observed through `os.replace`, `os.fsync`, `shutil.rmtree` and `open`, training steps by wrapping
methods when their module is imported. Only the standard library is imported, since this module is imported first in
every process of a command.
"""

from __future__ import annotations

import atexit
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

VARIABLE = "FUSION_CRASH"  # environment variable with JSON: {"folder": output directory, "kill": Kill or null}
MAIN = "main"  # role of the main process; the role of the others is their rank
KILLED, BEGUN = "killed", "begun"  # files in the directory: the killed process; training has begun
NEW = "~new"  # suffix of an artifact that is being written, in STORE/.staging

READS = "a checkpoint is read"
BATCH = "a training batch"
Rename = Callable[[Path, Path], bool]


def _is_stored(old: Path, new: Path) -> bool:
    return old.parent.name == ".staging" and old.name == f"{new.name}{NEW}" and new.parent.name != ".replaced"


def _is_overwritten(old: Path, new: Path) -> bool:
    return _is_stored(old, new) and old.with_name(f"{new.name}.old").exists()


# Fault points before and after os.replace(old, new); the first match is used.
BEFORE_RENAME: dict[str, Rename] = {
    "before a checkpoint's renames": lambda old, new: new.name == "before.ckpt",
    "before the feature cache is put in place": lambda old, new: new.suffix == ".states",
    "half a file of the token cache": lambda old, new: new.suffix == ".safetensors",
    "staged and not in place": _is_stored,
    "a source is copied and not in place": lambda old, new: new.parent.name == ".replaced",
}
AFTER_RENAME: dict[str, Rename] = {
    "between a checkpoint's renames": lambda old, new: new.name == "before.ckpt",
    "a checkpoint is in place, its position not": lambda old, new: new.name == "last.ckpt",
    "after a checkpoint": lambda old, new: new.name == "position.json",
    "between an overwrite's renames": lambda old, new: new.parent.name == ".staging",
    "overwritten, the old one is still there": _is_overwritten,
}
# Fault points between writing and syncing a file, when it can be left partially written.
HALF_STAGED = {
    "weights.safetensors": "half the weights",
    "head.safetensors": "half the head",
    "manifest.json": "half the manifest",
}
# By module: class, method, and the fault points before and after a call.
METHODS: dict[str, list[tuple[str, str, str, str]]] = {
    "fusion.training.module": [
        ("TaskModule", "training_step", BATCH, ""),
        ("TaskModule", "validation_step", "a validation batch", ""),
        ("TaskModule", "on_validation_epoch_end", "", "after a validation"),
    ],
    "torch.optim.adamw": [("AdamW", "step", "before the optimizer's step", "after the optimizer's step")],
}


class Faults:
    """Count the visits of each fault point, and kill processes at one of them.

    Args:
        folder: directory with one file per process, named by process id, that contains its role.
        kill: a `Kill` as a dict. If `None`, visits are only counted.
        role: role of this process.
    """

    def __init__(self, folder: Path, kill: dict[str, Any] | None, role: str) -> None:
        self.folder, self.kill, self.role = folder, kill, role
        self.visits: Counter[str] = Counter()
        (folder / str(os.getpid())).write_text(role, encoding="utf-8")

    def reach(self, place: str, truncate: Callable[[float], None] | None = None) -> None:
        """Visit a fault point. Before a kill, `truncate` leaves a file partially written."""
        self.visits[place] += 1
        if place == BATCH:
            (self.folder / BEGUN).touch()
        kill = self.kill
        if kill is None or (kill["place"], kill["count"]) != (place, self.visits[place]):
            return
        if truncate is not None and kill["target"] in (
            "all",
            self.role,
        ):  # otherwise this process survives and finishes the file
            truncate(kill["share"])
        kill_processes(self.folder, kill["target"])

    def write_visits(self) -> None:
        (self.folder / f"visits-{self.role}.json").write_text(json.dumps(self.visits), encoding="utf-8")


def processes_of(folder: Path) -> dict[int, str]:
    """Return the ids of all processes of an attempt, also exited ones, with their roles."""
    return {int(file.name): file.read_text(encoding="utf-8") for file in folder.glob("[0-9]*")}


def kill_processes(folder: Path, target: str) -> None:
    """Kill the processes of a role, or all: the main process first, this process last."""
    (folder / KILLED).write_text(target, encoding="utf-8")
    chosen = [(pid, role) for pid, role in processes_of(folder).items() if target in ("all", role)]
    for pid, _ in sorted(chosen, key=lambda process: (process[0] == os.getpid(), process[1] != MAIN)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def install() -> None:
    """Install fault injection in this process if VARIABLE is set."""
    if VARIABLE not in os.environ:
        return
    plan = json.loads(os.environ[VARIABLE])
    faults = Faults(Path(plan["folder"]), plan["kill"], os.environ.get("LOCAL_RANK", MAIN))
    watch_files(faults)
    for name in METHODS:
        if name in sys.modules:  # in a process forked after the import
            _watch_methods(faults, sys.modules[name])
    sys.meta_path.insert(0, _AfterImport(faults, METHODS.keys() - sys.modules.keys()))
    atexit.register(faults.write_visits)


def watch_files(faults: Faults) -> None:
    replace, fsync, rmtree = os.replace, os.fsync, shutil.rmtree

    @functools.wraps(replace)
    def watched_replace(source: Any, target: Any, **options: Any) -> None:
        old, new = Path(os.fsdecode(source)), Path(os.fsdecode(target))
        if place := _first(BEFORE_RENAME, old, new):
            faults.reach(place, functools.partial(_truncate, old) if place.startswith("half") else None)
        replace(source, target, **options)
        if place := _first(AFTER_RENAME, old, new):
            faults.reach(place)

    @functools.wraps(fsync)
    def watched_fsync(file: Any) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
        if place := _place_of_write(path):
            faults.reach(place, functools.partial(_truncate, path))
        if _is_checkpoint(path):
            faults.reach("a checkpoint is written and not synced")
        fsync(file)
        if _is_staged(path) and path.name == "head.safetensors":
            faults.reach("before the manifest is written")

    @functools.wraps(rmtree)
    def watched_rmtree(path: Any, *arguments: Any, **options: Any) -> None:
        folder = Path(os.fsdecode(path))
        if folder.parent.name == ".runs" and any(folder.glob("*.ckpt")):
            faults.reach("stored, the checkpoints are still there")
            faults.reach("the checkpoints are half removed", functools.partial(_remove_some, folder))
        rmtree(path, *arguments, **options)

    def watch_open(event: str, arguments: tuple[Any, ...]) -> None:
        checkpoint = event == "open" and str(arguments[0]).endswith("last.ckpt")
        if checkpoint and arguments[2] & os.O_ACCMODE == os.O_RDONLY:
            faults.reach(READS)

    os.replace = watched_replace  # type: ignore[assignment]
    os.fsync, shutil.rmtree = watched_fsync, watched_rmtree  # type: ignore[assignment]
    if faults.kill is not None and faults.kill["place"] == READS:
        sys.addaudithook(watch_open)


def _first(places: dict[str, Rename], old: Path, new: Path) -> str | None:
    return next((place for place, fits in places.items() if fits(old, new)), None)


def _place_of_write(path: Path) -> str | None:
    if _is_checkpoint(path):
        return "half a checkpoint"
    if path.suffix == ".partial" and ".states." in path.name:
        return "half a file of the feature cache"
    return HALF_STAGED.get(path.name) if _is_staged(path) else None


def _is_checkpoint(path: Path) -> bool:
    """Return whether a file is a checkpoint that is being written."""
    return path.name.startswith(".last.ckpt.") and path.suffix == ".partial"


def _is_staged(path: Path) -> bool:
    """Return whether a file belongs to the artifact that is being written, not to a copy of a source."""
    folder = path.parent
    return folder.parent.name == ".staging" and bool(re.search(f"(?<!-[0-9a-f]{{8}}){NEW}$", folder.name))


def _truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def _remove_some(folder: Path, share: float) -> None:
    files = sorted(folder.iterdir())
    for file in files[: max(1, int(len(files) * share))]:
        file.unlink()


def _watch_methods(faults: Faults, module: ModuleType) -> None:
    for owner, name, before, after in METHODS[module.__name__]:
        method = getattr(getattr(module, owner), name)

        @functools.wraps(method)
        def watched(
            *arguments: Any, _method: Any = method, _before: str = before, _after: str = after, **options: Any
        ) -> Any:
            if _before:
                faults.reach(_before)
            result = _method(*arguments, **options)
            if _after:
                faults.reach(_after)
            return result

        setattr(getattr(module, owner), name, watched)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Wrap the methods of a module when it is imported."""

    def __init__(self, faults: Faults, modules: set[str]) -> None:
        self._faults, self._modules = faults, modules

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self._modules:
            return None
        self._modules.remove(name)
        spec = importlib.util.find_spec(name)  # found by the other finders
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_watch(module: ModuleType) -> None:
            execute(module)
            _watch_methods(self._faults, module)

        spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec
