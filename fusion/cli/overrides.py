"""The command line before Hydra reads it: flags in front, and text that is not read as a number."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, get_args

from fusion.cli.config_sources import keys_of, types_of
from fusion.text import OTHER_TYPE

LISTS_OF_NAMES = ("sources", "tasks", "runs")  # of type Any, since a word such as `all` may be their value
_ENTRY = re.compile(rf"(?<![^\[,])(\s*)({OTHER_TYPE.pattern})(?=\s*($|[,\]]))", re.IGNORECASE)


def text_keys(schema: type) -> set[str]:
    """The keys whose values are text, or lists of text."""
    found = {*LISTS_OF_NAMES} & {*keys_of(schema)}
    for key, kind in types_of(schema):
        inner = {kind, *get_args(kind)}
        if inner & {str, list[str]} and Any not in inner:
            found.add(key)
    return found


def as_text(word: str, keys: Collection[str]) -> str:
    """An override of one of `keys` in which what Hydra would read as a number or a boolean is quoted.

    `name=true` and `+task=1e3` mean the names that were typed, not True and 1000.0. Null stays null, except where
    it can only be a name: `+task=null`, `sources=[null]`.
    """
    match = re.fullmatch(r"(\+{0,2}([\w./-]+)=)(.*)", word)
    if match is None or match[2] not in keys or re.search("[({'\"]", match[3]):
        return word
    is_name = match[2] == "task" or (match[2] in LISTS_OF_NAMES and "[" in match[3])

    def quote(entry: re.Match[str]) -> str:
        return entry[0] if entry[2].lower() == "null" and not is_name else f"{entry[1]}'{entry[2]}'"

    return match[1] + _ENTRY.sub(quote, match[3])


def flags_first(words: Sequence[str]) -> list[str]:
    """The command line with -m in front: Hydra takes overrides only side by side."""
    flags = ("-m", "--multirun")
    return [word for word in words if word in flags] + [word for word in words if word not in flags]
