"""Inside a victim: it dies at the place that its plan names, by its own SIGKILL, as if the power went there.

The project has no hooks for this. Files are watched by way of `os.replace`, `os.fsync`, `shutil.rmtree` and `open`;
steps by wrapping four methods once their module is imported. Only the standard library is imported here, since this
runs before anything else, in every process of a victim.
"""

from __future__ import annotations

import atexit
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

PLAN = "FUSION_CHAOS"  # environment: a folder for what the processes say of themselves, and the kill, as JSON
MAIN = "main"  # the process that the command started; the others are called by their rank
STRUCK, BEGAN = "struck", "began"
COUNTS = "counts-"
NEW = "~new"  # ending of an artifact that is being written, in STORE/.staging

READS = "a checkpoint is read"
BATCH = "a training batch"
OVERWRITE_RENAMES = "between an overwrite's renames"


class Fate:
    """Counts how often each place is reached, and strikes at one of them.

    Args:
        folder: each process leaves a file there, named by its id, with its role.
        kill: {place, count, share, at, whom}: at which visit of which process (a role, or "any") which processes die
            (roles, and "all"); `share` of a half-written file is there. None: places are only counted.
        role: of this process.
    """

    def __init__(self, folder: Path, kill: dict[str, Any] | None, role: str) -> None:
        self.folder, self.kill, self.role = folder, kill, role
        self.counts: Counter[str] = Counter()
        (folder / str(os.getpid())).write_text(role, encoding="utf-8")

    def reach(self, place: str, wound: Callable[[float], None] | None = None) -> None:
        """Says that this process is at a place. `wound` does first what a death in mid-write would have done."""
        self.counts[place] += 1
        if place == BATCH and self.counts[place] == 1:
            (self.folder / BEGAN).touch()
        kill = self.kill
        if kill is None or kill["place"] != place or self.counts[place] != kill["count"]:
            return
        if kill["at"] not in ("any", self.role):
            return
        if wound is not None and kill["whom"] in ("all", self.role):  # else it lives, and writes the rest
            wound(kill["share"])
        (self.folder / STRUCK).write_text(kill["whom"], encoding="utf-8")
        strike(self.folder, kill["whom"])

    def write_counts(self) -> None:
        (self.folder / f"{COUNTS}{self.role}.json").write_text(json.dumps(self.counts), encoding="utf-8")


def members(folder: Path) -> dict[int, str]:
    """The processes of an attempt, with their roles."""
    return {int(file.name): file.read_text(encoding="utf-8") for file in folder.glob("[0-9]*")}


