"""A program of plain words, without Hydra: its help, and the exit code of whatever ends it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from fusion.errors import UserError
from fusion.runs import signals
from fusion.text import printable


def run_program(words: Sequence[str] | None, usage: str, work: Callable[[Sequence[str]], int]) -> int:
    """Does the work with the words of the command line, and gives the exit code.

    Args:
        words: None: those that this process was started with.
        usage: what --help prints.
        work: gives 0 or 1; a UserError or OSError of it is said in its own words and is 2.
    """
    words = sys.argv[1:] if words is None else words
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
        said = error.strerror or error
        print(printable(f"{error.filename}: {said}" if error.filename else str(said)), file=sys.stderr)
        return 2
