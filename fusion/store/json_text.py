"""JSON in the narrow sense, as a manifest is written: read without trusting it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.text import repeated

LARGEST = 2**63 - 1  # of whole numbers: what a tensor can hold
DEEPEST = 32  # how far objects and lists stand inside each other


def read_json(text: str, path: Path) -> Any:
    """JSON in the narrow sense: each key once, finite numbers, text that UTF-8 can say, of a bounded depth.

    Raises:
        UserError: names `path` and what is wrong.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = repeated(key for key, _ in pairs)
            raise ValueError(f"key {short(twice[0])} stands twice")
        return values

    def constant(word: str) -> float:
        raise ValueError(f"{word} is no number")

    try:
        values = json.loads(
            text, object_pairs_hook=unique, parse_constant=constant, parse_int=_whole, parse_float=_finite
        )
        _check_depth(values)
        if "\\u" in text:  # only so can JSON that was UTF-8 hold a lone surrogate or a NUL
            _check_text(values)
    except RecursionError:
        reason = "objects inside each other without end"
    except ValueError as error:
        reason = str(error)
    else:
        return values
    raise UserError(f"{path}: is not JSON ({reason}); copy the artifact again, or train it again")


def _whole(digits: str) -> int:
    if abs(value := int(digits)) > LARGEST:
        raise ValueError("a whole number is too large")
    return value


def _finite(digits: str) -> float:
    if math.isinf(value := float(digits)):
        raise ValueError("a number is too large")
    return value


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError(f"objects stand more than {DEEPEST} deep inside each other")
    for inner in value.values() if type(value) is dict else value if type(value) is list else ():
        if type(inner) in (dict, list):
            _check_depth(inner, depth + 1)


def _check_text(value: Any) -> None:
    if isinstance(value, str) and re.search("[\ud800-\udfff\0]", value):
        raise ValueError(f"{short(value)} is no text")
    for inner in (
        (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        _check_text(inner)


def short(text: str, most: int = 60) -> str:
    """Text from a file as a message may show it: on one line, and not too long."""
    return ascii(text if len(text) <= most else text[:most] + "…")


def finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value
