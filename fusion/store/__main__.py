"""Look at a store, verify it, and take things out of it.

python -m fusion.store list
python -m fusion.store show rte-adapterfusion
python -m fusion.store verify
python -m fusion.store remove rte store=outputs/store
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fusion.cli.console import say
from fusion.cli.program import run_program
from fusion.errors import UserError
from fusion.files import resolve_path

USAGE = """\
python -m fusion.store COMMAND [NAME] [KEY=VALUE ...]

    list                 what the store has, what is damaged, what runs have left
    show NAME            all that is known of an artifact, and the commands that make it anew
    verify [NAME]        read every file again and compare it with its manifest: exit code 1 if anything is wrong
    remove NAME          take an artifact away; refused while a fusion needs it

    store=DIR            the store (default: outputs/store)
    into=DIR             show: the store that its commands shall write to (default: the same)
    force=true           remove: also what fusions need; they find it in STORE/.replaced, the name is free

Exit codes: 0 done, 1 verify found a problem, 2 a wrong command, 130 interrupted.
"""
DEFAULT_STORE = "outputs/store"
KEYS = {"list": ("store",), "show": ("store", "into"), "verify": ("store",), "remove": ("store", "force")}
NAMES = {"list": (0, 0), "show": (1, 1), "verify": (0, 1), "remove": (1, 1)}  # the least and the most
BOOLEANS = {"true": True, "false": False}


def main(words: Sequence[str] | None = None) -> int:
    """The program; gives the exit code."""
    return run_program(words, USAGE, work)


def work(words: Sequence[str]) -> int:
    command, names, values = read_words(words)
    return COMMANDS[command](names, values)


def read_words(words: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """Command, names and values.

    Raises:
        UserError: an unknown command or key, or too few or many names; it says what there is.
    """
    if not words or words[0] not in KEYS:
        said = f"unknown command {words[0]!r}{_near(words[0], KEYS)}" if words else "no command"
        raise UserError(f"{said}; expected one of {', '.join(KEYS)} (--help says more)")
    command, rest = words[0], words[1:]
    values: dict[str, str] = {}
    for key, equals, value in (word.partition("=") for word in rest):
        if not equals:
            continue
        if key not in KEYS[command]:
            known = ", ".join(f"{known}=" for known in KEYS[command])
            raise UserError(f"unknown key {key}{_near(key, KEYS[command])}; {command} knows {known}")
        if key in values:
            raise UserError(f"{key}= stands twice")
        if not value:
            raise UserError(f"{key}= is empty: expected {key}={'true' if key == 'force' else 'DIR'}")
        values[key] = value
    names = [word for word in rest if "=" not in word]
    least, most = NAMES[command]
    if not least <= len(names) <= most or "" in names:
        expected = (
            {0: "no name", 1: "the NAME of an artifact"}[least]
            if least == most
            else "one NAME, or none for all"
        )
        raise UserError(f"{command} takes {expected}, not {' '.join(map(repr, names)) or 'nothing'}")
    return command, names, values


def _near(word: str, known: Sequence[str] | dict[str, tuple[str, ...]]) -> str:
    near = difflib.get_close_matches(word, list(known), 1, 0.7)
    return f": did you mean {near[0]}?" if near else ""


def _store(values: dict[str, str]) -> Path:
    return resolve_path(values.get("store", DEFAULT_STORE), "store")


def _list(names: list[str], values: dict[str, str]) -> int:
    from fusion.cli.console import show_table
    from fusion.store.listing import list_store

    rows, lines = list_store(_store(values))
    if rows:
        show_table(rows)
    for line in lines:
        say(line)
    return 0


def _show(names: list[str], values: dict[str, str]) -> int:
    from fusion.store.describing import describe

    into = resolve_path(values["into"], "into") if "into" in values else None
    say("\n".join(describe(names[0], _store(values), into)))
    return 0


def _verify(names: list[str], values: dict[str, str]) -> int:
    from fusion.model.from_manifests import tensor_shapes
    from fusion.store.verifying import left_over, verify

    store, problems, count = _store(values), 0, 0
    for verdict in verify(store, tensor_shapes, names[0] if names else None):
        say(str(verdict), flush=True)
        problems, count = problems + bool(verdict.problem), count + 1
    if not names:
        for line in left_over(store):
            say(line)
    say(f"{count - problems} of {count} artifacts are sound")
    return 1 if problems else 0


def _remove(names: list[str], values: dict[str, str]) -> int:
    from fusion.store.removing import remove

    force = values.get("force", "false")
    if force not in BOOLEANS:
        raise UserError(f"force={force}: expected true or false")
    say(remove(names[0], _store(values), BOOLEANS[force]))
    return 0


COMMANDS: dict[str, Callable[[list[str], dict[str, str]], int]] = {
    "list": _list,
    "show": _show,
    "verify": _verify,
    "remove": _remove,
}

if __name__ == "__main__":
    sys.exit(main())
