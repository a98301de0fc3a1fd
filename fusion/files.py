"""Atomic writes of files, and checks of paths from settings before anything is trained."""

from __future__ import annotations

import codecs
import contextlib
import functools
import glob
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.text import printable, shortened

COMPONENT_BYTES = 255  # the limit of every common file system
PARTIAL = ".partial"  # ending of a file that is being written
# Settings that are paths. `~` is replaced in the config itself for those in EXPANDED; the others are part of a run's
# identity as they were typed, and are expanded where they are read. REFERENCES are names or paths.
EXPANDED = ("store", "data.cache_dir", "input", "output", "trainer.default_root_dir", "runs")
KEPT, REFERENCES = ("data.dir",), ("backbone.name_or_path", "artifact")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. At the end of the block it replaces `path`; on an error it is removed.

    Readers see the old file or the new one, never a part of either. Multiple processes may write the same file.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, text as UTF-8."""
    with atomic_path(path) as part:
        part.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def finite(value: Any) -> Any:
    """A copy of a JSON value with None for each NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any) -> None:
    """`write_atomic` of indented JSON; values of other types are written as text."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file is missing or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_text(path: object, content: bytes) -> str:
    """UTF-8 text without its byte order mark; raises UserError with the line if it is not UTF-8."""
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from error


def remove_partial(path: Path) -> None:
    """Remove what killed writers of `path` left. Only for the holder of its lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)


def resolve_path(text: str, key: str) -> Path:
    """The path that a setting names, with `~` expanded. It need not exist, but it must be possible.

    Args:
        key: the setting, for the message: `store`, `data.dir`.

    Raises:
        UserError: the text is empty, cannot be a path, or goes through a dangling or looping link or through a file.
    """
    problem = "" if text.strip() else "is empty"
    if _is_long(text):
        problem = f"a part of it is longer than {COMPONENT_BYTES} bytes"
    path = Path(text)
    try:
        path = path.expanduser()
        path.stat()
    except FileNotFoundError:
        if dangling := [step for step in (path, *path.parents) if step.is_symlink() and not step.exists()]:
            problem = f"the target of the symbolic link {shortened(str(dangling[-1]))} does not exist"
    except OSError as error:
        problem = problem or str(error.strerror)
    except (RuntimeError, ValueError) as error:  # unknown user's home, NUL, text that no file name can hold
        problem = printable(str(error))
    if problem:
        raise UserError(f"{key}={shortened(text, 300)}: {problem}; expected a path, such as {key}=DIR")
    return path


def expand_paths(config: Any) -> None:
    """Check every path of a typed config, and expand `~` in those that name where to read and write.

    Raises:
        UserError: names the setting.
    """
    for key in (*EXPANDED, *KEPT, *REFERENCES):
        *groups, name = key.split(".")
        owner = functools.reduce(lambda owner, group: getattr(owner, group, None), groups, config)
        value = getattr(owner, name, None)
        texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        for text in texts:
            (check_reference if key in REFERENCES else resolve_path)(text, key)
        if key in EXPANDED and texts:
            expanded = [os.path.expanduser(text) for text in texts]
            setattr(owner, name, expanded if isinstance(value, list) else expanded[0])


def check_reference(reference: str, key: str) -> None:
    """Check a name or path, where it is a path.

    Raises:
        UserError: as `resolve_path`.
    """
    if not reference.strip() or "\0" in reference or reference[0] in "./~" or _is_long(reference):
        resolve_path(reference, key)


def check_relative(name: str) -> str | None:
    """Why `name`, taken from a file or a command line, could leave the folder it is looked up in; None: it cannot."""
    parts = re.split(r"[/\\]", name)
    if not name or "\0" in name or "" in parts or {".", ".."} & set(parts) or re.match(r"[A-Za-z]:", name):
        return "expected a name, or names joined by /, and no path out of its folder"
    if _is_long(name):
        return f"a part of it is longer than {COMPONENT_BYTES} bytes"
    return None


def _is_long(name: str) -> bool:
    return any(len(part.encode("utf-8", "surrogatepass")) > COMPONENT_BYTES for part in name.split("/"))
