"""Which artifacts are one setting trained with different seeds, by their resolved settings, never by their names.

Two runs have the same setting if everything that determines their numbers is equal, apart from the seed. A source
counts by its own settings in the same way: `rte-s1` and `rte-s2` are the same source if only their seeds differ.

    lookup = Lookup()
    settings = [lookup.of_artifact(manifest, store) for manifest in manifests]
    groups = group(settings)            # [[0, 2], [1]]: positions of equal settings
    differing(settings)                 # of each, the settings that not all share
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.store.lookup import artifacts, find, read_folder

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

Settings = dict[str, Any]

# Keys that differ between the seeds of one setting, or only name where something is.
NOT_SETTINGS = (
    *("seed", "name", "store", "output", "overwrite", "resume", "data.dir", "data.cache_dir"),
    *("backbone.cache_gb", "logger", "hydra", "inputs", "sources_by"),
)
# Values whose results are equal up to rounding: only float16 changes them.
NOT_SETTINGS_AT = tuple(("backbone.cache", value) for value in ("auto", "off", "float32"))
SOURCES, FUSION = "sources", "composition.fusion"  # keys that name artifacts
_DEEPEST = 8  # artifacts made of artifacts


class Lookup:
    """The settings of artifacts and runs, including those of their sources; each store is read once.

    Args:
        known: flat configs by the absolute path of the artifact that they made, for artifacts that are gone.
        stores: the manifests of stores that have been read already, replaced artifacts included.
    """

    def __init__(
        self,
        known: Mapping[str, Mapping[str, Any]] | None = None,
        stores: Mapping[Path, Iterable[Manifest]] | None = None,
    ) -> None:
        self._known = known or {}
        self._stores = {store: _by_hash(manifests) for store, manifests in (stores or {}).items()}
        self._depth = 0

    def of_artifact(self, manifest: Manifest, store: Path) -> Settings:
        """The settings of a stored artifact, whose sources are found by their hashes."""
        if store not in self._stores:
            self._stores[store] = _by_hash(manifest for _, manifest in artifacts(store, replaced=True))
        sources = []
        for source in manifest.sources:
            found = self._stores[store].get(source.hash)
            sources.append(
                self._named(source.name, manifest.seed, store, False)
                if found is None
                else self.of_artifact(found, store)
            )
        return self._settings(manifest.run.config, sources, manifest.seed, store)

    def of_run(self, config: Mapping[str, Any], store: Path | None, sources: Sequence[str] | None = None) -> Settings:
        """The settings of a run without its artifact: its sources are found by name.

        Args:
            config: flat, as `fusion.runs.identity.identity_config` gives it.
            store: where the sources are; None: not known.
            sources: their names, if the config holds something else, such as `top:3`.
        """
        seed, named = config.get("seed"), config.get(SOURCES) if sources is None else sources
        names = named if isinstance(named, (list, tuple)) else ()
        return self._settings(config, [self._named(str(name), seed, store) for name in names], seed, store)

    def _settings(self, config: Mapping[str, Any], sources: list[Settings], seed: Any, store: Path | None) -> Settings:
        settings = _plain(config) | ({SOURCES: sources} if sources else {})
        if isinstance(reference := config.get(FUSION), str):
            settings[FUSION] = self._named(reference, seed, store)
        return settings

    def _named(self, reference: str, seed: Any, store: Path | None, stored: bool = True) -> Settings:
        """The settings of an artifact by its name; `stored`: it may be in the store."""
        if store is not None and self._depth < _DEEPEST:  # a pruned fusion may have overwritten what it names
            self._depth += 1
            try:
                if stored:
                    with contextlib.suppress(UserError, OSError):
                        folder = find(reference, store)
                        return self.of_artifact(read_folder(folder), folder.parent)
                if (config := self._known.get(str(store / reference))) is not None:
                    return self.of_run(config, store)
            finally:
                self._depth -= 1
        # Only the name is left. In a sweep over seeds it ends with the seed.
        return {"artifact": re.sub(rf"-seed-{re.escape(str(seed))}$", "", reference)}


def _by_hash(manifests: Iterable[Manifest]) -> dict[str, Manifest]:
    return {manifest.hash: manifest for manifest in manifests}


def key_of(settings: Mapping[str, Any]) -> str:
    """Equal texts for equal settings."""
    return json.dumps(settings, sort_keys=True, default=str)


def group(settings: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Positions of equal settings, in the order in which they first appear."""
    groups: dict[str, list[int]] = {}
    for position, one in enumerate(settings):
        groups.setdefault(key_of(one), []).append(position)
    return list(groups.values())


def differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of each that not all of them share. Sources are named by their tasks if those differ."""
    flat = [_flat(one) for one in settings]
    tasks = [_tasks(one) for one in settings]
    if len(set(map(tuple, tasks))) > 1:  # other sources: their settings would be noise
        flat = [
            {k: v for k, v in one.items() if not k.startswith(f"{SOURCES}.")} | {SOURCES: "+".join(names)}
            for one, names in zip(flat, tasks, strict=True)
        ]
    keys = sorted({key for one in flat for key in one})
    keys = [key for key in keys if len({json.dumps(one.get(key), default=str) for one in flat}) > 1]
    return [{key: one.get(key) for key in keys} for one in flat]


def _plain(config: Mapping[str, Any]) -> Settings:
    left_out = (*NOT_SETTINGS, SOURCES, FUSION)
    return {
        key: value
        for key, value in config.items()
        if not any(key == one or key.startswith(f"{one}.") for one in left_out) and (key, value) not in NOT_SETTINGS_AT
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Settings:
    flat: Settings = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif key == SOURCES and isinstance(value, list):
            for number, source in enumerate(value):
                flat |= _flat(source, f"{prefix}{key}.{number}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _tasks(settings: Mapping[str, Any]) -> list[str]:
    """The tasks of each source."""
    tasks = []
    for source in settings.get(SOURCES) or ():
        names = [str(v) for k, v in source.items() if re.fullmatch(r"task\.name|tasks\.\d+\.name", k)]
        tasks.append(str(source.get("artifact") or "+".join(names)))
    return tasks
