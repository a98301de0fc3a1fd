"""A task file before it is composed: plain YAML data that can do nothing and stays small.

Hydra would follow a `defaults` list or a `@package` line of it, and OmegaConf an interpolation, which reads the
environment; aliases can make gigabytes of a few lines. A task needs none of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fusion.errors import UserError, first_line

_LARGEST = 1_000_000  # bytes
_DEEPEST = 10
_EMPTY = "the file is empty"
_PACKAGE = re.compile(r"^\s*#\s*@", re.MULTILINE)
_HEADER = 512  # characters in which Hydra looks for it
_LARGE = 50_000  # bytes: smaller files are read by PyYAML's own parser, whose messages are better
# Integers of 300 digits or so, in each of YAML's notations: Python does not print those of more than 4300.
_TOO_LONG_A_NUMBER = re.compile(r"[-+]?(?:[0-9_:]{300,}|0x[0-9a-fA-F_]{250,}|0b[01_]{1000,})")
_DATA = "a task file is data: it holds names and values, and nothing that stands for something else"


class TaskLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Ten times as fast as the loader of OmegaConf, which gives the same values."""


def read_large(path: Path, resolvers: Mapping[str, Any]) -> Any:
    """The content of a checked file, by `TaskLoader`.

    Args:
        resolvers: which texts are numbers, booleans and null, as the loader of OmegaConf has them.
    """
    TaskLoader.yaml_implicit_resolvers = resolvers
    with path.open(encoding="utf-8") as file:
        loader = TaskLoader(file)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()


def check_task_file(path: Path) -> bool:
    """Refuse a task file that is no YAML mapping, or that is more than data.

    Returns:
        Whether it is large, and `TaskLoader` can read it.

    Raises:
        UserError: what is wrong, with the file and where there is one the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if len(content) > _LARGEST:
        raise UserError(
            f"{path}: {len(content) / 1e6:.1f} MB; expected a task file of at most {_LARGEST / 1e6:g} MB"
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error
    if _PACKAGE.search(text[:_HEADER]):
        raise UserError(f"{path}: a line with # @ moves what follows to another place\n{_DATA}")
    if len(content) > _LARGE:
        try:
            _check_events(path, text, TaskLoader)
            return True
        except yaml.YAMLError:  # said below, in the words of the other parser
            pass
    try:
        _check_events(path, text, yaml.SafeLoader)
        return False
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise UserError(f"{path}, line {line}: not YAML ({error.problem or error.context})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({first_line(error)})") from error


def _check_events(path: Path, text: str, loader: Any) -> None:
    """Go through the file's events, which nothing is built of."""
    inside: list[_Mapping | None] = []  # None: a list
    documents = 0
    for event in yaml.parse(text, Loader=loader):
        mark = event.start_mark
        where = f"{path}, line {mark.line + 1 if mark is not None else 1}"
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise UserError(f"{where}: a second document; expected one task a file")
        elif isinstance(event, yaml.CollectionEndEvent):
            inside.pop()
        elif isinstance(event, yaml.NodeEvent):
            if not inside and not isinstance(event, yaml.MappingStartEvent):
                nothing = isinstance(event, yaml.ScalarEvent) and not event.value
                found = _EMPTY if nothing else "no keys at the top"
                raise UserError(f"{path}: {found}; expected a task, such as kind: classification")
            _check_node(where, event)
            if inside and inside[-1] is not None:
                inside[-1].take(where, event, top=len(inside) == 1)
            if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                inside.append(_Mapping() if isinstance(event, yaml.MappingStartEvent) else None)
                if len(inside) > _DEEPEST:
                    raise UserError(f"{where}: nested more than {_DEEPEST} deep; {_DATA}")
    if not documents:
        raise UserError(f"{path}: {_EMPTY}; expected a task, such as kind: classification")


def _check_node(where: str, event: yaml.NodeEvent) -> None:
    if isinstance(event, yaml.AliasEvent):
        raise UserError(f"{where}: *{str(event.anchor)[:40]} stands for another part of the file\n{_DATA}")
    tag = getattr(event, "tag", None)
    if tag is not None:
        raise UserError(f"{where}: the tag {tag[:60]!r} asks for a value of another kind\n{_DATA}")
    if isinstance(event, yaml.ScalarEvent):
        if "${" in event.value:
            raise UserError(f"{where}: ${{...}} stands for a value from elsewhere\n{_DATA}")
        if event.value == "???":
            raise UserError(f"{where}: ??? stands for a value that is still missing")
        if not event.style and _TOO_LONG_A_NUMBER.fullmatch(event.value):
            raise UserError(f"{where}: a number of {len(event.value)} digits; {_DATA}")


class _Mapping:
    """The keys of one mapping as they come by, one after each value."""

    def __init__(self) -> None:
        self.key_is_next = True
        self.keys: set[str] = set()

    def take(self, where: str, event: yaml.NodeEvent, top: bool) -> None:
        """Raises UserError for a key that is no name, stands twice, or means something to Hydra or YAML."""
        self.key_is_next = not self.key_is_next
        if self.key_is_next:
            return
        if not isinstance(event, yaml.ScalarEvent) or not event.value:
            raise UserError(f"{where}: a key that is no name; {_DATA}")
        key = event.value
        if key in self.keys:
            raise UserError(f"{where}: the key {key[:60]!r} stands twice; expected each once")
        self.keys.add(key)
        if (top and key == "defaults") or key == "<<" or re.fullmatch(r"_\w+_", key):
            raise UserError(f"{where}: the key {key[:60]} would bring in what is not in the file\n{_DATA}")
