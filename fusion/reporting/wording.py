"""How numbers, scores and names are written."""

from __future__ import annotations

import hashlib
import re

from fusion.reporting.results import Group
from fusion.reporting.statistics import Difference
from fusion.store.listing import as_bytes


def score(group: Group) -> str:
    return f"{group.mean:.3f}" + ("" if group.deviation is None else f" ± {group.deviation:.3f}")


def signed(value: float, digits: int = 3) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def seeds(group: Group) -> str:
    """How many runs a mean is over."""
    runs, different = len(group.entries), group.seeds
    if runs == different:
        return f"{runs} seed{'s' * (runs != 1)}"
    return f"{runs} runs of {different} seed{'s' * (different != 1)}"


def titled(group: Group) -> str:
    """The method, with its settings where it has several."""
    return f"{group.method} ({group.differing})" if group.differing else group.method


def chosen_setting(group: Group) -> str:
    """Which setting of a method is shown where only one is; empty where the method has only one."""
    if not group.others:
        return ""
    return f"setting {group.differing}, best on {group.chosen_on} of {group.others + 1} settings"


def interval(difference: Difference | None, digits: int = 3) -> str | None:
    if difference is None or difference.low is None or difference.high is None:
        return None
    return f"{signed(difference.low, digits)} to {signed(difference.high, digits)}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(value: float | None) -> str:
    return "–" if value is None else as_bytes(round(value))


def anchor(*parts: str) -> str:
    """An id that any text may become, no two of them the same."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:6]}"


def file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-").lower()[:100]
