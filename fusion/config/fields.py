"""Fields of settings classes: the values that each accepts is data beside it, checked when an object is made."""

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
    """Base of settings classes. A subclass may add checks across its fields in `__post_init__`.

    The class argument `group` is its key in a command's config, such as `optim`; none for the config itself. Raises
    UserError, with the override and what was expected, if a field does not accept its value.
    """

    if TYPE_CHECKING:  # Hydra would take an annotation for a setting
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
        """The settings as a manifest has them: those in `first` always, later ones only where they are not the default.

        So an artifact that uses no later setting has the same hash in every version.
        """
        values = {f.name: (getattr(self, f.name), default_of(f)) for f in fields(self)}
        return {key: value for key, (value, default) in values.items() if key in self.first or value != default}


def checked(default: Any, accepts: Callable[[Any], bool], expected: str) -> Any:
    """A field that accepts values by a function; `expected` ends the message "KEY=VALUE: expected ..."."""
    metadata = {"accepts": accepts, "expected": expected}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def integer(default: int | None, at_least: int, at_most: int | None = None, null: str = "", hint: str = "") -> Any:
    """A whole number.

    `null` is what null means (empty: it is refused); `hint` ends the message: an example, a unit, or what else would do.
    """
    bounds = f">= {at_least}" if at_most is None else f">= {at_least} and <= {at_most}"
    return _number(default, "a whole number", lambda value: type(value) is int, bounds, null, hint)


def number(default: float | None, bounds: str, infinite: bool = False, null: str = "", hint: str = "") -> Any:
    """A finite number, or any with `infinite`, within bounds such as ">= 0 and < 1". The rest is as for `integer`."""

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
    """One of the given texts, or null where `null` states what it means."""
    expected = f"one of {', '.join(allowed)}{f', or null for {null}' if null else ''}"
    return checked(default, lambda value: value in allowed or (value is None and bool(null)), expected)


def subset(default: list[str], allowed: Collection[str]) -> Any:
    """At least one of the given texts, each once."""
    return checked(
        default,
        lambda value: 0 < len(value) == len(set(value)) and set(value) <= set(allowed),
        f"some of {', '.join(allowed)}, each once",
    )


def layers() -> Any:
    """Layers of the backbone: null (all), `last:N`, or a list of numbers from 0."""

    def accepts(value: Any) -> bool:
        if isinstance(value, list):
            return 0 < len(value) == len(set(value)) and all(type(n) is int and n >= 0 for n in value)
        return value is None or (isinstance(value, str) and re.fullmatch(r"last:[1-9]\d*", value) is not None)

    return checked(
        None, accepts, "null (all layers), last:N such as last:3, or a list of different layers such as [0,2,4]"
    )


def layer_drop() -> Any:
    """AdapterDrop: null, `specialized:N` or `robust`."""
    return checked(
        None,
        lambda value: value in (None, "robust") or re.fullmatch(r"specialized:[1-9]\d*", value) is not None,
        "null, specialized:N (nothing in the first N layers) or robust (in training, nothing in a random number of "
        "the first layers)",
    )


def batches(times: bool = False) -> Any:
    """A part of an epoch, as Lightning takes it: null (all), a fraction (float) or a number of batches (int).

    With `times`, texts and mappings too, which Lightning reads as a duration.
    """

    def accepts(value: Any) -> bool:
        if type(value) in (int, float):
            return value >= 0 and (type(value) is int or value <= 1)
        return value is None or (times and isinstance(value, (str, dict)))

    return checked(None, accepts, "a fraction from 0.0 to 1.0, or a whole number of batches >= 0")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def default_of(setting: Field[Any]) -> Any:
    """The default value of a field of a dataclass."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


@dataclass
class NamedSettings(Settings):
    """A group in which a name selects an entry of a table: `composition=NAME`, `method=NAME`.

    The settings of all names are fields of one class, so a key has one type and one default whatever the name is. Those
    that do not apply to the name must keep their defaults.

    Class attributes:
        table: the entry of each name, with the `settings` that apply to it; the first name is the default.
        common: settings that apply to every name.
    """

    if TYPE_CHECKING:  # annotations at run time would make settings of them
        table: ClassVar[Mapping[str, Any]]
        common: ClassVar[tuple[str, ...]]
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
        """Whether the name is the one that counts where none is given."""
        return self.name == next(iter(self.table))
