"""Paths from settings and names from files, checked in one way before anything is trained."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.text import printable, shortened

COMPONENT_BYTES = 255  # the limit of every common file system
# Settings that are paths. Of those in EXPANDED `~` is replaced in the config itself; the others are part of a run's
# identity as they were typed, and are expanded where they are read.
EXPANDED = ("store", "data.cache_dir", "input", "output", "trainer.default_root_dir")
KEPT = ("data.dir",)


def resolve_path(text: str, key: str) -> Path:
    """The path that a setting names, with `~` expanded. It need not exist, but it must be possible.

    Args:
        key: the setting, for the message: `store`, `data.dir`.

    Raises:
        UserError: the text is empty or blank, has a NUL or a component of more than 255 bytes, names the home of an
            unknown user, or goes through a dangling or looping symbolic link, or through a file.
    """
    if not text.strip():
        raise UserError(f"{key}= is empty: expected a path, such as {key}=DIR")
    said = f"{key}={shortened(text, 300)}"
    if "\0" in text:
        raise UserError(f"{said}: a path has no NUL character")
    try:
        path = Path(text).expanduser()
        parts = [os.fsencode(part) for part in path.parts]
    except RuntimeError:
        raise UserError(
            f"{said}: there is no such user's home folder; write ./~… for a name with ~"
        ) from None
    except UnicodeEncodeError:
        raise UserError(f"{said}: this text cannot be a file name on this system") from None
    if long := [part for part in parts if len(part) > COMPONENT_BYTES]:
        raise UserError(
            f"{said}: one of its components has {len(long[0]):,} bytes; a file name has at most {COMPONENT_BYTES}"
        )
    for step in [*reversed(path.parents), path]:
        if why := _problem(step, last=step == path):
            raise UserError(f"{said}: {why}; {key}=DIR names another")
    return path


def _problem(step: Path, last: bool) -> str | None:
    """Why a path cannot go through `step`; None: it can."""
    shown = shortened(str(step), 300)
    try:
        os.stat(step)
    except FileNotFoundError:
        if step.is_symlink():
            return f"{shown} is a symbolic link to {printable(os.readlink(step))}, which does not exist"
        return None
    except NotADirectoryError:
        return None  # named by the step before
    except OSError as error:
        if error.errno == errno.ELOOP:
            return f"{shown} is a symbolic link that leads to itself"
        return f"{shown}: {error.strerror}"
    return None if last or step.is_dir() else f"{shown} is a file, expected a folder"


def expand_paths(config: Any) -> None:
    """Check every path of a typed config, and expand `~` in those that say where to read and write.

    Raises:
        UserError: names the setting.
    """
    for key in (*EXPANDED, *KEPT):
        *groups, name = key.split(".")
        owner = config
        for group in groups:
            owner = getattr(owner, group, None)
        value = getattr(owner, name, None)
        if isinstance(value, str):
            path = resolve_path(value, key)
            if key in EXPANDED and value.startswith("~"):
                setattr(owner, name, str(path))
    runs = getattr(config, "runs", None)
    if isinstance(runs, str):
        config.runs = str(resolve_path(runs, "runs")) if runs.startswith("~") else _checked(runs, "runs")
    elif isinstance(runs, list):
        config.runs = [
            str(resolve_path(run, "runs")) if run.startswith("~") else _checked(run, "runs") for run in runs
        ]
    backbone = getattr(config, "backbone", None)
    name_or_path = getattr(backbone, "name_or_path", None) if is_dataclass(backbone) else None
    for key, reference in (
        ("backbone.name_or_path", name_or_path),
        ("artifact", getattr(config, "artifact", None)),
    ):
        if isinstance(reference, str):
            check_reference(reference, key)


def check_reference(reference: str, key: str) -> None:
    """Check what is a name or a path, where it is a path.

    Raises:
        UserError: as `resolve_path`.
    """
    if (
        not reference.strip()
        or "\0" in reference
        or reference.startswith((".", "/", "~"))
        or _is_long(reference)
    ):
        resolve_path(reference, key)


def check_relative(name: str) -> str | None:
    """Why `name`, taken from a file or a command line, could leave the folder it is looked for in; None: it cannot."""
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name or "" in parts or {".", ".."} & set(parts) or re.match(r"[A-Za-z]:", name):
        return "expected a name, or names joined by /, and no path out of its folder"
    if _is_long(name):
        return f"a part of it is longer than {COMPONENT_BYTES} bytes"
    return None


def _is_long(name: str) -> bool:
    return any(len(part.encode("utf-8", "surrogatepass")) > COMPONENT_BYTES for part in name.split("/"))


def _checked(text: str, key: str) -> str:
    resolve_path(text, key)
    return text
