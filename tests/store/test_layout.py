"""Names of artifacts."""

from __future__ import annotations

import pytest

from fusion.errors import UserError
from fusion.store.layout import check_name


@pytest.mark.parametrize("name", ["mnli", "rte-seed-3", "a.b_c-D", "0", "rte-lr-1e-4", "x" * 100, "con"])
def test_good_names(name: str) -> None:
    check_name(name)


PATHS = ["", ".", "..", "../mnli", "/mnli", "a/b", "a\\b", ".hidden", "~", "a:b"]
TEXTS = ["-x", "x.", "a b", "é", "a\n", "a\0b", "$x", "x" * 101]


@pytest.mark.parametrize("name", PATHS + TEXTS)
def test_names_that_would_leave_the_store(name: str) -> None:
    with pytest.raises(UserError, match="letters, digits"):
        check_name(name)
