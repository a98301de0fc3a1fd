"""Sources of configs: the shipped conf/, directories of the user, dataclasses, and command line overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from fusion.config.compositions import COMPOSITIONS
from fusion.config.methods import METHODS
from fusion.config.model import BackboneConfig
from fusion.errors import UserError
from fusion.files import resolve_path
from fusion.text import OTHER_TYPE

# Groups without files in conf/, whose choices are the keys of a table.
TABLES: dict[str, Collection[str]] = {"composition": COMPOSITIONS, "method": METHODS}
for _group, _names in TABLES.items():
    for _name in _names:
        ConfigStore.instance().store(group=_group, name=_name, node={"name": _name}, provider="fusion")


def types_of(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a schema with its type."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name, kind
        for inner in (kind, *get_args(kind)):
            if is_dataclass(inner):
                yield from types_of(cast(type, inner), f"{prefix}{name}.")


def keys_of(schema: type) -> list[str]:
    """Return every dotted key of a schema: "seed", "optim.lr", ..."""
    return [key for key, _ in types_of(schema)]


def conf_folder() -> Path:
    """Return the shipped `conf/`: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())


def user_conf_folders() -> list[Path]:
    """Return the directories of user-defined tasks and experiments: `./conf` and `$FUSION_CONF`."""
    folders = [Path.cwd() / "conf"]
    if named := os.environ.get("FUSION_CONF"):
        folders.append(resolve_path(named, "FUSION_CONF"))
        if not folders[-1].is_dir():
            raise UserError(f"FUSION_CONF={named}: directory not found")
    # A directory with launch.yaml is the shipped one in a checkout.
    found = [path.resolve() for path in folders if path.is_dir() and not (path / "launch.yaml").is_file()]
    return list(dict.fromkeys(found))


class UserConf(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in user_conf_folders():
            search_path.append(provider="user", path=f"file://{folder}")


Plugins.instance().register(UserConf)


def backbone_config(name: str) -> BackboneConfig:
    """Return the settings of a YAML file of the group `backbone`, or of a model with this name or path."""
    files = (folder / "backbone" / f"{name}.yaml" for folder in (conf_folder(), *user_conf_folders()))
    for file in files:
        if file.is_file():
            content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            if unknown := content.keys() - {field.name for field in fields(BackboneConfig)}:
                raise UserError(f"{file}: unknown key {min(unknown)}")
            return BackboneConfig(**content)
    return BackboneConfig(name_or_path=name)


def groups() -> set[str]:
    """Return the names of all config groups."""
    folders = (path for conf in (conf_folder(), *user_conf_folders()) for path in conf.iterdir())
    return {*TABLES} | {path.name for path in folders if path.is_dir()}


def check_place(choice: str) -> None:
    """Raise UserError if a choice, GROUP/NAME, is defined more than once."""
    group, _, name = choice.rpartition("/")
    if not group:  # config of a command
        return
    files = (folder / f"{choice}.yaml" for folder in (conf_folder(), *user_conf_folders()))
    places = [str(file) for file in files if file.is_file()]
    places += ["the built-in choices"] if name in TABLES.get(group, ()) else []
    if len(places) > 1:
        raise UserError(f"{group} {name} is defined in {' and '.join(places)}; rename your own")


LISTS_OF_NAMES = ("sources", "tasks", "runs")  # of type Any, since a string such as `all` is also allowed
_ENTRY = re.compile(rf"(?<![^\[,])(\s*)({OTHER_TYPE.pattern})(?=\s*($|[,\]]))", re.IGNORECASE)


def text_keys(schema: type) -> set[str]:
    """Return the keys whose values are strings or lists of strings."""
    types = dict(types_of(schema))
    kinds = {key: {kind, *get_args(kind)} for key, kind in types.items()}
    return {
        key for key, kind in kinds.items() if (kind & {str, list[str]} and Any not in kind) or key in LISTS_OF_NAMES
    }


def as_text(word: str, keys: Collection[str]) -> str:
    """Quote the values of string-typed keys that Hydra would parse as a number or boolean, such as `name=true`.

    `null` is only quoted where a name is required: `+task=null`, `sources=[null]`.
    """
    match = re.fullmatch(r"(\+{0,2}([\w./-]+)=)(.*)", word)
    if match is None or match[2] not in keys or re.search("[({'\"]", match[3]):
        return word
    is_name = match[2] == "task" or (match[2] in LISTS_OF_NAMES and "[" in match[3])

    def quote(entry: re.Match[str]) -> str:
        return entry[0] if entry[2].lower() == "null" and not is_name else f"{entry[1]}'{entry[2]}'"

    return match[1] + _ENTRY.sub(quote, match[3])
