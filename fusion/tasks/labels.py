"""Raw labels as class ids, values, or indices of the right choice.

What a raw label means is a function of the task file and of that label alone. It depends neither on the other labels
of the column nor on the format of the file, so it is the same in every split: a raw label means the label whose
`label_values` it equals, else the label whose name it equals. Numbers are ids (and booleans the ids 0 and 1) only
where neither names nor `label_values` are numbers (booleans). The other labels of a column can only lead to a refusal.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fusion.errors import UserError
from fusion.tasks.columns import Column, Table
from fusion.tasks.task import Task
from fusion.text import listed, shown

_LARGEST = 3.4028234e38  # of float32, in which a regression is computed
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NUMBER_LENGTH = 400  # characters; no float64 needs more
_NOT_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE)
_BOOLEANS = {text: text.lower() == "true" for text in ("true", "True", "TRUE", "false", "False", "FALSE")}

# ClassLabel names of hub data sets whose labels the shipped task file calls otherwise, by the names in `labels`. Not
# as `label_values` in these files: the tasks in manifests of version 0.1 have none.
_HUB_NAMES = {
    ("negative", "positive"): ("neg", "pos"),
    ("world", "sports", "business", "sci_tech"): ("World", "Sports", "Business", "Sci/Tech"),
    ("abbreviation", "entity", "description", "human", "location", "number"): (
        *("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"),
    ),
}

Key = tuple[str, Any]
_MISSING: Key = ("missing", None)


@dataclass(frozen=True)
class Reading:
    """How the labels of one split can be read.

    Attributes:
        ways: the ways in which all of them can be read, in order of precedence; they agree on what each label means.
        ids: the distinct class ids or indices.
        count: how many classes or choices there are.
        where: the file or data set, for messages.
    """

    ways: tuple[str, ...]
    ids: frozenset[int]
    count: int
    where: str


def label_key(value: Any) -> Key:
    """What tells raw labels apart: 1, "1" and 1.0 are one label, so are true and "true", and null and ""."""
    if isinstance(value, str):
        return _text_key(value) if value else _MISSING
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return _MISSING
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, float) and value.is_integer():
        return "number", int(value)
    if isinstance(value, (int, float)):
        return "number", value
    return type(value).__name__, _written(value)


def _text_key(text: str) -> Key:
    stripped = text.strip()
    if stripped in _BOOLEANS:
        return "boolean", _BOOLEANS[stripped]
    number = _number(stripped)
    if number is None or math.isinf(number):
        return "text", text
    return "number", int(number) if number == int(number) else number


def _number(text: str) -> int | float | None:
    if len(text) > _NUMBER_LENGTH or not _NUMBER.fullmatch(text):
        return None
    return int(text) if text.lstrip("+-").isdecimal() else float(text)


class Labels:
    """The labels of a task, and every way to write them.

    Raises:
        UserError: two labels have raw values that are one value, such as 1 and "1".
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.names: list[str] = task.labels or []
        self._columns: list[str] = task.choices if isinstance(task.choices, list) else []
        values = [(value, number) for number, entry in enumerate(task.raw_label_values) for value in entry]
        names = [(name, number) for number, name in enumerate(self.names)]
        # Texts that differ and are one number or boolean, such as "01" and "1", are told apart by their spelling.
        self._spelled = {*_same_key(names), *_same_key(values)}
        self._by_value = {self.key(value): number for value, number in values}
        by_name = {self.key(name): number for name, number in names}
        # A name that is also the raw value of another label can only mean the latter.
        self._by_name = {
            k: number for k, number in by_name.items() if self._by_value.get(k, number) == number
        }
        self._known = [(label_key(value), number) for value, number in [*values, *names]]
        self._named = {*self._by_value, *by_name, *(key for key, _ in self._known)}
        self._ignore = {self.key(entry) for entry in task.ignore_labels}

    def key(self, value: Any) -> Key:
        """As `label_key`, but by its spelling where two of the task's labels differ by that alone."""
        return ("spelled", value) if isinstance(value, str) and value in self._spelled else label_key(value)

    def keys(self, column: Column) -> list[Key]:
        """The keys of a column; an id of a ClassLabel column stands for the name that it has there."""
        if column.names is None:
            known: dict[tuple[type, Any], Key] = {}  # a file has few labels, each many times
            return [self._typed_key(value, column.typed, known) for value in column.values]
        of_name = [self._class_key(name) for name in _own_names(self.names, column.names)]
        return [
            of_name[value] if type(value) is int and 0 <= value < len(of_name) else self.key(value)
            for value in column.values
        ]

    def _typed_key(self, value: Any, typed: bool, known: dict[tuple[type, Any], Key]) -> Key:
        """Text is no id in a file that could have held a number, such as JSON."""
        if not isinstance(value, (str, int)):
            return self.key(value)
        if (key := known.get((type(value), value))) is None:
            key = self.key(value)
            if typed and isinstance(value, str) and key not in self._named and key not in self._ignore:
                key = "text", value
            known[type(value), value] = key
        return key

    def _class_key(self, name: str) -> Key:
        return ("column", self._columns.index(name)) if name in self._columns else self.key(name)

    def ways(self, choices: int | None = None) -> dict[str, dict[Key, int]]:
        """Each way to write a label, by keys, in order of precedence.

        Args:
            choices: choice tasks: the most choices that a row has.
        """
        columns: dict[Key, int] = {("column", number): number for number in range(len(self._columns))}
        ways = {"label_values": self._by_value, "names": self._by_name | columns}
        numbers = [(key[1], number) for key, number in self._known if key[0] == "number"]
        booleans = [(key[1], number) for key, number in self._known if key[0] == "boolean"]
        count = len(self.names) if choices is None else choices
        if not numbers and all(boolean == number for boolean, number in booleans):
            ways["ids"] = {("number", number): number for number in range(count)}
        if choices is None and count == 2 and not booleans and all(one == other for one, other in numbers):
            ways["booleans"] = {("boolean", boolean): int(boolean) for boolean in (False, True)}
        return ways

    def is_named(self, key: Key) -> bool:
        """Whether a raw label is one of `labels` or `label_values`."""
        return key in self._named

    def ignored(self, column: Column, keys: Sequence[Key], unlabelled: bool) -> list[bool]:
        """Which rows have no label, by `ignore_labels`.

        Args:
            unlabelled: whether a missing value is none as well.
        """
        ignore = self._ignore | ({_MISSING} if unlabelled else set())
        ignored = [key in ignore for key in keys]
        if column.names is not None and not any(self.key(name)[0] == "number" for name in column.names):
            # An id of a ClassLabel can be ignored as well as its name.
            return [
                found or self.key(value) in ignore
                for found, value in zip(ignored, column.values, strict=True)
            ]
        return ignored

    def expected(self, ways: Mapping[str, Mapping[Key, int]]) -> str:
        """The raw labels that the task knows, for messages."""
        values, is_choice = self.task.raw_label_values, self.task.choices is not None
        if values and not is_choice:
            entries = zip(values, self.names, strict=True)
            return "one of " + listed(f"{_alternatives(entry)} ({name})" for entry, name in entries)
        if "ids" in ways and not is_choice:
            return "one of " + listed(f"{number} ({name})" for number, name in enumerate(self.names))
        known = [_alternatives(entry) for entry in values] or [json.dumps(name) for name in self.names]
        index = f"the index of the right choice, 0 to {len(ways['ids']) - 1}" if "ids" in ways else ""
        return ", or ".join(part for part in (f"one of {listed(known)}" if known else "", index) if part)


