"""Strings for terminals, logs and shells. External strings must be escaped with `printable` before they are printed."""

from __future__ import annotations

import difflib
import functools
import io
import logging
import os
import re
import reprlib
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

PROGRESS = "FUSION_PROGRESS"  # environment variable: 0 disables progress bars
SHOWN = 60  # characters of a value or a name in a message
NAMES = 20  # names in a message
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = SHOWN


def printable(text: str) -> str:
    """Escape all characters except printable ones, tabs and line feeds."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def shortened(value: Any, most: int = 300) -> str:
    """Return a printable string, or a value in override syntax, truncated to `most` characters."""
    text = printable(value if isinstance(value, str) else hydra_value(value))
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: Any) -> str:
    """Return a value with its type, for a message."""
    if value is None:
        return "null"
    return f"{shortened(_short.repr(value), SHOWN)} ({type(value).__name__})"


def listed(names: Iterable[str]) -> str:
    """Join names on one line for a message, limiting their number and length."""
    every = list(names)
    words = [name if name.isprintable() and len(name) <= SHOWN else _short.repr(name) for name in every[:NAMES]]
    if len(every) > NAMES:
        words.append(f"and {len(every) - NAMES} more")
    return ", ".join(words) or "nothing"


class _PrintableRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return printable(super().getMessage())


def printable_output() -> None:
    """Escape unprintable characters in all log messages, and unencodable ones on stdout."""
    logging.setLogRecordFactory(_PrintableRecord)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@functools.cache
def log_once(log: logging.Logger, line: str) -> None:
    """Log a line once per process."""
    log.info("%s", line)


class ConsoleHandler(logging.StreamHandler[TextIO]):
    """Log to the current `sys.stdout`, which a progress bar replaces to print lines above itself."""

    def __init__(self, stream: TextIO | None = None) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def at_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal with cursor control."""
    return not stream.closed and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def shows_progress() -> bool:
    """Return whether progress bars are drawn: on a terminal, unless FUSION_PROGRESS=0."""
    return os.environ.get(PROGRESS) != "0" and at_terminal(sys.stdout) and at_terminal(sys.stderr)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `: did you mean rte or cb?` for an unknown name, or an empty string if no name is similar."""
    near = difflib.get_close_matches(word, list(known), 3, cutoff)
    return f": did you mean {' or '.join(near)}?" if near else ""


def repeated(values: Iterable[str]) -> list[str]:
    """Return the values that occur more than once, in order of first occurrence."""
    return [value for value, count in Counter(values).items() if count > 1]


_PLAIN = re.compile(r"[A-Za-z0-9_./:+@%-]+")
# Unquoted strings that Hydra parses as null, a boolean or a number.
OTHER_TYPE = re.compile(
    r"null|true|false|[-+]?(inf|nan|(0|[1-9](_?\d)*)|((0|[1-9](_?\d)*)\.?|(0|[1-9](_?\d)*)?\.\d(_?\d)*)(e[-+]?\d(_?\d)*)?)",
    re.IGNORECASE,
)
_STRUCTURE = re.compile(r"[\[\]{}()'\",=]")  # lists, dicts, calls, quotes, sweeps


def hydra_value(value: Any) -> str:
    """Format a value in override syntax: `null`, `true`, `0.0001`, `[a,b]`, `{a:1}`, or a quoted string if needed."""
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
    if _PLAIN.fullmatch(text) and not OTHER_TYPE.fullmatch(text):
        return text
    # OmegaConf resolves ${...} inside quotes as well.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)
    escaped = re.sub(r'(\\*)"', lambda match: match[1] * 2 + '\\"', text)
    if match := re.search(r"\\+$", escaped):
        escaped += match[0]
    return f'"{escaped}"'


def override(key: str, value: Any) -> str:
    """Format KEY=VALUE for Hydra; use `shell_line` or `shlex.quote` to quote it for a shell."""
    return f"{key}={hydra_value(value)}"


def shell_line(module: str, words: Sequence[str]) -> str:
    """Format a `python -m fusion.MODULE` command with overrides for a shell."""
    return shlex.join(["python", "-m", f"fusion.{module}", *words])


def flat(values: Mapping[Any, Any], separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten `{"optim": {"lr": 1e-4}}` to ("optim.lr", 1e-4), sorted by key; lists of mappings are indexed."""
    for key, value in sorted(values.items(), key=lambda item: str(item[0])):
        if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            value = dict(enumerate(value))
        if isinstance(value, Mapping) and value:
            yield from flat(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value


def is_within(key: str, groups: Iterable[str]) -> bool:
    """Return whether a dotted key is one of `groups` or below one of them."""
    return any(f"{key}.".startswith(f"{group}.") for group in groups)


def key_of(word: str) -> str:
    """Return the key of an override: `task` for `+task=rte`."""
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


def quoted(word: str) -> str:
    """Quote the value of an override if it is a string with special characters."""
    key, _, value = word.partition("=")
    plain = not value or _PLAIN.fullmatch(value) or _STRUCTURE.search(value)
    return word if plain else f"{key}={hydra_value(value)}"
