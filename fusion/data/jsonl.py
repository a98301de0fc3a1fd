"""JSON objects, one per line or in an array, read strictly."""

from __future__ import annotations

import json
from typing import Any

from fusion.data.files import read_text
from fusion.errors import UserError, first_line
from fusion.text import listed, repeated

_EXPECTED = 'expected one JSON object per line, or in .json an array of objects, such as {"text": ...}'


def read_json(path: object, content: bytes) -> tuple[list[dict[str, Any]], list[int] | None]:
    """As `read_jsonl`, or the objects of an array, without line numbers (errors name the row, from 1)."""
    text = read_text(path, content)
    if not text.lstrip().startswith("["):
        return read_jsonl(path, content)
    return [_checked(row, f"{path}, row {n}") for n, row in enumerate(_parse(text, str(path)), start=1)], None


def read_jsonl(path: object, content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a file, and their line numbers; empty lines are skipped.

    Raises:
        UserError: a line is not UTF-8, not JSON, not an object, or has a duplicate key; names the line.
    """
    records, lines = [], []
    for number, line in enumerate(read_text(path, content).split("\n"), start=1):
        if line.strip(" \t\r\v\f"):
            where = f"{path}, line {number}"
            records.append(_checked(_parse(line, where), where))
            lines.append(number)
    return records, lines


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: got {type(record).__name__}; {_EXPECTED}")
    return record


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # also a duplicate key, a number of thousands of digits
        reason = first_line(error)[:120].replace(": line 1 column", ", column")  # in .jsonl always line 1
        raise UserError(f"{where}: invalid JSON ({reason}); {_EXPECTED}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"duplicate key {listed(repeated(name for name, _ in pairs))}")
    return found
