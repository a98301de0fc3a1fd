"""One JSON object a line: read strictly, so that nothing is guessed of a line that could mean two things."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from fusion.errors import UserError


class _Twice(ValueError):
    """A key that stands twice in one object."""


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects in a file, and the numbers of their lines; empty lines are passed over.

    Raises:
        UserError: a line is not UTF-8, not JSON, not an object, or says a key twice; names the line.
        OSError: the file cannot be read.
    """
    records, lines = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        record = _read_line(line, number, f"{path}, line {number}")
        if not isinstance(record, dict):
            raise UserError(
                f'{path}, line {number}: expected a JSON object such as {{"text": ...}}, got {type(record).__name__}'
            )
        records.append(record)
        lines.append(number)
    return records, lines


def _read_line(line: bytes, number: int, where: str) -> Any:
    expected = "expected one object a line"
    try:
        return json.loads(
            line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_without_repetition
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason}); expected one JSON object") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); {expected}") from error
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
