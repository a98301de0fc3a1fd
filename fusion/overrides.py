"""Values, overrides and commands as text that can be typed: Hydra's override syntax, quoted for a shell.

Everything that is printed in order to be typed comes from here. Without Hydra itself, so that the store may use it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

_PLAIN = re.compile(r"[A-Za-z0-9_./:+@%-]+")
# What Hydra reads as null, a truth value or a number unless it is quoted.
_OTHER_TYPE = re.compile(
    r"null|true|false|[-+]?(inf|nan|(0|[1-9](_?\d)*)|((0|[1-9](_?\d)*)\.?|(0|[1-9](_?\d)*)?\.\d(_?\d)*)(e[-+]?\d(_?\d)*)?)",
    re.IGNORECASE,
)
# ID, numbers, `:`, UNQUOTED_CHAR and white space of Hydra 1.3's OverrideLexer.g4.
_UNQUOTED = re.compile(r"[A-Za-z0-9_ \t/\-\\+.$%*@?|:]")
_STRUCTURE = re.compile(r"[\[\]{}()'\",=]")  # lists, dicts, calls, quotes, sweeps: not a plain text


def shortened(value: Any) -> str:
    """A value for a message, which a long list would fill, as an override writes it."""
    text = hydra_value(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def hydra_value(value: Any) -> str:
    """A value as an override writes it: `null`, `true`, `0.0001`, `[a,b]`, `{a:1}`, text that means that very text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{hydra_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(hydra_value, value))}]"
    text = str(value)
    if _PLAIN.fullmatch(text) and not _OTHER_TYPE.fullmatch(text):
        return text
    # OmegaConf would look up what stands in ${...}, in quotes too.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)
    escaped = re.sub(r'(\\*)"', lambda match: match[1] * 2 + '\\"', text)
    if match := re.search(r"\\+$", escaped):
        escaped += match[0]
    return f'"{escaped}"'


def override(key: str, value: Any) -> str:
    """KEY=VALUE for Hydra. For a shell it is quoted by `shell_line`, or by `typed` within a sentence."""
    return f"{key}={hydra_value(value)}"


def typed(key: str, value: Any) -> str:
    """KEY=VALUE as it can be typed in a shell."""
    return shlex.quote(override(key, value))


def shell_line(module: str, words: Sequence[str]) -> str:
    """`python -m fusion.MODULE ...` for a shell, of overrides as Hydra reads them."""
    return shlex.join(["python", "-m", f"fusion.{module}", *words])


def key_of(word: str) -> str:
    """The key of an override: `task` of `+task=rte`."""
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def only_in_quotes(value: str) -> list[str]:
    """The characters of a value that Hydra reads inside quotes only, such as `ü`, `&` and `~`."""
    return [c for c in dict.fromkeys(value) if not _UNQUOTED.fullmatch(c) and not _STRUCTURE.fullmatch(c)]


def is_plain(value: str) -> bool:
    """Whether a value is a single text: no list, dict, call, sweep, nor in quotes already."""
    return not _STRUCTURE.search(value)


def quoted(word: str) -> str:
    """An override as Hydra reads it: a plain value that it would refuse is put in quotes."""
    key, equals, value = word.partition("=")
    return f"{key}={hydra_value(value)}" if equals and is_plain(value) and only_in_quotes(value) else word
