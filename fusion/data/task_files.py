"""Task files: plain YAML, checked before Hydra composes them.

Hydra would follow a `defaults` list or a `@package` header, OmegaConf an interpolation (which can read the
environment), and aliases can expand a few lines to gigabytes. A task needs none of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusion.data.files import read_text
from fusion.errors import UserError, first_line

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 10
_HEADER = re.compile(r"\A(?s:.{0,512}?)^\s*#\s*@", re.MULTILINE)  # where Hydra searches for `# @package`
# Integers of about 300 digits or more: Python does not print those of more than 4300.
_LONG_NUMBER = re.compile(r"[-+]?(?:[0-9_:]{300,}|0x[0-9a-fA-F_]{250,}|0b[01_]{1000,})")
_SPECIAL_KEY = re.compile(r"<<|_\w+_|")  # YAML's merge key; Hydra's _target_, _partial_, ...; no name


class TaskLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Ten times as fast as OmegaConf's loader, with the same values."""


def read_task_file(path: Path, resolvers: Mapping[str, Any]) -> Any:
    """The content of a task file.

    Args:
        resolvers: OmegaConf's rules for which plain scalars are numbers, booleans and null.

    Raises:
        UserError: the file is not a YAML mapping of plain values; names the file and, if known, the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > _MAX_BYTES:
        raise UserError(f"{path}: {len(content) / 1e6:.1f} MB; expected a task file of at most 1 MB")
    text = read_text(path, content)
    if _HEADER.search(text):
        raise _not_plain(path, "a # @ header")
    TaskLoader.yaml_implicit_resolvers = resolvers
    try:
        _check_events(path, text)
        return TaskLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        reason = getattr(error, "problem", None) or first_line(error)
        raise UserError(f"{where}: invalid YAML ({reason})") from error


def _check_events(path: Path, text: str) -> None:
    """Check the parser's events, before any value is built."""
    keys: list[set[str] | None] = []  # of each open mapping; None: a list
    is_key: list[bool] = []  # whether the next node of each is a key
    documents = 0
    for event in yaml.parse(text, Loader=TaskLoader):
        mark = event.start_mark
        where = f"{path}, line {mark.line + 1 if mark is not None else 1}"
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _not_plain(where, "a second document")
        elif isinstance(event, yaml.CollectionEndEvent):
            keys.pop(), is_key.pop()
        elif isinstance(event, yaml.NodeEvent):
            if not keys and not isinstance(event, yaml.MappingStartEvent):
                raise UserError(f"{path}: no keys; expected a task, such as kind: classification")
            _check_node(where, event)
            if keys and (known := keys[-1]) is not None:
                if is_key[-1]:
                    _check_key(where, getattr(event, "value", ""), known, is_top=len(keys) == 1)
                is_key[-1] = not is_key[-1]
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                keys.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
                is_key.append(True)
                if len(keys) > _MAX_DEPTH:
                    raise _not_plain(where, f"more than {_MAX_DEPTH} levels of nesting")
    if not documents:
        raise UserError(f"{path}: the file is empty; expected a task, such as kind: classification")


def _check_node(where: str, event: yaml.NodeEvent) -> None:
    if isinstance(event, yaml.AliasEvent):
        raise _not_plain(where, f"the alias *{str(event.anchor)[:40]}")
    if (tag := getattr(event, "tag", None)) is not None:
        raise _not_plain(where, f"the tag {tag[:60]!r}")
    if isinstance(event, yaml.ScalarEvent):
        if "${" in event.value or event.value == "???":
            raise _not_plain(where, "an interpolation ${...} or a missing value ???")
        if not event.style and _LONG_NUMBER.fullmatch(event.value):
            raise _not_plain(where, f"a number of {len(event.value)} digits")


def _check_key(where: str, key: str, known: set[str], is_top: bool) -> None:
    if key in known:
        raise _not_plain(where, f"a duplicate of the key {key[:60]!r}")
    if (is_top and key == "defaults") or _SPECIAL_KEY.fullmatch(key):
        raise _not_plain(
            where, f"the key {key[:60]!r}, which is not a name or has a meaning to Hydra or YAML"
        )
    known.add(key)


def _not_plain(where: object, found: str) -> UserError:
    return UserError(f"{where}: found {found}; expected a task file of plain names and values, each key once")
