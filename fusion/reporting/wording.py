"""Formatting of numbers, groups and names in the page and the tables."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from fusion.reporting.statistics import Difference
from fusion.reporting.targets import Group, Target
from fusion.store.listing import as_bytes
from fusion.store.settings_groups import key_of


def mean_of(values: Sequence[float]) -> str:
    """Format the mean and, for more than one value, the standard deviation."""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def signed(value: float, digits: int = 3) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def seeds(group: Group) -> str:
    """Format the number of seeds of a group, and the number of runs if it differs."""
    runs, different = len(group.entries), group.seeds
    counted = f"{different} seed{'s' * (different != 1)}"
    return counted if runs == different else f"{runs} runs with {counted}"


def common_seeds(group: Group) -> str:
    """Format the number of seed pairs of a difference; empty if all seeds are paired or none."""
    if group.difference is None or group.against is None:
        return ""
    pairs = group.difference.pairs
    if pairs in (0, max(len(group.entries), len(group.against.entries))):
        return ""
    return f"over the {pairs} common seeds" if pairs > 1 else "on the only common seed"


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
    readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:6]}"


def group_anchor(target: Target, group: Group) -> str:
    best = target.groups[group.method] is group
    return anchor(target.label, group.method, *([] if best else [key_of(group.entries[0].variant)]))


def file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-").lower()[:100]