def _same_key(labels: Iterable[tuple[Any, Any]]) -> Iterator[str]:
    """Texts that stand for different labels and have the same key.

    Raises:
        UserError: one of the two is no text, so that the spelling cannot tell them apart.
    """
    known: dict[Key, list[tuple[Any, Any]]] = {}
    for value, label in labels:
        known.setdefault(label_key(value), []).append((value, label))
    for same in known.values():
        if len({label for _, label in same}) == 1:
            continue
        if not all(isinstance(value, str) for value, _ in same):
            first, second = same[0][0], next(value for value, label in same if label != same[0][1])
            raise UserError(
                f"label_values: {shown(first)} and {shown(second)} are the same raw label, and stand for two labels; "
                "expected each once"
            )
        yield from (value for value, _ in same)


def _own_names(labels: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """The names of a ClassLabel column; for the hub's names of a shipped task's labels these labels."""
    return labels if tuple(names) == _HUB_NAMES.get(tuple(labels)) else names


def numbers_of(column: Column) -> Column:
    """The column of a regression; a file without types has its numbers as text."""
    if column.typed:
        return column
    return replace(column, values=[_from_text(value) for value in column.values])


def _from_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    number = _number(text)
    if number is not None:
        return number
    return float(text) if _NOT_FINITE.fullmatch(text) else value


def read_values(task: Task, table: Table, column: Column, kept: list[int]) -> list[float]:
    """The labels of a regression, from what `numbers_of` gives.

    Raises:
        UserError: one of the rows `kept` has no finite number; names it.
    """
    for row in kept:
        value = column.values[row]
        # Compared and not converted: an integer can be too large for a float. What is not finite fails too.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise UserError(
                f"{table.at(row)}: {task.label} is {shown(value)}; expected a finite number\n{_ignore(task, value)}"
            )
    return [float(column.values[row]) for row in kept]


