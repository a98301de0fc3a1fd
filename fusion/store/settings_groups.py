"""Which artifacts are one setting trained with several seeds: told by their resolved settings, never by their names.

Two runs belong together where everything that decides their numbers is the same, apart from the seed. What a run is
named and where its files are does not count, and a source counts by its own settings in the same way: `rte-s1` and
`rte-s2` are the same source where they differ by their seed alone.

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

# Keys that differ between the seeds of one setting, or only say where something is.
NOT_SETTINGS: tuple[str, ...] = (
    "seed",
    "name",
    "store",
    "output",
    "overwrite",
    "resume",
    "data.dir",
    "data.cache_dir",
    "backbone.cache_gb",
)
NOT_SETTINGS += ("logger", "hydra", "inputs", "sources_by")
# Values whose results are equal up to rounding: only float16 changes them.
NOT_SETTINGS_AT = tuple(("backbone.cache", value) for value in ("auto", "off", "float32"))
SOURCES, FUSION = "sources", "composition.fusion"  # keys that name artifacts
_DEEPEST = 8  # artifacts made of artifacts


class Lookup:
    """Gives the settings of artifacts and runs, those of their sources included; each store is read once.

    Args:
        known: flat configs by the absolute path of the artifact that they made, for artifacts that are gone.
        stores: the manifests of stores that have been read already, replaced artifacts too.
    """

    def __init__(
        self,
        known: Mapping[str, Mapping[str, Any]] | None = None,
        stores: Mapping[Path, Iterable[Manifest]] | None = None,
    ) -> None:
        self._known = dict(known or {})
        self._read = dict(stores or {})
        self._indices: dict[Path, dict[str, Manifest]] = {}

    def of_artifact(self, manifest: Manifest, store: Path) -> Settings:
        """Of a stored artifact. Its sources are found by their hashes, as the fusion itself finds them."""
        return self._of_artifact(manifest, store, 0)

    def of_run(
        self, config: Mapping[str, Any], store: Path | None, sources: Sequence[str] | None = None
    ) -> Settings:
        """Of a run whose artifact is not there: its sources are found by name.

        Args:
            config: flat, as `fusion.runs.run.identity_config` gives it.
            store: where the sources are; None: not known.
            sources: their names, where the config holds others, such as `top:3`.
        """
        return self._of_config(config, store, sources, 0)

    def _of_artifact(self, manifest: Manifest, store: Path, depth: int) -> Settings:
        config = manifest.run.config
        if depth >= _DEEPEST:
            return {"artifact": manifest.name}
        sources = [self._by_hash(source, manifest.seed, store, depth + 1) for source in manifest.sources]
        settings = _plain(config)
        if sources:
            settings[SOURCES] = sources
        if isinstance(reference := config.get(FUSION), str):
            settings[FUSION] = self._by_name(reference, manifest.seed, store, depth + 1)
        return settings

    def _of_config(
        self, config: Mapping[str, Any], store: Path | None, sources: Sequence[str] | None, depth: int
    ) -> Settings:
        settings, seed = _plain(config), config.get("seed")
        named = config.get(SOURCES) if sources is None else sources
        if isinstance(named, (list, tuple)) and named:
            settings[SOURCES] = [self._by_name(str(name), seed, store, depth + 1) for name in named]
        if isinstance(reference := config.get(FUSION), str):
            settings[FUSION] = self._by_name(reference, seed, store, depth + 1)
        return settings

    def _by_hash(self, source: Source, seed: Any, store: Path, depth: int) -> Settings:
        if (found := self._index(store).get(source.hash)) is not None:
            return self._of_artifact(found, store, depth)
        return self._by_name(source.name, seed, store, depth, stored=False)

    def _by_name(
        self, reference: str, seed: Any, store: Path | None, depth: int, stored: bool = True
    ) -> Settings:
        if store is not None and depth < _DEEPEST:
            if stored:
                with contextlib.suppress(UserError, OSError):
                    folder = find(reference, store)
                    return self._of_artifact(read_folder(folder), folder.parent, depth)
            if (config := self._known.get(str(store / reference))) is not None:
                return self._of_config(config, store, None, depth)
        # Nothing but the name is left of it. A sweep over seeds ends it with its own one.
        return {"artifact": re.sub(rf"-seed-{re.escape(str(seed))}$", "", reference)}

    def _index(self, store: Path) -> dict[str, Manifest]:
        if store not in self._indices:
            manifests = self._read.get(store)
            if manifests is None:
                manifests = [manifest for _, manifest in artifacts(store, replaced=True)]
            self._indices[store] = {manifest.hash: manifest for manifest in manifests}
        return self._indices[store]


def key_of(settings: Mapping[str, Any]) -> str:
    """The same text for the same settings."""
    return json.dumps(settings, sort_keys=True, default=str)


def group(settings: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Positions of equal settings, in the order in which they first appear."""
    groups: dict[str, list[int]] = {}
    for position, one in enumerate(settings):
        groups.setdefault(key_of(one), []).append(position)
    return list(groups.values())


def differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each the settings that not all of them share. Sources are named by their tasks, where those differ."""
    flat = [_flat(one) for one in settings]
    tasks = [_tasks(one) for one in settings]
    if len(set(map(tuple, tasks))) > 1:  # other sources altogether: each one's settings would be noise
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
