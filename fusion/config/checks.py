"""What a wrong value of a setting gets: one line with what was expected, what came, and the override that fixes it."""

from __future__ import annotations

import math
import re
from dataclasses import MISSING, Field, fields
from typing import Any

from fusion.errors import UserError
from fusion.text import override


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def in_range(
    key: str,
    value: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    whole: bool = True,
    infinite: bool = False,
    null: str = "",
    hint: str = "",
) -> None:
    """Refuse a number outside a range; the message is made of the same bounds.

    Args:
        whole: whether only whole numbers will do.
        infinite: whether infinity is a value like any other.
        null: what null means; empty: null is refused.
        hint: ends the sentence: an example, or what else would do.

    Raises:
        UserError: states the value, the whole range, and what null means.
    """
    if value is None and null:
        return
    number = type(value) is int or (type(value) is float and not whole)
    if number and (infinite or math.isfinite(value)):
        inside = (
            (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        )
        if inside:
            return
    if at_least is not None and at_most is not None:
        bounds = f"{at_least:.10g} to {at_most:.10g}"
    else:
        named = (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
        bounds = " and ".join(f"{name} {bound:.10g}" for name, bound in named if bound is not None)
    what = "a whole number, " if whole else "a number, " if infinite else "a finite number, "
    if number and math.isfinite(value):
        what = "" if above is None else "a number, "
    expected = f"{what}{bounds}".replace(", above", " above")
    raise UserError(
        f"{override(key, value)}: expected {expected}{hint}{f', or null for {null}' if null else ''}"
    )


def one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{override(key, value)}: expected one of {', '.join(allowed)}")


def check_batches(key: str, value: Any) -> None:
    """How much of an epoch, as Lightning takes it: a fraction, or a number of batches."""
    fraction = type(value) is float and 0.0 <= value <= 1.0
    require(
        value is None or fraction or (type(value) is int and value >= 0),
        f"{override(key, value)}: expected a fraction 0.0 to 1.0, or a whole number of batches, at least 0",
    )


def check_layers(key: str, value: Any) -> None:
    """`null` (all), `last:3`, or a list of 0-based layer numbers."""
    if value is None or (isinstance(value, str) and re.fullmatch(r"last:[1-9]\d*", value)):
        return
    numbers = isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
    require(
        numbers and len(value) > 0 and len(set(value)) == len(value),
        f"{override(key, value)}: expected null (all layers), last:N such as last:3, or a list of different layers such as [0,2,4]",
    )


def check_drop(key: str, value: Any) -> None:
    """AdapterDrop: `specialized:5` or `robust`."""
    require(
        value is None or value == "robust" or re.fullmatch(r"specialized:[1-9]\d*", value) is not None,
        f"{override(key, value)}: expected null, specialized:N (nothing in the first N layers) or robust "
        "(in training, nothing in a random number of the first layers)",
    )


def default_of(setting: Field[Any]) -> Any:
    """The default value of a field of a dataclass."""
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def as_stored(settings: Any, later: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a dataclass, without those `later` ones that have their default."""
    return {
        f.name: getattr(settings, f.name)
        for f in fields(settings)
        if f.name not in later or getattr(settings, f.name) != default_of(f)
    }
