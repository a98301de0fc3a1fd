"""Settings as a manifest holds them, checked against the schema that they came from.

Hydra checks types where a command is typed; a manifest is read from a disk, where anything may stand.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fusion.errors import UserError

Settings = TypeVar("Settings")

TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}
TYPE_NAMES |= {type(None): "null", bool: "true or false"}

_types = functools.cache(get_type_hints)


def type_name(value: Any) -> str:
    return TYPE_NAMES.get(type(value), type(value).__name__)


def check_types(schema: type, values: Mapping[str, Any], where: str) -> None:
    """Refuses keys that the schema does not have and values of another type. A key may be missing.

    Raises:
        UserError: begins with `where`, and names the key.
    """
    known = _types(schema)
    unknown = sorted(key for key in values if key not in known)
    if unknown:
        raise UserError(f"{where}.{unknown[0]} is unknown to this version")
    for key, value in values.items():
        _check(known[key], value, f"{where}.{key}")


def settings_of(schema: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """The schema's object, its ranges checked too.

    Raises:
        UserError: begins with `where`, and says what this version does not read.
    """
    check_types(schema, values, where)
    try:
        return schema(**values)
    except (TypeError, ValueError, UserError) as error:
        raise UserError(f"{where} is none of this version ({error})") from error


def _check(expected: Any, value: Any, key: str) -> None:
    if expected is Any:
        return
    kinds = get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)
    for kind in kinds:
        if kind is Any or _is(kind, value):
            break
    else:
        names = dict.fromkeys(TYPE_NAMES[_plain(kind)] for kind in kinds)
        raise UserError(f"{key} is {type_name(value)}, expected {' or '.join(names)}")
    if is_dataclass(kind):
        check_types(kind, value, key)  # type: ignore[arg-type]
    elif get_origin(kind) is list:
        for position, entry in enumerate(value):
            _check(get_args(kind)[0], entry, f"{key}[{position}]")
    elif get_origin(kind) is dict:
        for name, entry in value.items():
            _check(get_args(kind)[1], entry, f"{key}.{name}")


def _is(kind: Any, value: Any) -> bool:
    plain = _plain(kind)
    return type(value) in ((int, float) if plain is float else (plain,))  # exactly: true is no whole number


def _plain(kind: Any) -> type:
    return dict if is_dataclass(kind) else get_origin(kind) or kind
