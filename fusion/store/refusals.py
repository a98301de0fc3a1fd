"""What is wrong with a value of a manifest, in one line that names its key."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError

from fusion.store.json_text import short

OBJECT, NULL = "an object", "null"
TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", dict: OBJECT, list: "a list"}
TYPE_NAMES |= {type(None): NULL, bool: "true or false"}
RANGES = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
INSIDE = ("settings",)  # parts of a model that are no objects of their own in the file


def mismatch(key: str, value: Any, expected: str) -> str:
    """What is said of a value of another type."""
    found = TYPE_NAMES.get(type(value), type(value).__name__)
    return f"{key} is {found}, expected {expected}" if key else f"expected {expected}, found {found}"


def reason(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of the problems that pydantic found in a value of `model`."""
    first = error.errors(include_url=False)[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    key = ""
    expected: Any = model
    for step in first["loc"]:
        if (inner := _inner(expected, step)) is None:
            break  # which member of a union was tried
        expected = inner
        if step not in INSIDE:
            key += f"[{step}]" if isinstance(step, int) else f".{step}" if key else str(step)
    last = str(first["loc"][-1]) if first["loc"] else ""
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}.{last} is unknown to this version".removeprefix(".")
    if last == "[key]":
        return f"{key} is unknown to this version"
    if kind == "missing":
        return f"key {key} is missing"
    if kind == "literal_error":
        return f"{key} is {_shown(value)}, expected one of {', '.join(map(str, get_args(expected)))}"
    if kind in RANGES:
        bound, words = RANGES[kind]
        return f"{key} is {_shown(value)}, expected {words} {context[bound]}"
    if kind == "too_short":
        return f"{key} is empty: expected at least {context['min_length']} entry"
    if kind == "value_error":
        return f"{key} is {_shown(value)}, {context['error']}"
    if _names(expected) and kind != "json_invalid":
        return mismatch(key, value, " or ".join(_names(expected)))
    return f"{key}: {first['msg']}".removeprefix(": ")


def _shown(value: Any) -> str:
    return short(value) if isinstance(value, str) else short(str(value)).strip("'")


def _inner(kind: Any, step: int | str) -> Any:
    """The annotation of what is inside; None: nothing is."""
    for one in _members(kind):
        if isinstance(one, type) and (issubclass(one, BaseModel) or is_dataclass(one)):
            return get_type_hints(one).get(str(step))
        if get_origin(one) in (dict, list):
            return get_args(one)[-1]
    return None


def _members(kind: Any) -> tuple[Any, ...]:
    """Of a union; of anything else itself."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _names(kind: Any) -> list[str]:
    plain = [get_origin(one) or one for one in _members(kind)]
    if plain == [Any]:
        return []
    return list(dict.fromkeys(TYPE_NAMES.get(one, OBJECT) for one in plain))
