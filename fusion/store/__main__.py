"""List, show and verify the artifacts of a store, and remove them: python -m fusion.store list."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fusion.cli.console import read_arguments, run_program, say, show_table
from fusion.errors import UserError
from fusion.files import resolve_path
from fusion.store.listing import describe, leftovers, list_store
from fusion.store.lookup import scan
from fusion.store.writing import remove
from fusion.text import did_you_mean

USAGE = """\
python -m fusion.store COMMAND [NAME] [KEY=VALUE ...]

    list                 list all artifacts, damaged artifacts and files of unfinished runs
    show NAME            show the manifest of an artifact and the commands that reproduce it
    verify [NAME]        check all files against their manifests: exit code 1 if there is a problem
    remove NAME          remove an artifact that no fusion depends on

    store=DIR            the store (default: outputs/store)
    into=DIR             show: the store that the commands write to (default: the same store)
    force=true           remove: move an artifact that fusions depend on to STORE/.replaced, where they find it

Exit codes: 0 done, 1 verify found a problem, 2 an invalid command, 130 interrupted.
"""
STORE = {"store": "DIR"}
# Keys, number of names, and their description, by command.
COMMANDS = {
    "list": (STORE, (0, 0), "no name"),
    "show": (STORE | {"into": "DIR"}, (1, 1), "the NAME of an artifact"),
    "verify": (STORE, (0, 1), "at most one NAME"),
    "remove": (STORE | {"force": "true"}, (1, 1), "the NAME of an artifact"),
}


def main(words: Sequence[str] | None = None) -> int:
    return run_program(words, USAGE, work)


def work(words: Sequence[str]) -> int:
    command = words[0] if words else ""
    if command not in COMMANDS:
        meant = did_you_mean(command, COMMANDS)
        raise UserError(f"unknown command {command!r}{meant}; expected one of {', '.join(COMMANDS)} (--help)")
    names, values = read_arguments(words[1:], *COMMANDS[command])
    store = resolve_path(values.get("store", "outputs/store"), "store")
    if command == "verify":
        return _verify(store, names)
    if command == "list":
        rows, lines = list_store(store)
        if rows:
            show_table(rows)
    elif command == "show":
        lines = describe(names[0], store, resolve_path(values["into"], "into") if "into" in values else None)
    else:
        force = values.get("force", "false")
        if force not in ("true", "false"):
            raise UserError(f"force={force}: expected true or false")
        lines = [remove(names[0], store, force == "true")]
    for line in lines:
        say(line)
    return 0


def _verify(store: Path, names: list[str]) -> int:
    from fusion.model.from_manifests import tensor_shapes
    from fusion.store.artifacts import verify

    problems = count = 0
    for verdict in verify(store, tensor_shapes, names[0] if names else None):
        say(str(verdict), flush=True)
        problems, count = problems + bool(verdict.problem), count + 1
    for folder, text, unused in leftovers(store, list(scan(store))) if not names else ():
        advice = f"; rm -r '{folder}' frees it" if unused else ""
        say(f"left     {text}{advice}")
    say(f"{count - problems} of {count} artifacts are valid")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
