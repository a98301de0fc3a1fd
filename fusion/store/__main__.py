"""List, show, verify and remove the artifacts of a store, and import and export LoRAs: python -m fusion.store list."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    import PATH          store a LoRA in peft's format (a directory with adapter_config.json) as a source of stage 2
    export NAME PATH     write a LoRA in peft's format to a new directory

    store=DIR            the store (default: outputs/store)
    into=DIR             show: the store that the commands write to (default: the same store)
    name=NAME            import: the name of the artifact
    backbone=NAME        import: the backbone, as in stage 1, or its name or path (default: that of the LoRA)
    accept_licence=true  import: accept the terms of the backbone
    trust_remote_code=true
                         import: run Python code of the backbone's repository
    overwrite=true       import: replace a LoRA of this name
    format=peft          export: the format (default: peft)
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
    "import": (
        STORE
        | {"name": "NAME", "backbone": "NAME", "overwrite": "true"}
        | {"accept_licence": "true", "trust_remote_code": "true"},
        (1, 1),
        "the PATH of a directory",
    ),
    "export": (STORE | {"format": "peft"}, (2, 2), "the NAME of an artifact and the PATH of a new directory"),
}


def main(words: Sequence[str] | None = None) -> int:
    return run_program(words, USAGE, work)


def work(words: Sequence[str]) -> int:
    command = words[0] if words else ""
    if command not in COMMANDS:
        meant = did_you_mean(command, COMMANDS)
        raise UserError(f"unknown command {command!r}{meant}; expected one of {', '.join(COMMANDS)} (--help)")
    names, values = read_arguments(_as_keys(words[1:]), *COMMANDS[command])
    store = resolve_path(values.get("store", "outputs/store"), "store")
    if command == "verify":
        return _verify(store, names)
    lines: Iterable[str]
    if command == "list":
        rows, lines = list_store(store)
        if rows:
            show_table(rows)
    elif command == "show":
        lines = describe(names[0], store, resolve_path(values["into"], "into") if "into" in values else None)
    elif command == "import":
        lines = _import(names[0], store, values)
    elif command == "export":
        lines = _export(names[0], store, resolve_path(names[1], "PATH"), values)
    else:
        lines = [remove(names[0], store, _flag(values, "force"))]
    for line in lines:
        say(line)
    return 0


def _as_keys(words: Sequence[str]) -> list[str]:
    """Return the words with `--KEY VALUE` as `KEY=VALUE`."""
    found: list[str] = []
    for word in words:
        if found and re.fullmatch(r"--\w+", found[-1]):
            found[-1] = f"{found[-1][2:]}={word}"
        else:
            found.append(word)
    return found


def _flag(values: Mapping[str, str], key: str) -> bool:
    value = values.get(key, "false")
    if value not in ("true", "false"):
        raise UserError(f"{key}={value}: expected true or false")
    return value == "true"


def _import(path: str, store: Path, values: Mapping[str, str]) -> Iterable[str]:
    from fusion.cli.config_sources import backbone_config

    if "name" not in values:
        raise UserError("expected name=NAME, the name of the artifact")
    backbone = backbone_config(values["backbone"]) if "backbone" in values else None
    if backbone is not None:
        backbone.accept_licence = _flag(values, "accept_licence")
        backbone.trust_remote_code = _flag(values, "trust_remote_code")
    elif {"accept_licence", "trust_remote_code"} & values.keys():
        raise UserError("accept_licence and trust_remote_code: expected backbone=NAME, the model that they apply to")
    from fusion.formats.transfer import import_lora

    return import_lora(resolve_path(path, "PATH"), values["name"], store, backbone, _flag(values, "overwrite"))


def _export(name: str, store: Path, path: Path, values: Mapping[str, str]) -> Iterable[str]:
    from fusion.formats.transfer import FORMATS, export_lora

    if values.get("format", "peft") not in FORMATS:
        raise UserError(f"format={values['format']}: expected {' or '.join(FORMATS)}")
    return export_lora(name, store, path)


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
