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
_EXPECTED = "expected a task file of plain names and values, each key once, such as kind: classification"


class TaskLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Ten times as fast as OmegaConf's loader, with the same values; refuses keys that are not plain names."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen or _SPECIAL_KEY.fullmatch(name):
                raise _found(f"the key {name[:60]!r}: a duplicate, empty, or special in Hydra or YAML", key)
            seen.add(name)
        return super().construct_mapping(node, deep)


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
        raise UserError(f"{path}: found a # @ header; {_EXPECTED}")
    TaskLoader.yaml_implicit_resolvers = resolvers
    try:
        _check_events(text)
        task = TaskLoader(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        raise UserError(
            f"{where}: not plain YAML: {getattr(error, 'problem', None) or first_line(error)}; {_EXPECTED}"
        ) from error
    if not isinstance(task, dict) or "defaults" in task:
        found = "the key 'defaults'" if isinstance(task, dict) else "no keys"
        raise UserError(f"{path}: found {found}; {_EXPECTED}")
    return task


def _check_events(text: str) -> None:
    """Check the parser's events, before any value is built. Raises yaml.MarkedYAMLError."""
    depth = 0
    for event in yaml.parse(text, Loader=TaskLoader):
        value = getattr(event, "value", "")
        depth += isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise _found(f"the alias *{str(event.anchor)[:40]}", event)
        if (tag := getattr(event, "tag", None)) is not None:
            raise _found(f"the tag {tag[:60]!r}", event)
        if "${" in value or value == "???":
            raise _found("an interpolation ${...} or a missing value ???", event)
        if _LONG_NUMBER.fullmatch(value) and not getattr(event, "style", None):
            raise _found(f"a number of {len(value)} digits", event)
        if depth > _MAX_DEPTH:
            raise _found(f"more than {_MAX_DEPTH} levels of nesting", event)


def _found(what: str, place: Any) -> yaml.MarkedYAMLError:
    """The error for an event or a node."""
    return yaml.MarkedYAMLError(problem=f"found {what}", problem_mark=place.start_mark)
