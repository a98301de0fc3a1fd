"""Where configs come from: the shipped conf/, the user's own folders, the schemas and the tables of the code."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from fusion.config.compositions import COMPOSITIONS
from fusion.config.methods import METHODS
from fusion.errors import UserError
from fusion.files import resolve_path

USER_CONF = "user"  # the provider of a user's folders in Hydra's search path
# Groups without files in conf/: each name of a table is a choice.
TABLES: dict[str, Collection[str]] = {"composition": COMPOSITIONS, "method": METHODS}
for _group, _names in TABLES.items():
    for _name in _names:
        ConfigStore.instance().store(group=_group, name=_name, node={"name": _name}, provider="fusion")


def register(name: str, schema: type) -> None:
    """Make `NAME_schema`, which `conf/NAME.yaml` has in its defaults, known to Hydra: the types of its keys."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def types_of(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a schema, dotted, with its type."""
    for name, kind in get_type_hints(schema).items():
        yield prefix + name, kind
        for inner in (kind, *get_args(kind)):
            if is_dataclass(inner):
                yield from types_of(cast(type, inner), f"{prefix}{name}.")


def keys_of(schema: type) -> list[str]:
    """Every key of a schema, dotted: "seed", "optim.lr", ..."""
    return [key for key, _ in types_of(schema)]


def conf_folder() -> Path:
    """The shipped `conf/`: inside the package once it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise UserError(f"no conf folder in {package} or {package.parent}: install the project again")


def user_conf_folders() -> list[Path]:
    """The folders of a user's own tasks and experiments: `./conf` and `$FUSION_CONF`.

    Raises:
        UserError: FUSION_CONF is no folder.
    """
    folders = [Path.cwd() / "conf"]
    if named := os.environ.get("FUSION_CONF"):
        folders.append(resolve_path(named, "FUSION_CONF"))
        if not folders[-1].is_dir():
            raise UserError(f"FUSION_CONF={named}: no such folder")
    # A folder with launch.yaml is a checkout's copy of the shipped one.
    found = [path.resolve() for path in folders if path.is_dir() and not (path / "launch.yaml").is_file()]
    return list(dict.fromkeys(found))


class UserConf(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in user_conf_folders():
            search_path.append(provider=USER_CONF, path=f"file://{folder}")


Plugins.instance().register(UserConf)


def groups() -> set[str]:
    """The config groups: folders of the shipped conf/ and of the user's, and tables."""
    folders = (path for conf in (conf_folder(), *user_conf_folders()) for path in conf.iterdir())
    return {*TABLES} | {path.name for path in folders if path.is_dir()}


def check_choices(launch: DictConfig) -> None:
    """Check that each chosen file is in one place only: the shipped conf/ or one of the user's.

    Args:
        launch: Hydra's part of a composed config.

    Raises:
        UserError: names the places.
    """
    folders = [
        Path(source.path)
        for source in launch.runtime.config_sources
        if source.schema == "file" and source.provider in ("main", USER_CONF)
    ]
    for group, choice in launch.runtime.choices.items():
        if group.startswith("hydra/") or choice is None:
            continue
        for name in [choice] if isinstance(choice, str) else choice:
            places = [file for folder in folders if (file := folder / group / f"{name}.yaml").is_file()]
            check_place(group, name, places)


def check_place(group: str, name: str, places: Collection[Any]) -> None:
    """Raises UserError if a choice is in more than one folder."""
    if len(places) > 1:
        raise UserError(
            f"{group} {name} is in two places: {' and '.join(map(str, places))}\ngive your own another name"
        )