def strike(folder: Path, whom: str) -> None:
    """Kills the processes of a role, or all; the one that starts the others first, this one last."""
    chosen = [(pid, role) for pid, role in members(folder).items() if whom in ("all", role)]
    for pid, _ in sorted(chosen, key=lambda member: (member[0] == os.getpid(), member[1] != MAIN)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def install() -> Fate | None:
    """Does what the environment asks for; nothing without it."""
    plan = os.environ.get(PLAN)
    if plan is None:
        return None
    said = json.loads(plan)
    fate = Fate(Path(said["folder"]), said["kill"], os.environ.get("LOCAL_RANK", MAIN))
    _watch_files(fate)
    _watch_steps(fate)
    atexit.register(fate.write_counts)
    return fate


# --- files ----------------------------------------------------------------------------------------


def _watch_files(fate: Fate) -> None:
    replace, fsync, rmtree = os.replace, os.fsync, shutil.rmtree

    @functools.wraps(replace)
    def watched_replace(source: Any, target: Any, **more: Any) -> None:
        old, new = _path(source), _path(target)
        _before_rename(fate, old, new)
        replace(source, target, **more)
        _after_rename(fate, old, new)

    @functools.wraps(fsync)
    def watched_fsync(file: Any) -> None:
        path = _path_of_descriptor(file)
        place = _place_of_write(path)
        if place is not None:
            fate.reach(place, lambda share: os.ftruncate(file, int(os.fstat(file).st_size * share)))
        if path.name == ".last.ckpt.part":
            fate.reach("a checkpoint is written and not synced")
        fsync(file)
        if _is_staged(path) and path.name == "head.safetensors":
            fate.reach("before the manifest is written")

    @functools.wraps(rmtree)
    def watched_rmtree(path: Any, *rest: Any, **more: Any) -> None:
        folder = _path(path)
        if folder.parent.name == ".runs" and any(folder.glob("*.ckpt")):
            fate.reach("stored, the checkpoints are still there")
            fate.reach("the checkpoints are half removed", lambda share: _remove_some(folder, share))
        rmtree(path, *rest, **more)

    def watch_open(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith("last.ckpt"):
            reading = arguments[2] & os.O_ACCMODE == os.O_RDONLY
            if reading:
                fate.reach(READS)

    os.replace = watched_replace  # type: ignore[assignment]
    os.fsync, shutil.rmtree = watched_fsync, watched_rmtree  # type: ignore[assignment]
    if fate.kill is None or fate.kill["place"] == READS:
        sys.addaudithook(watch_open)


def _place_of_write(path: Path) -> str | None:
    """The place of a file that is about to be synced, which is when it can be left half-written."""
    if path.name == ".last.ckpt.part":
        return "half a checkpoint"
    if path.suffix == ".partial" and ".states." in path.name:
        return "half a file of the prefix cache"
    if _is_staged(path):
        return {
            "weights.safetensors": "half the weights",
            "head.safetensors": "half the head",
            "manifest.json": "half the manifest",
        }.get(path.name)
    return None


def _is_staged(path: Path) -> bool:
    """Whether it is a file of the artifact that is made, and not of the copy of a source."""
    return path.parent.parent.name == ".staging" and path.parent.name.endswith(NEW)


def _before_rename(fate: Fate, old: Path, new: Path) -> None:
    if new.name == "before.ckpt":
        fate.reach("before a checkpoint's renames")
    elif new.suffix == ".states":
        fate.reach("before the prefix cache is put in place")
    elif old.suffix == ".partial":
        fate.reach("half a file of the token cache", lambda share: _cut(old, share))
    elif old.parent.name == ".staging" and old.name == f"{new.name}{NEW}":
        fate.reach("staged and not in place")
    elif new.parent.name == ".replaced":
        fate.reach("a source is copied and not in place")


def _after_rename(fate: Fate, old: Path, new: Path) -> None:
    if new.name == "before.ckpt":
        fate.reach("between a checkpoint's renames")
    elif new.name == "last.ckpt":
        fate.reach("a checkpoint is in place, its position not")
    elif new.name == "position.json":
        fate.reach("after a checkpoint")
    elif new.parent.name == ".staging":
        fate.reach(OVERWRITE_RENAMES)
    elif old.parent.name == ".staging" and old.name == f"{new.name}{NEW}" and _old_of(old).exists():
        fate.reach("overwritten, the old one is still there")


def _old_of(staged: Path) -> Path:
    return staged.with_name(f"{staged.name.removesuffix(NEW)}.old")


def _cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def _remove_some(folder: Path, share: float) -> None:
    files = sorted(folder.iterdir())
    for file in files[: max(1, int(len(files) * share))]:
        file.unlink()


def _path(said: Any) -> Path:
    return Path(os.fsdecode(said)) if isinstance(said, str | bytes | os.PathLike) else Path()


def _path_of_descriptor(file: Any) -> Path:
    number = file if isinstance(file, int) else file.fileno()
    try:
        return Path(os.readlink(f"/proc/self/fd/{number}"))
    except OSError:  # no such system: no write is found there
        return Path()


# --- steps ----------------------------------------------------------------------------------------


def _watch_steps(fate: Fate) -> None:
    def module(loaded: ModuleType) -> None:
        _wrap(fate, loaded.TaskModule, "training_step", before=BATCH)
        _wrap(fate, loaded.TaskModule, "validation_step", before="a validation batch")
        _wrap(fate, loaded.TaskModule, "on_validation_epoch_end", after="after a validation")

    def optimizer(loaded: ModuleType) -> None:
        step = "the optimizer's step"
        _wrap(fate, loaded.AdamW, "step", before=f"before {step}", after=f"after {step}")

    wanted: dict[str, Callable[[ModuleType], None]] = {
        "fusion.training.module": module,
        "torch.optim.adamw": optimizer,
    }
    for name, watch in list(wanted.items()):
        if name in sys.modules:  # a victim that was forked from one that had them
            watch(sys.modules[name])
            del wanted[name]
    if wanted:
        sys.meta_path.insert(0, _AfterImport(wanted))


def _wrap(fate: Fate, owner: Any, name: str, before: str | None = None, after: str | None = None) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def watched(*arguments: Any, **more: Any) -> Any:
        if before is not None:
            fate.reach(before)
        result = method(*arguments, **more)
        if after is not None:
            fate.reach(after)
        return result

    setattr(owner, name, watched)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as it was imported."""

    def __init__(self, wanted: dict[str, Callable[[ModuleType], None]]) -> None:
        self._wanted = wanted

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        watch = self._wanted.pop(name, None)
        if watch is None:
            return None
        spec = importlib.util.find_spec(name)  # by the others: this one knows the name no longer
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_watch(module: ModuleType) -> None:
            execute(module)
            watch(module)

        spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec
