"""Raw columns by name, from any file or dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_ABSENT: Any = object()  # marks a missing value, as opposed to null


@dataclass(frozen=True)
class Table:
    """Raw columns by name, and how messages refer to a row."""

    where: str
    columns: tuple[str, ...]
    rows: int
    read: Callable[[str], list[Any]]  # returns the values of a column
    row_name: Callable[[int], str]
    features: dict[str, Any] = field(default_factory=dict)  # of `datasets`, by column
    typed: bool = True  # False if all values are strings, as in a CSV file

    def column(self, path: str) -> list[Any] | None:
        """Return the values at `path`, or `None` if the column is missing.

        A path may lead into nested values: `choices.text` is the field `text` of the struct (or of each struct of the
        list) in `choices`, `choices.0` its first element.
        """
        if path in self.columns:
            return self.read(path)
        head, _, rest = path.partition(".")
        if not rest or head not in self.columns:
            return None
        values = self.read(head)
        for key in rest.split("."):
            values = [_step(value, key) for value in values]
        if values and all(value is _ABSENT for value in values):
            return None
        return [None if value is _ABSENT else value for value in values]

    @property
    def classes(self) -> dict[str, Any]:
        """Features that may contain class names."""
        return {
            name: one
            for name, one in self.features.items()
            if not (isinstance(one, dict) and one.get("_type") == "Value")
        }

    def class_names(self, path: str) -> tuple[str, ...] | None:
        """Return the class names of a column of ClassLabels or of lists of them, else `None`."""
        feature: Any = self.features
        for key in [path] if path in self.features else path.split("."):
            feature = feature.get(key) if isinstance(feature, dict) else None
        while isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
            feature = feature.get("feature")
        if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
            return None
        names = feature.get("names")
        return tuple(str(name) for name in names) if isinstance(names, list) else None

    def at(self, row: int) -> str:
        return f"{self.where}, {self.row_name(row)}"


@dataclass(frozen=True)
class Column:
    """The raw values of a column of a table, and its class names if it contains ClassLabels."""

    values: list[Any]
    table: Table
    names: tuple[str, ...] | None = None


def _step(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return value.get(key, _ABSENT)
    if isinstance(value, (list, tuple)):
        if key.isdecimal():
            return value[int(key)] if len(key) < 10 and int(key) < len(value) else _ABSENT
        if value and all(isinstance(element, dict) and key in element for element in value):
            return [element[key] for element in value]
    return _ABSENT


def counted(row: int) -> str:
    return f"row {row + 1}"
