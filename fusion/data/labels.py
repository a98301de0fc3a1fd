"""Raw labels as class ids, values, or indices of the right choice."""

from __future__ import annotations

import json
import math
from typing import Any

from fusion.config import TaskConfig
from fusion.data.tables import Table, listed, shown
from fusion.errors import UserError

_LARGEST = 3.4028234e38  # of float32, in which a regression is computed


def is_ignored(value: Any, ignore: list[Any], unlabelled: bool) -> bool:
    """Whether a raw label says that there is none.

    Args:
        ignore: the task's `ignore_labels`.
        unlabelled: whether a missing value is one as well.
    """
    if _is_missing(value):
        return unlabelled or None in ignore
    return any(_key(value) == _key(entry) for entry in ignore)


def read_values(task: TaskConfig, table: Table, raw: list[Any], kept: list[int]) -> list[float]:
    """The labels of a regression.

    Raises:
        UserError: one of the rows `kept` has no finite number; names it.
    """
    for row in kept:
        value = raw[row]
        # Compared and not converted: an integer can be too large for a float. What is not finite fails too.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise UserError(
                f"{table.at(row)}: {task.label} is {shown(value)}; expected a finite number\n{_cure(value)}"
            )
    return [float(raw[row]) for row in kept]


def read_classes(task: TaskConfig, table: Table, raw: list[Any], kept: list[int]) -> list[int]:
    """Class ids, read in the first way in which all labels of the column can be read.

    The ways: as `label_values` (what the hub has), as the names in `labels`, as ids. One way serves the whole column:
    with one for each row, a stray 0 among "1" and "2" would pass for an id.

    Raises:
        UserError: a label of the rows `kept` is none of the task's; names the row.
    """
    names = task.labels or []
    ways = _raw_values(task)
    ways.append({(str, name): number for number, name in enumerate(names)})
    if not _are_integers(task.label_values):
        ways.append({_key(number): number for number in range(len(names))})
        ways.append({_key(bool(number)): number for number in range(min(2, len(names)))})
    values = task.label_values if task.label_values is not None else range(len(names))
    expected = "one of " + listed(
        f"{json.dumps(value)} ({name})" for value, name in zip(values, names, strict=True)
    )
    return _read(task, table, raw, kept, ways, expected)


def read_indices(
    task: TaskConfig, table: Table, raw: list[Any], kept: list[int], choices: list[list[str]]
) -> list[int]:
    """Indices of the right choices: raw labels are `label_values`, or the indices themselves.

    Raises:
        UserError: a label of the rows `kept` is none, or is beyond its row's choices; names the row.
    """
    most = max(len(options) for options in choices)
    ways = _raw_values(task)
    expected = f"the index of the right choice, 0 to {most - 1}"
    if task.label_values is not None:
        expected = f"one of {listed(json.dumps(value) for value in task.label_values)}, or {expected}"
    if not _are_integers(task.label_values):
        ways.append({_key(number): number for number in range(most)})
    indices = _read(task, table, raw, kept, ways, expected)
    for row, index, options in zip(kept, indices, choices, strict=True):
        if index >= len(options):
            raise UserError(
                f"{table.at(row)}: {task.label} is {shown(raw[row])}, the choice at {index}; "
                f"expected one of the {len(options)} choices, which count from 0\n{_cure(raw[row])}"
            )
    return indices


def _raw_values(task: TaskConfig) -> list[dict[tuple[type, Any], int]]:
    if task.label_values is None:
        return []
    ways = [{_key(value): number for number, value in enumerate(task.label_values)}]
    if all(isinstance(value, str) and value.isdecimal() for value in task.label_values):
        # "1" and "2" are numbers where a file does not say the types of its columns.
        ways.append({(int, int(value)): number for number, value in enumerate(task.label_values)})
    return ways


def _are_integers(values: list[Any] | None) -> bool:
    """Whether the raw labels are numbers of their own, so that a number can be nothing but one of them."""
    return values is not None and all(type(value) is int for value in values)


def _read(
    task: TaskConfig,
    table: Table,
    raw: list[Any],
    kept: list[int],
    ways: list[dict[tuple[type, Any], int]],
    expected: str,
) -> list[int]:
    keys = [_key(raw[row]) for row in kept]
    distinct = set(keys)
    for way in ways:
        if distinct <= way.keys():
            return [way[key] for key in keys]
    nearest = max(ways, key=lambda way: len(distinct & way.keys()))
    row = next(row for row, key in zip(kept, keys, strict=True) if key not in nearest)
    raise UserError(
        f"{table.at(row)}: {task.label} is {shown(raw[row])}; expected {expected}\n{_cure(raw[row])}"
    )


def _key(value: Any) -> tuple[type, Any]:
    """What tells raw labels apart: "1" from 1 from True, but not 1 from the 1.0 that a null beside it makes of it."""
    if isinstance(value, float) and value.is_integer():
        return int, int(value)
    return type(value), value if isinstance(value, (str, int, float)) else _written(value)


def _written(value: Any) -> str:
    try:
        return repr(value)
    except RecursionError:  # nested more deeply than anything that is meant for a label
        return "..."


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _cure(value: Any) -> str:
    if _is_missing(value):
        said = "null"
    elif isinstance(value, (str, int, float)) and len(text := json.dumps(value)) <= 60:
        said = text if isinstance(value, str) else str(value)
    else:
        said = "VALUE"  # too long to be typed, or none of a config
    return f"Rows without a label: 'task.ignore_labels=[{said}]'; other raw labels: label_values in the task file"
