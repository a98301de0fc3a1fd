from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from fusion.overrides import is_plain, only_in_quotes, quoted

PLAIN = [
    "/tmp/ü",
    "/tmp/日本 x",
    "a&b",
    "~/x",
    "a#b",
    "a b",
    "a:b",
    "a\tb",
    "x%y@z?|*",
    "\u00a0",
    "a;b<c>!^`",
    "1.5",
    "a+b",
]


@pytest.mark.parametrize("value", PLAIN)
def test_quotes_are_added_where_hydra_needs_them(value: str) -> None:
    parser = OverridesParser.create()
    assert is_plain(value)
    try:
        parser.parse_override(f"store={value}")
    except HydraException:
        assert only_in_quotes(value)
        read = parser.parse_override(quoted(f"store={value}")).value()
        assert getattr(read, "text", read) == value
    else:
        assert only_in_quotes(value) == [] and quoted(f"store={value}") == f"store={value}"


@pytest.mark.parametrize("override", ["sources=[a,b]", 'store="/tmp/ü"', "seed=1,2", "a", "x={a:ü}", "~key"])
def test_what_has_a_structure_is_kept(override: str) -> None:
    assert quoted(override) == override


def test_a_workflow_quotes_its_paths() -> None:
    from pipelines.commands import typed

    words = shlex.split(typed("fusion.stage1", ["store=/tmp/ü", "sources=[a]"]))
    assert words[3:] == ['store="/tmp/ü"', "sources=[a]"]
