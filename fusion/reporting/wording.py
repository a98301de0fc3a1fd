"""How numbers, groups and names are written in the page and the tables."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

from fusion.reporting.results import BASELINE, Group, Target
from fusion.reporting.statistics import Difference
from fusion.store.listing import as_bytes


def score(group: Group) -> str:
    return mean_of(group.scores)


def mean_of(values: Sequence[float]) -> str:
    """Mean and, for more than one value, the standard deviation."""
    import numpy as np

    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def signed(value: float, digits: int = 3) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def seeds(group: Group) -> str:
    """The number of runs that a mean is over."""
    runs, different = len(group.entries), group.seeds
    if runs == different:
        return f"{runs} seed{'s' * (runs != 1)}"
    return f"{runs} runs of {different} seed{'s' * (different != 1)}"


def common_seeds(group: Group) -> str:
    """The number of paired seeds of a difference, unless it is of all seeds: the means beside it are of more."""
    if group.difference is None or group.against is None:
        return ""
    pairs = group.difference.pairs
    if pairs in (0, max(len(group.entries), len(group.against.entries))):
        return ""
    return f"of the {pairs} common seeds" if pairs > 1 else "of the one common seed"


def against(target: Target, group: Group) -> str:
    """The baseline's setting that a group is compared with, unless it is the best one."""
    other = group.against
    return "" if other is None or other is target.groups[BASELINE] else other.differing


def titled(group: Group) -> str:
    """The method, with its setting if it has more than one."""
    return f"{group.method} ({group.differing})" if group.differing else group.method


def chosen_setting(group: Group) -> str:
    """The setting of a method that is shown where only one is; empty if the method has only one."""
    if not group.others:
        return ""
    return f"setting {group.differing}, best on {group.chosen_on} of {group.others + 1} settings"


def chosen_settings(target: Target, methods: Iterable[str]) -> list[str]:
    """For methods with more than one setting, which one a figure shows."""
    groups = [target.groups[method] for method in dict.fromkeys(methods) if method in target.groups]
    return [f"{group.method}: {setting}" for group in groups if (setting := chosen_setting(group))]


def interval(difference: Difference | None, digits: int = 3) -> str | None:
    if difference is None or difference.low is None or difference.high is None:
        return None
    return f"{signed(difference.low, digits)} to {signed(difference.high, digits)}"


def p_value(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def size(value: float | None) -> str:
    return "–" if value is None else as_bytes(round(value))


def anchor(*parts: str) -> str:
    """A unique HTML id for any text."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:6]}"


def group_anchor(target: Target, group: Group) -> str:
    best = target.groups[group.method] is group
    return anchor(target.label, group.method, *([] if best else [group.key]))


def file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-").lower()[:100]
