"""Error messages for invalid command lines and configs."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ValidationError
from yaml import YAMLError

from fusion.cli.config_sources import keys_of, types_of
from fusion.config.stages import Stage1Config, Stage2Config
from fusion.errors import UserError, first_line
from fusion.files import unwritable
from fusion.text import did_you_mean, listed, quoted

OWN_TASK = "define your own task in conf/task/NAME.yaml, or in task/NAME.yaml in $FUSION_CONF"
HINTS = {"task": f"\n{OWN_TASK}", "backbone": "\nset a Hub id or a folder with backbone.name_or_path=ID_OR_FOLDER"}


def explain(error: BaseException, schema: type, words: Sequence[str] = ()) -> str:
    """Return one or two lines for an error of Hydra, OmegaConf or a check. `words`: command line as typed."""
    if isinstance(error, UserError):
        return str(error)
    text, cause, types = str(error), error.__cause__ or error, dict(types_of(schema))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        known = sorted(error.options or [])
        return f"unknown {group} {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}{HINTS.get(group, '')}"
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override, words)
    if match := re.search(r"Could not (?:override|delete)(?: from config\.)? '?([^'=\s]+)'?", text):
        return "expected +task=NAME, with a +" if match[1] == "task" else unknown_key(match[1], schema)
    if match := re.search(r"Error merging override (\S+)", text):
        key = match[1].lstrip("+").split("=")[0]
        if "not in" in str(cause) and key not in types:
            return unknown_key(key, schema)
        expected = _expected(types.get(key)) if isinstance(cause, ValidationError) else ""
        return f"{match[1]}: {expected or first_line(cause)}"
    if match := re.match(r"Multiple values for (\w+)\.", text):
        key = match[1]
        return f"duplicate {key}: expected a single +{key}=NAME, or a sweep -m +{key}=NAME,NAME"
    if match := re.search(r"Ambiguous value for argument '(.+)'", text):
        key, _, value = match[1].partition("=")
        kind = types.get(key.lstrip("+"))
        as_list = f"; a list is written '{key}=[{value}]'" if kind is Any or "list" in str(kind) else ""
        return f"{match[1]}: multiple values are a sweep, which needs -m{as_list}"
    if match := re.match(r"In '(.+)': .* raised while composing config:\n(.*)", text):
        message = match[2]
        if unknown := re.search(r"Key '(.+)' not in '", message):
            message = unknown_key(unknown[1], schema)
            if unknown[1] == "task":  # the file is valid
                return message
        elif key := re.search(r"full_key: (\S+)", text):
            message = f"{key[1]}: {_expected(types.get(key[1])) or message}"
        return f"conf file {match[1]}.yaml: {message}"
    if re.match(r"Unexpected type( for root: NoneType|: None)", text):
        inner = " ".join(word for word in words if re.match(r"\+*(task|logger)\.[\w.]+=", word))
        return f"{inner}: the group is not selected; add +task=NAME or logger=[wandb,csv] (edit the files of tasks in tasks=)"
    if isinstance(cause, OSError) and text.startswith("Unable to configure handler"):
        return str(unwritable("hydra.run.dir", cause.filename, cause))
    if isinstance(error, YAMLError):
        return " ".join(text.split())
    lines = [line.strip() for line in f"{text}\n{cause if cause is not error else ''}".splitlines()]
    return "\n".join([line for line in lines if line][:2])


def _unreadable(word: str, words: Sequence[str]) -> str:
    """Explain why Hydra cannot parse an override, with the correct form."""
    start = f"cannot parse the override {word!r}: "
    if "=" not in word or word.startswith("="):
        before = words[words.index(word) - 1] if word in words[1:] else ""
        hint = f"; a value with a space needs quotes: '{before} {word}'" if "=" in before else ""
        return f"{start}expected KEY=VALUE{hint}"
    example = 'KEY="a (b)"' if quoted(word) == word else quoted(word)
    return f"{start}a value with special characters needs quotes, such as {shlex.quote(example)}"


def _expected(kind: Any) -> str:
    """Describe the values of a type; empty if more than one type is allowed."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", list: "a list"}
    names |= {dict: "a mapping"}
    is_container = get_origin(kind) in (list, dict)
    given = [get_origin(one) or one for one in ((kind,) if is_container else get_args(kind) or (kind,))]
    if len(found := [names[one] for one in given if one in names]) != 1 or {*given} - {*names, type(None)}:
        return ""
    return f"expected {found[0]}{', or null' if type(None) in given else ''}"


def unknown_key(key: str, schema: type) -> str:
    """Return the message for an unknown key, with similar keys."""
    keys = keys_of(schema)
    if key in keys:
        inner = [known for known in keys if known.startswith(f"{key}.")]
        return f"{key} is a group of keys: expected one of {listed(inner)}"
    if key == "task":
        return "+task= is not an override of this command: an artifact is used with the task that it was trained on"
    for stage, other in (("stage1", Stage1Config), ("stage2", Stage2Config)):
        if key in keys_of(other):
            return f"unknown key {key}: it is a setting of {stage}, not of this command"
    parent, _, last = key.rpartition(".")
    beside = [known for known in keys if known.rpartition(".")[0] == parent]
    for among, cutoff in ((keys, 1.0), (beside, 0.6), (keys, 0.7)):
        near = difflib.get_close_matches(last, [known.rpartition(".")[2] for known in among], 3, cutoff)
        if meant := [known for known in among if known.rpartition(".")[2] in near]:
            return f"unknown key {key}: did you mean {' or '.join(meant[:4])}?"
    if parent and beside:
        return f"unknown key {key}; {parent} has {', '.join(known.rpartition('.')[2] for known in beside)}"
    return f"unknown key {key}; --cfg job shows all keys"
