"""Programs of plain words, without Hydra: their arguments, their help, and the exit code of whatever ends them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

from fusion.errors import UserError
from fusion.runs import signals
from fusion.text import did_you_mean, printable, printable_output


def run_program(words: Sequence[str] | None, usage: str, work: Callable[[Sequence[str]], int]) -> int:
    """Do the work with the words of the command line; returns the exit code.

    Args:
        words: None: those that this process was started with.
        usage: what --help prints.
        work: returns 0 or 1; a UserError or OSError is printed and is 2.
    """
    words = sys.argv[1:] if words is None else words
    printable_output()
    return signals.exit_code(lambda: _run(words, usage, work))


def _run(words: Sequence[str], usage: str, work: Callable[[Sequence[str]], int]) -> int:
    try:
        if any(word in ("--help", "-h", "help") for word in words):
            print(usage, end="")
            return 0
        return work(words)
    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        reason = error.strerror or error
        print(printable(f"{error.filename}: {reason}" if error.filename else str(reason)), file=sys.stderr)
        return 2


def read_arguments(
    words: Sequence[str], keys: Mapping[str, str], count: tuple[int, int], expected: str
) -> tuple[list[str], dict[str, str]]:
    """The names and the KEY=VALUE words of a command line.

    Args:
        keys: each key with an example of its value, such as DIR.
        count: the least and the most names.
        expected: the names, for the message.

    Raises:
        UserError: another key, a key that is given twice or without a value, too few or too many names.
    """
    names: list[str] = []
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"\w+", key):  # a path may have a = in it
            names.append(word)
        elif key not in keys:
            known = ", ".join(f"{key}={example}" for key, example in keys.items())
            raise UserError(f"unknown key {key}{did_you_mean(key, keys, 0.7)}; expected {known}")
        elif key in values or not value:
            raise UserError(f"{word}: expected {key}={keys[key]}, once")
        else:
            values[key] = value
    if not count[0] <= len(names) <= count[1] or "" in names:
        given = " ".join(map(repr, names)) or "nothing"
        raise UserError(f"expected {expected}, not {given} (--help lists all arguments)")
    return names, values
