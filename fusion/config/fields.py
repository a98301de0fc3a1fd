"""Fields of settings classes; the accepted values are declared next to each field and checked on construction."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from fusion.errors import UserError
from fusion.text import override

_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
MAX_SEED = 2**32 - 1


@dataclass
class Settings:
    """Base of settings classes. Raises UserError if a field does not accept its value.

    The class argument `group` is the key in a command's config, such as `optim`; empty for the config itself.
    """

    if TYPE_CHECKING:  # Hydra would treat an annotation as a setting
        group: ClassVar[str]
        first: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, group: str = "") -> None:
        cls.group = group

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if "accepts" in f.metadata and not f.metadata["accepts"](value):
                key = f"{self.group}.{f.name}" if self.group else f.name
                raise UserError(f"{override(key, value)}: expected {f.metadata['expected']}")

    def as_stored(self) -> dict[str, Any]:
        """Return the settings in `first`, and those that differ from the default; new settings change no hash."""
        values = {f.name: (getattr(self, f.name), default_of(f)) for f in fields(self)}
        return {key: value for key, (value, default) in values.items() if key in self.first or value != default}


def checked(default: Any, accepts: Callable[[Any], bool], expected: str) -> Any:
    """Return a field whose values must satisfy `accepts`; `expected` completes "KEY=VALUE: expected ..."."""
    metadata = {"accepts": accepts, "expected": expected}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def integer(default: int | None, at_least: int, at_most: int | None = None, null: str = "", hint: str = "") -> Any:
    """Return a field for an integer, or null if `null` has its meaning; `hint` is appended to the message (a unit)."""
    bounds = f">= {at_least}" if at_most is None else f">= {at_least} and <= {at_most}"
    return _number(default, "a whole number", lambda value: type(value) is int and value < 2**63, bounds, null, hint)


def number(default: float | None, bounds: str, infinite: bool = False, null: str = "", hint: str = "") -> Any:
    """Return a field for a number (finite unless `infinite`) within bounds such as ">= 0 and < 1"; see `integer`."""

    def accepts(value: Any) -> bool:
        return type(value) is int or (type(value) is float and (infinite or math.isfinite(value)))

    return _number(default, "a number" if infinite else "a finite number", accepts, bounds, null, hint)


def _number(default: float | None, kind: str, accepts: Callable[[Any], bool], bounds: str, null: str, hint: str) -> Any:
    limits = [(_COMPARE[sign], float(bound)) for sign, bound in map(str.split, bounds.split(" and "))]

    def inside(value: Any) -> bool:
        if value is None:
            return bool(null)
        return accepts(value) and all(holds(value, bound) for holds, bound in limits)

    return checked(default, inside, f"{kind} {bounds}{hint}{f', or null for {null}' if null else ''}")


def choice(default: str | None, allowed: Collection[str], null: str = "") -> Any:
    """Return a field for one of the allowed strings, or null if `null` gives its meaning."""
    expected = f"one of {', '.join(allowed)}{f', or null for {null}' if null else ''}"
    return checked(default, lambda value: value in allowed or (value is None and bool(null)), expected)


def subset(default: list[str] | None, allowed: Collection[str], null: str = "") -> Any:
    """Return a field for a non-empty list of distinct allowed strings, or null if `null` gives its meaning."""

    def accepts(value: Any) -> bool:
        if value is None:
            return bool(null)
        return 0 < len(value) == len(set(value)) and set(value) <= set(allowed)

    return checked(
        default, accepts, f"some of {', '.join(allowed)}, each once{f', or null for {null}' if null else ''}"
    )


def layers() -> Any:
    """Return a field for layers of the backbone: null (all), `last:N`, or a list of zero-based indices."""

    def accepts(value: Any) -> bool:
        if isinstance(value, list):
            return 0 < len(value) == len(set(value)) and all(type(n) is int and n >= 0 for n in value)
        return value is None or (isinstance(value, str) and re.fullmatch(r"last:[1-9]\d*", value) is not None)

    return checked(
        None, accepts, "null (all layers), last:N such as last:3, or a list of different layers such as [0,2,4]"
    )


def layer_drop() -> Any:
    """Return a field for AdapterDrop: null, `specialized:N` or `robust`."""
    return checked(
        None,
        lambda value: value in (None, "robust") or re.fullmatch(r"specialized:[1-9]\d*", value) is not None,
        "null, specialized:N (no adapters in the first N layers) or robust (in training, no adapters in a random "
        "number of first layers)",
    )


def batches(times: bool = False, not_zero: str = "") -> Any:
    """Return a field for a part of an epoch, as in Lightning: null (all), a fraction (float) or a batch count (int).

    With `times`, strings and mappings are also accepted, which Lightning parses as a duration. `not_zero`: why not 0.
    """

    def accepts(value: Any) -> bool:
        if type(value) in (int, float):
            return value >= 0 and (type(value) is int or value <= 1) and not (not_zero and value == 0)
        return value is None or (times and isinstance(value, (str, dict)))

    bounds = "from 0.0 to 1.0, or a whole number of batches >= 0"
    if not_zero:
        bounds = f"above 0, or at least 1 batch: {not_zero}"
    return checked(None, accepts, f"a fraction {bounds}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def default_of(setting: Field[Any]) -> Any:
    """Return the default value of a dataclass field."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


@dataclass
class NamedSettings(Settings):
    """A config group whose options are the entries of a table: `composition=NAME`, `method=NAME`.

    The settings of all options are fields of one class. Those that do not apply to the selected option must keep
    their defaults.
    """

    if TYPE_CHECKING:  # at run time, annotations would make them settings
        table: ClassVar[Mapping[str, Any]]  # each entry has `settings`; the first name is the default
        common: ClassVar[tuple[str, ...]]  # settings that apply to every name
        name: str

    def __post_init__(self) -> None:
        if self.name not in self.table:
            names = ", ".join(self.table)
            raise UserError(f"{override(self.group, self.name)}: expected one of {names}")
        super().__post_init__()
        applicable = (*self.common, *self.table[self.name].settings)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in applicable and value != default_of(f):
                names = " or ".join(name for name, entry in self.table.items() if f.name in entry.settings)
                raise UserError(
                    f"{override(f'{self.group}.{f.name}', value)}: {self.group}={self.name} has no such setting; "
                    f"leave it out, or use {self.group}={names}"
                )

    @property
    def is_default(self) -> bool:
        return self.name == next(iter(self.table))
