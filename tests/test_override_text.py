"""Printed overrides are parsed to the same values by a shell and by Hydra."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from fusion.text import hydra_value, key_of, override, quoted, shell_line
from pipelines.commands import typed as workflow_line

TEXTS = [
    *("a", "/a/b", "a b", "it's", 'a"b', "a\\", 'a\\"b', "a,b=[c]{d}", "~/x", "ü", "a:b", "(x)", "#1", "*"),
    *("", " ", "-", "-x", "$HOME", "${x}", "\\${x}", "a${x}b\\", "\\", "\\\\", "'", 'it\'s "q"', "x\ty"),
    *["null", "Null", "true", "FALSE", "007", "7", "-5", "+5", "1_000", "1e3", "12e4567", ".5", "1.", "nan", "-inf"],
]
PLAIN = [
    *["/tmp/ü", "a&b", "~/x", "a#b", "a:b", "x%y@z?|*", "a;b<c>!^`", "1.5", "a+b"],
    *("/tmp/日本 x", "a b", "a\tb", "\u00a0"),
]
VALUES = [None, True, False, 0, -3, 1e-4, 1e30, [], ["a", "b c", None, True, "1"], {"a": 1, "b": [None, "x:y"]}]


def through(word: str) -> Any:
    """The value of a word of a shell, as a config has it."""
    (argument,) = shlex.split(word)
    parsed = OverridesParser.create().parse_override(argument)
    config = OmegaConf.create({})
    OmegaConf.update(config, parsed.key_or_group, parsed.value())
    container: Any = OmegaConf.to_container(config, resolve=True)
    return container[parsed.key_or_group]


@pytest.mark.parametrize("value", [*TEXTS, *VALUES, TEXTS[:-1]], ids=repr)
def test_a_value_means_itself(value: Any) -> None:
    found = through(shlex.quote(override("key", value)))
    assert found == value and type(found) is type(value)


def test_plain_text_is_not_quoted() -> None:
    assert override("sources", ["mnli", "sst2"]) == "sources=[mnli,sst2]"
    assert [hydra_value(value) for value in (None, False, 1e-4, "last:3", "bert-base")] == [
        "null",
        "false",
        "0.0001",
        "last:3",
        "bert-base",
    ]


def test_a_line_for_a_shell() -> None:
    line = shell_line("stage2", ["+task=rte", "sources=[a,b]", override("data.dir", "my data")])
    assert line == "python -m fusion.stage2 +task=rte 'sources=[a,b]' 'data.dir=\"my data\"'"
    assert [key_of(word) for word in ("+task=rte", "~logger", "a.b@c=1")] == ["task", "logger", "a.b"]


@pytest.mark.parametrize("value", PLAIN)
def test_quotes_are_added_where_hydra_needs_them(value: str) -> None:
    parser = OverridesParser.create()
    read = parser.parse_override(quoted(f"store={value}")).value()
    assert str(getattr(read, "text", read)) == value


@pytest.mark.parametrize(
    "override",
    [
        "sources=[a,b]",
        'store="/tmp/ü"',
        "seed=1,2",
        "a",
        "x={a:ü}",
        "~key",
        "seed=7",
        "compile=true",
        "layers=last:3",
        "name=",
    ],
)
def test_structured_values_are_kept(override: str) -> None:
    assert quoted(override) == override


def test_a_workflow_quotes_its_paths() -> None:
    words = shlex.split(workflow_line("fusion.stage1", ["store=/tmp/ü", "sources=[a]"]))
    assert words[3:] == ['store="/tmp/ü"', "sources=[a]"]