def read_ids(
    labels: Labels,
    table: Table,
    column: Column,
    keys: Sequence[Key],
    kept: list[int],
    choices: list[list[str]] | None = None,
    unit: str = "rows",
) -> tuple[list[int], Reading]:
    """Class ids, or indices of the right choices, and how they were read.

    Args:
        keys: of all rows of the column.
        choices: choice tasks: of the rows `kept`.
        unit: what `kept` counts: rows, or labels where a row has several.

    Raises:
        UserError: a label of the rows `kept` is none of the task's or beyond its row's choices, or the labels are
            written in several ways; names the row.
    """
    task, count = labels.task, len(labels.names)
    if choices is not None:
        count = max(len(options) for options in choices)
    ways = labels.ways(None if choices is None else count)
    found = [keys[row] for row in kept]
    distinct = set(found)
    fitting = [name for name, way in ways.items() if distinct <= way.keys()]
    if not fitting:
        raise _unreadable(labels, ways, table, column, keys, kept, unit)
    ids = [ways[fitting[0]][key] for key in found]
    for row, index, options in zip(kept, ids, choices or [], strict=choices is not None):
        if index >= len(options):
            raise UserError(
                f"{table.at(row)}: {task.label} is {shown(column.values[row])}, the choice at {index}; expected one "
                f"of the {len(options)} choices, which count from 0\n"
                + (_ignore(task, column.values[row]) if 0 in ids else _count_from(1, count))
            )
    return ids, Reading(tuple(fitting), frozenset(ids), count, table.where)


def agreed_way(
    task: Task, readings: Mapping[str, Reading | None], trained_as: str | None = None
) -> str | None:
    """The one way in which the labels of all splits are read; None where there are none to read.

    Args:
        readings: by split.
        trained_as: the way in which an artifact's training read the labels of this task, where that is known.

    Raises:
        UserError: there is no such way, or the labels are numbers that could count from 0 or from 1.
    """
    known = {split: reading for split, reading in readings.items() if reading is not None}
    if not known:
        return None
    first, *others = known
    common = list(known[first].ways)
    for split in others:
        both = [way for way in common if way in known[split].ways]
        if not both:
            raise UserError(
                f"{known[split].where}: its labels are {known[split].ways[0]}, and those of {first} are {common[0]}; "
                f"expected one way in all splits\n{_one_way(task)}"
            )
        common = both
    ids = frozenset().union(*(reading.ids for reading in known.values()))
    # In a classification one class alone does not tell: a file may well hold the rows of one label.
    enough = 0 if task.choices is not None else 1
    if common[0] == "ids" and trained_as != "ids" and 0 not in ids and len(ids) > enough:
        where = " and ".join(reading.where for reading in known.values())
        count = max(reading.count for reading in known.values())
        raise UserError(
            f"{where}: {task.label} is {min(ids)} to {max(ids)} and never 0, so it may count from 0 or from 1\n"
            f"{_count_from(1, count)}; {_count_from(0, count)}"
        )
    return common[0]


