"""JSON objects, one a line or in an array: read strictly, so that nothing is guessed of what could mean two things."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from fusion.errors import UserError


class _Twice(ValueError):
    """A key that stands twice in one object."""


def read_json(path: object, content: bytes) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The objects of a `.json` file: an array of them, or one a line as in `.jsonl`.

    Returns:
        The objects, and the numbers of their lines; None where they are the elements of an array.

    Raises:
        UserError: as `read_jsonl`; of an array, names the element as a row, from 1.
    """
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        return read_jsonl(path, content)
    records = _read(content, True, str(path), "expected an array of objects, or one object a line")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise UserError(
                f'{path}, row {number}: expected a JSON object such as {{"text": ...}}, got {type(record).__name__}'
            )
    return records, None


def read_jsonl(path: object, content: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects in a file, and the numbers of their lines; empty lines are passed over.

    Args:
        path: for messages.

    Raises:
        UserError: a line is not UTF-8, not JSON, not an object, or says a key twice; names the line.
    """
    records, lines = [], []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        record = _read(line, number == 1, f"{path}, line {number}", "expected one object a line")
        if not isinstance(record, dict):
            raise UserError(
                f'{path}, line {number}: expected a JSON object such as {{"text": ...}}, got {type(record).__name__}'
            )
        records.append(record)
        lines.append(number)
    return records, lines


def _read(text: bytes, at_start: bool, where: str, expected: str) -> Any:
    """
    Args:
        at_start: whether the file begins here, where a byte order mark may be.
    """
    try:
        return json.loads(
            text.decode("utf-8-sig" if at_start else "utf-8"), object_pairs_hook=_without_repetition
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason}); expected one JSON object") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not JSON ({error.msg}, {line}column {error.colno}); {expected}") from error
    except _Twice as error:
        raise UserError(f"{where}: the key {error} stands twice; expected each once") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply to be read; {expected}") from error
    except ValueError as error:  # Python reads no integer of thousands of digits
        raise UserError(f"{where}: a number has too many digits to be read; {expected}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        times = Counter(name for name, _ in pairs)
        raise _Twice(json.dumps(next(name for name in times if times[name] > 1))[:60])
    return found
