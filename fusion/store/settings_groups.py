"""Which artifacts are one setting trained with several seeds, by their resolved settings, never by their names.

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
    from fusion.store.parts import Source

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

    def of_artifact(self, manifest: Manifest, store: Path, depth: int = 0) -> Settings:
        """The settings of a stored artifact, whose sources are found by their hashes."""
        if depth >= _DEEPEST:
            return {"artifact": manifest.name}
        sources = [self._source(source, manifest.seed, store, depth + 1) for source in manifest.sources]
        return self._settings(manifest.run.config, sources, manifest.seed, store, depth)

    def of_run(
        self,
        config: Mapping[str, Any],
        store: Path | None,
        sources: Sequence[str] | None = None,
        depth: int = 0,
    ) -> Settings:
        """The settings of a run without its artifact: its sources are found by name.

        Args:
            config: flat, as `fusion.runs.identity.identity_config` gives it.
            store: where the sources are; None: not known.
            sources: their names, if the config holds something else, such as `top:3`.
        """
        seed = config.get("seed")
        named = config.get(SOURCES) if sources is None else sources
        names = named if isinstance(named, (list, tuple)) else ()
        found = [self._named(str(name), seed, store, depth + 1) for name in names]
        return self._settings(config, found, seed, store, depth)

    def _settings(
        self, config: Mapping[str, Any], sources: list[Settings], seed: Any, store: Path | None, depth: int
    ) -> Settings:
        settings = _plain(config) | ({SOURCES: sources} if sources else {})
        if isinstance(reference := config.get(FUSION), str):
            settings[FUSION] = self._named(reference, seed, store, depth + 1)
        return settings

    def _source(self, source: Source, seed: Any, store: Path, depth: int) -> Settings:
        if store not in self._stores:
            self._stores[store] = _by_hash(manifest for _, manifest in artifacts(store, replaced=True))
        if (found := self._stores[store].get(source.hash)) is not None:
            return self.of_artifact(found, store, depth)
        return self._named(source.name, seed, store, depth, stored=False)

    def _named(
        self, reference: str, seed: Any, store: Path | None, depth: int, stored: bool = True
    ) -> Settings:
        if store is not None and depth < _DEEPEST:
            if stored:
                with contextlib.suppress(UserError, OSError):
                    folder = find(reference, store)
                    return self.of_artifact(read_folder(folder), folder.parent, depth)
            if (config := self._known.get(str(store / reference))) is not None:
                return self.of_run(config, store, None, depth)
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
        if not any(key == one or key.startswith(f"{one}.") for one in left_out)
        and (key, value) not in NOT_SETTINGS_AT
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
    named = []
    for source in settings.get(SOURCES) or ():
        several = [str(v) for k, v in source.items() if re.fullmatch(r"tasks\.\d+\.name", k)]
        named.append(str(source.get("artifact") or source.get("task.name") or "+".join(several)))
    return named
