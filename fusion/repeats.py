"""What stands more than once where each may stand once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def repeated(values: Iterable[str]) -> list[str]:
    """Each value that comes twice or more, in the order of the first of them."""
    return [value for value, count in Counter(values).items() if count > 1]