def _unreadable(
    labels: Labels,
    ways: Mapping[str, Mapping[Key, int]],
    table: Table,
    column: Column,
    keys: Sequence[Key],
    kept: list[int],
    unit: str,
) -> UserError:
    task, expected = labels.task, labels.expected(ways)
    distinct = {keys[row] for row in kept}
    known = set().union(*(way.keys() for way in ways.values()))
    nearest = max(ways, key=lambda name: len(distinct & ways[name].keys()))
    strange = [row for row in kept if keys[row] not in known]
    row = strange[0] if strange else next(row for row in kept if keys[row] not in ways[nearest])
    value = column.values[row]
    what = f"{table.at(row)}: {task.label} is {shown(value)}"
    if not strange:
        other = next(row for row in kept if keys[row] in ways[nearest])
        return UserError(
            f"{what}, and {shown(column.values[other])} in {table.row_name(other)} is read as {nearest}; expected "
            f"one way in all rows\n{_one_way(task)}"
        )
    alike = f" ({sum(keys[other] == keys[row] for other in kept):,} of {len(kept):,})"
    if column.names is not None and type(value) is int and 0 <= value < len(column.names):
        name = column.names[value]
        return UserError(
            f"{what}, which its ClassLabel calls {shown(name)}; expected {expected}\n"
            "Other names of the labels, in the order of labels: 'task.label_values=[…]'; "
            f"{_ignore(task, name, alike, unit)}"
        )
    numbers = {keys[row][1] for row in kept if keys[row][0] == "number"}
    count = len(ways.get("ids") or labels.names or task.raw_label_values)
    if keys[row][0] == "number" and min(numbers) in (0, 1) and max(numbers) == min(numbers) + count - 1:
        return UserError(f"{what}; expected {expected}\n{_count_from(min(numbers), count)}")
    if labels.is_named(keys[row]):  # by `labels` and `label_values`, which disagree about it
        return UserError(f"{what}; expected {expected}\n{_one_way(task)}")
    return UserError(f"{what}; expected {expected}\n{_ignore(task, value, alike, unit)}")


def _alternatives(entry: Sequence[Any]) -> str:
    return " or ".join(json.dumps(value, default=str) for value in entry)


def _one_way(task: Task) -> str:
    name = (task.labels or ["A"])[0]
    return (
        "Write them in one way, or give all raw values of each label: label_values in the task file, "
        f"such as [[{name[:20]}, 0], …]"
    )


def _count_from(first: int, count: int) -> str:
    """The override for labels that are numbers in their order."""
    counted = [str(number) for number in range(first, first + count)]
    said = ",".join(counted) if count <= 10 else f"{counted[0]},{counted[1]},…,{counted[-1]}"
    return f"If they count from {first}: 'task.label_values=[{said}]'"


def _ignore(task: Task, value: Any, alike: str = "", unit: str = "rows") -> str:
    """The override for one more raw label that means that there is none.

    Args:
        alike: how many of them there are.
        unit: rows, or labels where a row has several.
    """
    ignored = ",".join(map(_typed, [*task.ignore_labels, value]))
    meaning = f"such rows{alike} have no label" if unit == "rows" else f"such {unit}{alike} count for nothing"
    return f"If {meaning}: 'task.ignore_labels=[{ignored}]'; other raw labels: label_values in the task file"


def _typed(value: Any) -> str:
    """A raw label as an override writes it."""
    if label_key(value) == _MISSING:
        return '""' if isinstance(value, str) else "null"
    if isinstance(value, (str, int, float)) and len(text := json.dumps(value)) <= 60:
        return text if isinstance(value, str) else str(value)
    return "VALUE"  # too long to be typed, or none of a config


def _written(value: Any) -> str:
    try:
        return repr(value)
    except RecursionError:  # nested more deeply than anything that is meant for a label
        return "..."
